"""Carry: layers go to the ranks that shall hold them, as the objects that the user has built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from ..checks.agreement import raise_everywhere
from ..checks.fingerprint import difference, fingerprint, text
from .grid import Place
from .partition import same_random_state, stage_of_layer
from .portable import Context, Shape, pack, unpack

_REMEDY = (
    ": let it hold nothing that belongs to a process, change the layer after initialize on every rank that holds it, "
    'or take "schedule": "zb1p" or "1f1b", which move no layer'
)


class Layer(NamedTuple):
    """A layer as it is built.

    Args:
        function: what a stage calls.
        module: what is registered: the layer's own module, or that of its tie; None for a plain function.
    """

    function: Any
    module: nn.Module | None


class _Message(NamedTuple):
    """The layers that one rank sends to another.

    Args:
        data: structure of those that can be pickled, and the tensors of the others by name.
        shapes: the tensors.
        sizes: bytes of each block of memory.
        facts: layer -> fingerprint, with which it must arrive.
    """

    data: bytes
    shapes: list[Shape]
    sizes: list[int]
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
    """Send and receive layers. Collective over all ranks.

    A layer that cannot be pickled is built anew from its LayerSpec, if nothing tells the copy from the original but
    values of tensors, which are sent.

    Args:
        module: a PipelineModule as its constructor left it (anything may have been changed since).
        placed: this rank's place.
        before: bounds of the stages that it was built with.
        after: bounds of the stages of `placed`.

    Returns:
        The layers that this rank had or has received.

    Raises:
        ConfigError: a layer cannot be carried; it is named, on every rank.
    """
    device = torch.device(get_accelerator().device_name(module.local_rank))
    held = layers_of(module)
    moves: dict[tuple[int, int], list[int]] = {}  # (source, target) -> layers
    for number in range(len(module._layer_specs)):
        source = stage_of_layer(before, number)
        for target in placed.placement.replicas(stage_of_layer(after, number)):
            if target != source:
                moves.setdefault((source, target), []).append(number)
    if not moves:
        return held
    wrong: list[str] = []
    packed = {}
    own = _own(module, placed)
    for (source, target), numbers in moves.items():
        if source == placed.rank:
            context = _context(module, own, placed, device, target)
            packed[target] = _packed({n: held[n] for n in numbers}, module, context, target, wrong)
    raise_everywhere(wrong, _REMEDY)
    for (source, target), numbers in sorted(moves.items()):
        if source == placed.rank:
            _send(*packed.pop(target), placed.pipeline[target], device)
        elif target == placed.rank:
            message, blocks = _received(placed.pipeline[source], device)
            context = _context(module, own, placed, device, source)
            try:
                held |= _unpacked(message, blocks, module, context, wrong)
            except Exception as error:  # unpickling may raise anything
                wrong.append(f"layers {numbers} cannot be carried to pipeline rank {target}: {_said(error)}")
    raise_everywhere(wrong, _REMEDY)
    return held


# -- one message ---------------------------------------------------------------------------------------------------


def _packed(
    layers: dict[int, Layer], module: PipelineModule, context: Context, target: int, wrong: list[str]
) -> tuple[_Message, list[Tensor]]:
    content: dict[int, Any] = {number: tuple(layer) for number, layer in layers.items()}
    facts = {number: _facts(number, layer) for number, layer in layers.items()}
    try:
        data, shapes, blocks = pack(tuple(content.items()), context)
    except Exception:
        for number, layer in layers.items():
            if reason := _obstacle(tuple(layer), number, context):
                content[number] = tuple(_tensors(layer).items())
                if not isinstance(module._layer_specs[number], (LayerSpec, nn.Module)):
                    wrong.append(f"layer {number} cannot be carried to pipeline rank {target}: {reason}")
                facts[number][""] = reason
        data, shapes, blocks = pack(tuple(content.items()), context)
    return _Message(data, shapes, [block.numel() for block in blocks], facts), blocks


def _send(message: _Message, blocks: list[Tensor], peer: int, device: torch.device) -> None:
    dist.send_object_list([message], peer)
    through = _through(device)
    for block in blocks:
        if block.numel():
            dist.send(block.to(through), peer)


def _received(peer: int, device: torch.device) -> tuple[_Message, list[Tensor]]:
    box: list[Any] = [None]
    dist.recv_object_list(box, peer)
    message: _Message = box[0]
    blocks = [torch.empty(size, dtype=torch.uint8, device=_through(device)) for size in message.sizes]
    for block in blocks:
        if block.numel():
            dist.recv(block, peer)
    return message, [block.to(device) for block in blocks]


def _through(device: torch.device) -> torch.device:
    """Where tensors travel: gloo and MPI send from host memory only."""
    return torch.device("cpu") if dist.get_backend() in ("gloo", "mpi") else device


def _unpacked(
    message: _Message, blocks: list[Tensor], module: PipelineModule, context: Context, wrong: list[str]
) -> dict[int, Layer]:
    layers = {}
    for number, content in unpack(message.data, message.shapes, blocks, context):
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


def _rebuilt(spec: Any, tensors: Mapping[str, Tensor]) -> Layer:
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


def _obstacle(layer: tuple[Any, nn.Module | None], number: int, context: Context) -> str | None:
    """Why a layer cannot be packed, and what of it; None if it can."""
    try:
        pack(layer, context)
    except Exception as error:  # pickling may raise anything
        for path, part in layer[1].named_modules(prefix=str(number)) if layer[1] is not None else ():
            for key, value in vars(part).items():
                if key != "_modules" and (found := _part_of(value, context)) is not None:
                    name, reason = found
                    return f"{path}.{key}{name} ({text(value)}): {_said(reason)}"
        return _said(error)
    return None


def _part_of(value: Any, context: Context) -> tuple[str, Exception] | None:
    try:
        pack(value, context)
    except Exception as error:
        for key, each in value.items() if isinstance(value, dict) else ():
            if (found := _part_of(each, context)) is not None:
                return f"[{key!r}] {text(each)}", found[1]
        return "", error
    return None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


# -- what belongs to a process ----------------------------------------------------------------------------------------


def _own(module: PipelineModule, placed: Place) -> dict[Any, Any]:
    """Objects that every rank has its own of: the module and what its specifications name. Collective over the ranks of
    a pipeline.

    An argument of one LayerSpec alone counts if it looks the same on all ranks: it may have been changed with its
    layer.
    """
    found: dict[Any, Any] = {}
    uses: Counter[int] = Counter()
    arguments: dict[Any, Any] = {}
    for number, spec in enumerate(module._layer_specs):
        if isinstance(spec, LayerSpec):
            found["kind", number] = spec.typename
            found["forward", number] = getattr(spec, "forward_fn", None)
            given = {**dict(enumerate(spec.module_args)), **spec.module_kwargs}
            for key, value in given.items():
                if not isinstance(value, _CARRIED):
                    uses[id(value)] += 1
                    arguments["argument", number, key] = value
        elif not isinstance(spec, nn.Module):
            found["function", number] = spec
    alone = {key: value for key, value in arguments.items() if uses[id(value)] == 1}
    looks: list[Any] = [None] * len(placed.pipeline)
    mine = {key: text(vars(value) if hasattr(value, "__dict__") else value, 4) for key, value in alone.items()}
    dist.all_gather_object(looks, mine, group=module._grid.pp_proc_group)
    differing = {key for each in looks for key, text in each.items() if text != mine.get(key)}
    found |= {key: value for key, value in arguments.items() if key not in differing}
    found["module"] = module
    return {key: value for key, value in found.items() if value is not None}


_CARRIED = (nn.Module, Tensor, int, float, complex, str, bytes, list, dict, set, frozenset, tuple, type(None))


def _context(module: PipelineModule, own: dict[Any, Any], placed: Place, device: torch.device, other: int) -> Context:
    topology = module._grid.topology()
    mine, theirs = placed.rank, other

    def key_of(group: Any) -> Any:
        ranks = tuple(dist.get_process_group_ranks(group))
        return _moved(ranks, topology, mine, theirs), _alike(ranks).index(group)

    def group_of(key: Any) -> Any:
        ranks, index = key
        alike = _alike(ranks)
        return alike[index] if index < len(alike) else None

    return Context(own, device, key_of, group_of)


def _alike(ranks: tuple[int, ...]) -> list[Any]:
    """The process groups of some ranks, in the order in which they were made."""
    known = dist.distributed_c10d._world.pg_group_ranks
    return [group for group, members in known.items() if tuple(sorted(members)) == tuple(sorted(ranks))]


def _moved(ranks: tuple[int, ...], topology: ProcessTopology, source: int, target: int) -> tuple[int, ...]:
    """The ranks that stand at one pipeline position as `ranks` do at another; those of a group over several positions
    stay."""
    coords = [topology.get_coord(rank) for rank in ranks]
    if any(coord.pipe != source for coord in coords):
        return ranks
    return tuple(topology.get_rank(**(coord._asdict() | {"pipe": target})) for coord in coords)
