"""Grid: where a rank stands in its pipeline, and the topology that DeepSpeed sees.

In the bidirectional placement the two ranks that hold the same stages are data parallelism of degree 2: DeepSpeed is
given a topology with half as many pipe positions and twice as many data ranks, so that its reductions, its ZeRO
partitions and its norms cover both copies without further help.

    the user's pipeline, PP = 4                      what DeepSpeed sees: 2 pipe positions, data parallelism of 2

    rank          0     1     2     3                position      0           1
    direction 0   s0 -> s1 -> s2 -> s3               ranks         0 and 3     1 and 2
    direction 1   s3 <- s2 <- s1 <- s0               hold          s0, s3      s1, s2
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology
from deepspeed.utils import groups

from ...comm.communicators import close
from ...schedule.placement import Placement


class MirrorTopology(ProcessTopology):
    """The user's topology with ranks p and PP-1-p of a pipeline folded onto pipe position p.

    The ranks of one position, over both directions and all replicas, are numbered along `data` in ascending order, so
    that a rank's data index is also its rank in the process group.
    """

    def __init__(self, base: ProcessTopology) -> None:
        dims = {axis: base.get_dim(axis) for axis in base.get_axis_names()}
        pipe = dims["pipe"]
        folded = dims | {"pipe": pipe // 2, "data": 2 * dims["data"]}
        super().__init__(axes=list(folded), dims=list(folded.values()))
        members: dict[tuple[int, ...], list[int]] = {}
        for coord, rank in base.mapping.items():
            axes = coord._asdict()
            axes["pipe"] = min(axes["pipe"], pipe - 1 - axes["pipe"])
            members.setdefault(tuple(value for axis, value in axes.items() if axis != "data"), []).append(rank)
        for coord in self.mapping:
            axes = coord._asdict()
            index = axes.pop("data")
            self.mapping[coord] = sorted(members[tuple(axes.values())])[index]


class Place:
    """A rank's place in its pipeline.

    Args:
        topology: the user's topology (axes `pipe`, `data` and perhaps `model`).
        placement: stages on the pipeline's ranks.
        global_rank: the rank in question.
    """

    def __init__(self, topology: ProcessTopology, placement: Placement, global_rank: int) -> None:
        self.placement = placement
        coord = topology.get_coord(global_rank)
        self.rank: int = coord.pipe
        self.replica: int = coord.data
        self.replicas: int = topology.get_dim("data")
        self.pipeline: tuple[int, ...] = tuple(
            topology.get_rank(**(coord._asdict() | {"pipe": position})) for position in range(topology.get_dim("pipe"))
        )

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages of this rank, in order of their numbers."""
        return tuple(sorted(self.placement.stages_of(self.rank)))

    @property
    def feeds(self) -> bool:
        """Whether this rank reads inputs or labels."""
        return self.reads_inputs or self.reads_labels

    @property
    def reads_inputs(self) -> bool:
        """Whether this rank runs the first stage."""
        return 0 in self.stages

    @property
    def reads_labels(self) -> bool:
        """Whether this rank runs the last stage."""
        return self.placement.num_stages - 1 in self.stages

    @property
    def has_outputs(self) -> int:
        """Global rank, of this pipeline, that has the outputs of all micro-batches after an evaluation."""
        return self.pipeline[self.placement.rank(self.placement.num_stages - 1)]

    @property
    def ends(self) -> tuple[int, ...]:
        """Pipeline ranks that read data."""
        last = self.placement.num_stages - 1
        found = {self.placement.rank(stage, d) for stage in (0, last) for d in range(self.placement.num_directions)}
        return tuple(sorted(found))


def set_device(module: PipelineModule) -> None:
    """Make this rank's device the current one: object collectives put their tensors there, and without this all ranks
    of a node would use its first."""
    get_accelerator().set_device(module.local_rank)


def deepspeed_grid(base: PipelineParallelGrid, placement: Placement) -> PipelineParallelGrid:
    """The grid that DeepSpeed works with: the user's own, or its mirror image for the bidirectional placement.

    Collective over all ranks.
    """
    if placement.num_directions == 1:
        return base
    grid = PipelineParallelGrid(topology=MirrorTopology(base.topology()), process_group=None)
    # It numbers by global rank, which descends along one direction; checkpoint files are named by this number, so that
    # both copies of a stage must have the same one.
    grid.ds_model_rank = grid.topology().get_axis_list("data", grid.data_parallel_id).index(grid.global_rank)
    return grid


def position_of(placement: Placement, stage: int) -> int:
    """The pipe position, in the grid of `deepspeed_grid`, that owns `stage`."""
    return min(placement.replicas(stage))


def groups_of(module: PipelineModule) -> list[dist.ProcessGroup]:
    """The process groups of this rank that making a PipelineModule has made."""
    held = [*vars(module).values(), *vars(module._grid).values(), *(tie["group"] for tie in module.tied_comms.values())]
    return [each for each in held if isinstance(each, dist.ProcessGroup)]


def give_back(own: Iterable[dist.ProcessGroup]) -> None:
    """End process groups, and with them what DeepSpeed keeps of them; those that it shares between engines stay.

    Collective over all ranks.
    """
    shared = [each for each in vars(groups).values() if isinstance(each, dist.ProcessGroup)]
    ended = [group for group in own if group not in shared]
    for table in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        for name in [name for name, group in table.items() if group in ended]:
            del table[name]
    close(ended)
