"""Times and bytes of a PipelineModule's layers: measured on a micro-batch."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ...errors import ConfigError
from ...runtime.held import HeldBytes
from ...schedule.placement import LINEAR, Placement
from ..given import LayerFunction
from ..placing.balance import of_all_layers
from ..placing.experts import connected_experts
from ..placing.grid import Place, set_device
from ..placing.module import PlacedModule
from ..placing.partition import same_random_state


def measure_layers(module: PipelineModule, batch: Nest, repeats: int = 5) -> list[float]:
    """Seconds that forward and backward of each layer take on one micro-batch. Collective over all ranks.

    Every rank runs its layers, one at a time, on what the rank before it computed; the last layer includes the loss.
    Weights, buffers, gradients and random generators are left as they were. Activation checkpointing is not applied.
    `schedule.cuts.layer_times.write_layer_costs` keeps the result for `"layer_costs"`.

    Args:
        module: a PipelineModule as its constructor left it, in the precision in which it will train.
        batch: one micro-batch `(inputs, labels)`, the same on all ranks of a pipeline.
        repeats: runs of which the median is taken, after one that warms up.

    Returns:
        One number a layer, the mean over the replicas of the pipeline; the same list on every rank.

    Raises:
        ConfigError: the module has been given to initialize already.
    """
    return [seconds for seconds, _ in probe_layers(module, batch, repeats)]


def probe_layers(module: PipelineModule, batch: Nest, repeats: int) -> list[tuple[float, int]]:
    """The same, each number with the bytes that a micro-batch keeps of the layer.

    Args, Raises: see `measure_layers`.
    """
    if isinstance(module, PlacedModule):
        raise ConfigError("measure_layers needs the PipelineModule as it was built: call it before initialize")
    place = Place(module._grid.topology(), Placement(LINEAR, module.num_stages), module.global_rank)
    device = torch.device(get_accelerator().device_name(module.local_rank))
    set_device(module)
    with connected_experts(module):
        first, last = place.rank == 0, place.rank == module.num_stages - 1
        start = int(module.parts[module.stage_id])
        buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        box: list[Nest] = [batch[0]]
        if not first:
            dist.recv_object_list(box, place.pipeline[place.rank - 1])
        x = _moved(box[0], device)
        found = {}
        with same_random_state(), torch.enable_grad():
            for index, layer in enumerate(module.forward_funcs):
                ends = last and index == len(module.forward_funcs) - 1 and module.loss_fn is not None
                labels = (_moved(batch[1], device),) if ends else ()
                run = partial(_run, module, layer, x, labels, input_gradient=not (first and index == 0))
                runs = [run() for _ in range(repeats + 1)]
                with HeldBytes() as held:
                    kept = run(held).kept
                found[start + index] = median(each.seconds for each in runs[1:]), float(kept)
                x = runs[-1].output
        if not last:
            dist.send_object_list([_moved(x, torch.device("cpu"))], place.pipeline[place.rank + 1])
        for name, buffer in module.named_buffers():
            buffer.data.copy_(buffers[name])
        table = torch.tensor(of_all_layers(module, found), dtype=torch.float64, device=device)
        dist.all_reduce(table)
    return [(seconds, round(kept)) for seconds, kept in (table / dist.get_world_size()).tolist()]


class _Run(NamedTuple):
    """One forward and backward.

    Args:
        seconds: of both.
        output: of the layer.
        kept: bytes between the two, but for what goes in and comes out.
    """

    seconds: float
    output: Nest
    kept: int


def _run(
    module: PipelineModule,
    layer: LayerFunction,
    x: Nest,
    labels: tuple[Nest, ...],
    held: HeldBytes | None = None,
    *,
    input_gradient: bool,
) -> _Run:
    """Run a layer; `held` counts bytes."""
    before = {param: param.grad for param in module.parameters()}
    for param in before:
        param.grad = None
    given = pytree.tree_map(partial(_input, gradient=input_gradient), x)
    get_accelerator().synchronize()
    began = time.perf_counter()
    y = layer(given)
    results = module.loss_fn(y, *labels) if labels else y
    kept = 0
    if held is not None:
        kept = held.but([*module.parameters(), *_tensors(x), *_tensors(given), *_tensors(results)])
    roots = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    get_accelerator().synchronize()
    seconds = time.perf_counter() - began
    for param, grad in before.items():
        param.grad = grad
    output = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, y)
    return _Run(seconds, output, kept)


def _tensors(value: Nest) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _input(value: Nest, gradient: bool) -> Nest:
    """A copy that layers may work on in place, so no leaf; with a gradient where it can have one."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(gradient and value.is_floating_point()).clone()


def _moved(value: Nest, device: torch.device) -> Nest:
    value = tuple(value) if isinstance(value, list) else value
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)
