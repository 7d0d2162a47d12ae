"""Carry: layers go to the ranks that shall hold them, as the objects that the user has built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from ...comm.from_all import from_all
from ..checks.agreement import raise_everywhere
from ..checks.fingerprint import difference, fingerprint, text
from ..given import LayerEntry, LayerFunction
from .blocks import Shape
from .counterparts import counterparts, own_objects
from .grid import Place
from .moves import Move, leaving, moves_between, ordered
from .partition import same_random_state
from .portable import LocalObjects, pack, unpack

_REMEDY = (
    ": let it hold nothing that belongs to a process or to another engine (call the destroy() of one that had the "
    "layer), change the layer after initialize on every rank that holds it, or take "
    '"schedule": "zb1p" or "1f1b", which move no layer'
)


class Layer(NamedTuple):
    """A layer as it is built.

    Args:
        function: what a stage calls.
        module: what is registered: the layer's own module, or that of its tie; None for a plain function.
    """

    function: LayerFunction
    module: nn.Module | None


class _Message(NamedTuple):
    """The layers that one rank sends to another, without their memory.

    Args:
        data: structure of those that can be pickled, and the tensors of the others by name.
        shapes: the tensors.
        blocks: (layer, bytes) of each block of memory; it is sent with that layer.
        facts: layer -> fingerprint, with which it must arrive.
    """

    data: bytes
    shapes: list[Shape]
    blocks: list[tuple[int, int]]
    facts: dict[int, dict[str, str]]


def layers_of(module: PipelineModule) -> dict[int, Layer]:
    """The layers of this rank, by number, of a module as its constructor left it."""
    held = {}
    start = int(module.parts[module.stage_id])
    for number, function in enumerate(module.forward_funcs, start):
        spec = module._layer_specs[number]
        tied = isinstance(spec, TiedLayerSpec)
        held[number] = Layer(function, module.tied_modules[spec.key] if tied else module._modules.get(str(number)))
    return held


def carry(module: PipelineModule, placed: Place, before: Sequence[int], after: Sequence[int]) -> dict[int, Layer]:
    """Send and receive layers, one after another. Collective over all ranks.

    A rank gives a layer's memory back once it has sent it for the last time, and receives only when it has room
    (`moves.ordered`): the parameters of a layer that has left are empty, in whatever lists a program keeps them.

    A layer that cannot be pickled is built anew from its LayerSpec, if nothing tells the copy from the original but
    values of tensors, which are sent.

    Args:
        module: a PipelineModule as its constructor left it (anything may have been changed since).
        placed: this rank's place.
        before: bounds of the stages that it was built with.
        after: bounds of the stages of `placed`.

    Returns:
        The layers of this rank, those that it keeps and those that it has received.

    Raises:
        ConfigError: a layer cannot be carried; it is named, on every rank.
    """
    held = layers_of(module)
    moves = moves_between(placed.placement, before, after)
    if not moves:
        return held
    device = torch.device(get_accelerator().device_name(module.local_rank))
    own = own_objects(module, placed)
    wrong: list[str] = []
    outgoing: dict[int, _Message] = {}
    memory: dict[int, dict[int, list[Tensor]]] = {}  # target -> layer -> blocks
    for target in sorted({move.target for move in moves if move.source == placed.rank}):
        local = counterparts(module, own, placed, device, target)
        layers = {move.layer: held[move.layer] for move in moves if (move.source, move.target) == (placed.rank, target)}
        outgoing[target], memory[target] = _packed(layers, module, local, target, wrong)
    raise_everywhere(wrong, _REMEDY)
    incoming = _exchanged(outgoing, moves, placed)
    order = ordered(moves, _sizes(outgoing, module), leaving(placed.placement, before, after))
    arrived = _moved(order, held, memory, incoming, module, placed)
    for source, message in incoming.items():
        local = counterparts(module, own, placed, device, source)
        try:
            held |= _unpacked(message, arrived.pop(source), module, local, wrong)
        except Exception as error:  # unpickling may raise anything
            numbers = list(message.facts)
            wrong.append(f"layers {numbers} cannot be carried to pipeline rank {placed.rank}: {_said(error)}")
    raise_everywhere(wrong, _REMEDY)
    return held


def _moved(
    order: Sequence[Move],
    held: dict[int, Layer],
    memory: dict[int, dict[int, list[Tensor]]],
    incoming: Mapping[int, _Message],
    module: PipelineModule,
    placed: Place,
) -> dict[int, list[Tensor]]:
    """Send and receive the memory of layers; those that leave are taken out of `held`, those sent out of `memory`.

    Returns:
        Source -> the blocks of its message.
    """
    device = torch.device(get_accelerator().device_name(module.local_rank))
    arrived = {
        source: [torch.empty(0, dtype=torch.uint8, device=device) for _ in message.blocks]
        for source, message in incoming.items()
    }
    for number, source, target, leaves in order:
        if source == placed.rank:
            _send(memory[target].pop(number), placed.pipeline[target], device)
            if leaves:
                _release(held.pop(number), module._layer_specs[number], held)
        elif target == placed.rank:
            _receive(arrived[source], incoming[source], number, placed.pipeline[source])
    return arrived


def _release(layer: Layer, spec: LayerEntry, held: Mapping[int, Layer]) -> None:
    """Give back the memory of a layer that trains elsewhere, whoever still refers to its parameters: they keep their
    shapes, and are one NaN.

    Args:
        layer: which this rank has sent for the last time.
        spec: its specification; a module that the user has built on all ranks goes to host memory.
        held: the layers that it has still; what they share with it stays.
    """
    if layer.module is None:
        return
    if not isinstance(spec, LayerSpec):
        layer.module.cpu()
        return
    kept = {param for other in held.values() if other.module is not None for param in other.module.parameters()}
    for param in set(layer.module.parameters()) - kept:
        if type(param.data) is Tensor:
            param.grad = None
            param.data = param.data.new_full((), torch.nan if param.is_floating_point() else 0).expand(param.shape)


# -- one message ---------------------------------------------------------------------------------------------------


def _packed(
    layers: dict[int, Layer], module: PipelineModule, local: LocalObjects, target: int, wrong: list[str]
) -> tuple[_Message, dict[int, list[Tensor]]]:
    content: dict[int, Any] = {number: tuple(layer) for number, layer in layers.items()}
    facts = {number: _facts(number, layer) for number, layer in layers.items()}
    try:
        packed = pack(tuple(content.items()), local)
    except Exception:
        for number, layer in layers.items():
            if reason := _obstacle((layer.function, layer.module), number, local):
                content[number] = tuple(_tensors(layer).items())
                if not isinstance(module._layer_specs[number], (LayerSpec, nn.Module)):
                    wrong.append(f"layer {number} cannot be carried to pipeline rank {target}: {reason}")
                facts[number][""] = reason
        try:
            packed = pack(tuple(content.items()), local)
        except Exception as error:  # what a tensor has beside its numbers may raise anything
            wrong.append(f"layers {list(layers)} cannot be carried to pipeline rank {target}: {_said(error)}")
            packed = pack((), local)
    numbers = list(layers)
    memory: dict[int, list[Tensor]] = {number: [] for number in numbers}
    blocks = []
    for owner, block in zip(packed.owners, packed.blocks, strict=True):
        memory[numbers[owner]].append(block)
        blocks.append((numbers[owner], block.numel()))
    return _Message(packed.data, packed.shapes, blocks, facts), memory


def _exchanged(outgoing: Mapping[int, _Message], moves: Sequence[Move], placed: Place) -> dict[int, _Message]:
    """Send messages to the ranks that they are for; returns those of other ranks."""
    incoming: dict[int, _Message] = {}
    for source, target in sorted({(move.source, move.target) for move in moves}):
        if source == placed.rank:
            dist.send_object_list([outgoing[target]], placed.pipeline[target])
        elif target == placed.rank:
            box: list[Any] = [None]
            dist.recv_object_list(box, placed.pipeline[source])
            incoming[source] = box[0]
    return incoming


def _sizes(outgoing: Mapping[int, _Message], module: PipelineModule) -> Counter[int]:
    """Bytes of each layer that moves. Collective over the ranks of a pipeline."""
    mine: Counter[int] = Counter()
    for message in outgoing.values():
        to_one: Counter[int] = Counter()
        for number, size in message.blocks:
            to_one[number] += size
        mine |= to_one  # a layer has one source, and the same size for all its targets, shared tensors aside
    return sum(from_all(mine, module._grid.pp_proc_group), Counter[int]())


def _send(blocks: list[Tensor], peer: int, device: torch.device) -> None:
    through = _through(device)
    for block in blocks:
        if block.numel():
            dist.send(block.to(through), peer)


def _receive(blocks: list[Tensor], message: _Message, layer: int, peer: int) -> None:
    for block, (number, size) in zip(blocks, message.blocks, strict=True):
        if number == layer and size:
            data = torch.empty(size, dtype=torch.uint8, device=_through(block.device))
            dist.recv(data, peer)
            block.data = data.to(block.device)


def _through(device: torch.device) -> torch.device:
    """Where tensors travel: gloo and MPI send from host memory only."""
    return torch.device("cpu") if dist.get_backend() in ("gloo", "mpi") else device


def _unpacked(
    message: _Message, blocks: list[Tensor], module: PipelineModule, local: LocalObjects, wrong: list[str]
) -> dict[int, Layer]:
    layers = {}
    contents = cast("list[tuple[int, Any]]", unpack(message.data, message.shapes, blocks, local))
    for number, content in contents:
        facts = message.facts[number]
        reason = facts.pop("", None)
        layer = layers[number] = (
            Layer(*content) if reason is None else _rebuilt(module._layer_specs[number], dict(content))
        )
        if differs := difference(facts, _facts(number, layer)):
            why = differs if reason is None else f"{reason}, and a copy built from its LayerSpec is another: {differs}"
            wrong.append(f"layer {number} cannot be carried to pipeline rank {module.stage_id}: {why}")
    return layers


def _facts(number: int, layer: Layer) -> dict[str, str]:
    if layer.module is None or layer.module is layer.function:
        return fingerprint(layer.function, str(number))
    return fingerprint(layer.function, f"{number} called as") | fingerprint(layer.module, str(number))


def _tensors(layer: Layer) -> dict[str, Tensor]:
    module = layer.module
    return {} if module is None else dict(module.named_parameters()) | dict(module.named_buffers())


def _rebuilt(spec: LayerEntry, tensors: Mapping[str, Tensor]) -> Layer:
    """Built from its specification, with the tensors of the original."""
    with same_random_state():
        built: nn.Module = spec.build() if isinstance(spec, LayerSpec) else spec
    for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
        if name in tensors:
            tensor.data = tensors[name].data
            tensor.requires_grad_(tensors[name].requires_grad)
    forward_fn = getattr(spec, "forward_fn", None)
    return Layer(built if forward_fn is None else partial(forward_fn, built), built)


# -- what stands in the way ------------------------------------------------------------------------------------------


def _obstacle(layer: tuple[LayerFunction, nn.Module | None], number: int, local: LocalObjects) -> str | None:
    """Why a layer cannot be packed, and what of it; None if it can."""
    try:
        pack((layer,), local)
    except Exception as error:  # pickling may raise anything
        for path, part in layer[1].named_modules(prefix=str(number)) if layer[1] is not None else ():
            for key, value in vars(part).items():
                if key != "_modules" and (found := _part_of(value, local)) is not None:
                    name, reason = found
                    return f"{path}.{key}{name} ({text(value)}): {_said(reason)}"
        return _said(error)
    return None


def _part_of(value: object, local: LocalObjects) -> tuple[str, Exception] | None:
    try:
        pack((value,), local)
    except Exception as error:
        for key, each in value.items() if isinstance(value, dict) else ():
            if (found := _part_of(each, local)) is not None:
                return f"[{key!r}] {text(each)}", found[1]
        return "", error
    return None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
