"""How long the transfers and the gradient reductions of a job take, timed on its own ranks and groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from ...comm.copies import copyist, host_empty
from ...comm.from_all import from_all
from ...comm.transport import Transport
from ...errors import PipelineRuntimeError
from ...runtime.observer import Observer
from ...schedule.op import NONE, STEP, Op
from ...schedule.placement import Placement
from ...schedule.progress import waiting
from ..placing.grid import MirrorTopology, Place

REPEATS = 5  #: timed, after one that warms up
TIMED = Op(STEP, NONE, NONE)  #: the name of all that is timed
LARGEST = 1 << 24  #: elements of a reduction that is timed; the time of a larger one is scaled up
LARGEST_COPY = 1 << 26  #: bytes of a copy, likewise


def transfer_seconds(
    place: Place, transport: Transport, sizes: Sequence[int], device: torch.device, timeout_s: float
) -> float:
    """Seconds of the slowest hop between neighbours of the pipeline: half a median round trip.

    Collective over the pipeline.

    Args:
        place: this rank's place.
        transport: of the pipeline.
        sizes: bytes that each rank passes on to the next.
        device: where the tensors are.
        timeout_s: seconds after which a transfer is given up.
    """
    slowest = 0.0
    for edge in range(len(sizes) - 1):  # one after the other, so that each has the link to itself
        if place.rank not in (edge, edge + 1):
            continue
        leads = place.rank == edge
        peer = edge + 1 if leads else edge
        out = torch.zeros(max(1, sizes[edge]), dtype=torch.uint8, device=device)
        back = torch.empty_like(out)

        def round_trip(
            leads: bool = leads, peer: int = peer, out: torch.Tensor = out, back: torch.Tensor = back
        ) -> None:
            for sends in (leads, not leads):
                tensor = out if leads == sends else back
                ticket = transport.send(tensor, peer, 0) if sends else transport.recv(tensor, peer, 0)
                with waiting():
                    ticket.wait(timeout_s)

        slowest = max(slowest, _timed(round_trip, device) / 2)
    return slowest


def reduction_seconds(
    grid: PipelineParallelGrid, place: Place, numel: int, dtype: torch.dtype, placements: Sequence[Placement]
) -> dict[str, float]:
    """For each placement the seconds that reducing the gradients of a rank's stages takes, on the slowest rank.

    Collective over all ranks.

    Args:
        grid: the user's grid.
        place: this rank's place on the linear placement.
        numel: elements of the gradients of this rank's stage.
        dtype: in which they are reduced.
        placements: of the same ranks.
    """
    device = torch.device(get_accelerator().current_device_name())
    stages = from_all((place.pipeline, place.rank, numel))
    sizes = [size for _, size in sorted((rank, size) for line, rank, size in stages if line == place.pipeline)]
    alone = _reduction(grid.dp_proc_group, place.replicas, numel, dtype, device)
    seconds = {}
    for placement in placements:
        if placement.num_directions == 1:
            seconds[placement.key] = alone  # its stages are parts of several
            continue
        groups = [(dist.new_group(members), members) for members in _twins(grid)]
        mirrored = next(group for group, members in groups if dist.get_rank() in members)
        copies, held = placement.num_directions * place.replicas, placement.held(sizes, place.rank)
        seconds[placement.key] = _reduction(mirrored, copies, held, dtype, device)
        dist.destroy_process_group(mirrored)
    seconds_of_ranks = from_all(seconds)
    return {name: max(each[name] for each in seconds_of_ranks) for name in seconds}


def copy_seconds(size: int, device: torch.device, timeout_s: float) -> float:
    """Seconds of the copy of so many bytes from the device to host memory, or of that back: of the slower one.

    Collective over all ranks, which copy at one time, as those of a host share its memory.

    Args:
        size: bytes; none take no time.
        device: where the stages run. On the CPU a thread copies, as for activations.
        timeout_s: seconds after which a copy that the host waits for is given up.

    Raises:
        PipelineRuntimeError: it was not in time.
    """
    there = torch.zeros(max(1, min(size, LARGEST_COPY)), dtype=torch.uint8, device=device)
    host, copies = host_empty(there), copyist(device)
    host.copy_(there)

    def copy(name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        with waiting():
            if not copies.copy(name, [(target, source)]).wait(timeout_s):
                raise PipelineRuntimeError(
                    f'a copy between device and host has not ended within {timeout_s:g} s: raise "p2p_timeout_s"'
                )

    with waiting():
        dist.barrier()
    seconds = max(
        _timed(lambda: copy("offload", host_empty(there), there), device),  # memory is taken anew, as for activations
        _timed(lambda: copy("reload", torch.empty_like(there), host), device),
    )
    return seconds * size / there.numel()


def _twins(grid: PipelineParallelGrid) -> list[list[int]]:
    """Global ranks that hold the same stages in the bidirectional placement."""
    return MirrorTopology(grid.topology()).get_axis_comm_lists("data")


def _reduction(group: dist.ProcessGroup, copies: int, numel: int, dtype: torch.dtype, device: torch.device) -> float:
    if copies < 2 or not numel:
        return 0.0
    tensor = torch.zeros(min(numel, LARGEST), dtype=dtype, device=device)
    return _timed(lambda: dist.all_reduce(tensor, group=group), device) * numel / tensor.numel()


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Median seconds of `action`; on an accelerator between events of the stream that waits for it, where the host has
    queued one after the other, as in training."""
    clock = Observer(0, device)
    clock.start_batch()
    for _ in range(REPEATS + 1):
        with clock.span(TIMED):
            action()
    return median(span.end - span.start for span in clock.spans()[1:])
