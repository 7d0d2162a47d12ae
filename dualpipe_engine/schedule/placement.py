"""Placement: which rank runs which stage for which micro-batch. All arithmetic of stages and ranks lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import PlanError

LINEAR = "linear"
BIDIRECTIONAL = "bidirectional"
VEE = "vee"
LOOP = "loop"

#: Of each placement how many stages a stage of the linear one is cut into; None: any number, which has to be given.
_PARTS = {LINEAR: 1, BIDIRECTIONAL: 1, VEE: 2, LOOP: None}
MOST_RANKS = 100_000  #: of one pipeline
MOST_STAGES = 1_000_000  #: of one pipeline


@dataclass(frozen=True)
class Placement:
    """Stages and micro-batches on ranks (DeepSeek-V3 report, section 3.2.1, figure 5; `vee`: the cut-in-half note;
    `loop`: arXiv 2104.04473, section 2.2).

    | name | stages | rank r holds |
    |---|---|---|
    | linear | PP | stage r |
    | bidirectional | PP (even) | stage r for direction 0, stage PP-1-r for direction 1 |
    | vee | 2 PP | stages r and 2 PP-1-r |
    | loop | v PP | stages r, PP+r, ..., (v-1) PP+r |

    Args:
        name: one of these.
        num_ranks: PP.
        stages_per_rank: v of `loop`; None for the others, which have a fixed number.

    Raises:
        PlanError: the name is unknown, or the rank count cannot carry it.
    """

    name: str
    num_ranks: int
    stages_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _PARTS:
            *names, last = _PARTS
            raise PlanError(f"unknown placement {self.name!r}: use {', '.join(names)} or {last}")
        if self.num_ranks < 1:
            raise PlanError(f"a pipeline needs at least one rank, got {self.num_ranks}")
        if self.num_ranks > MOST_RANKS:
            raise PlanError(f"a pipeline has at most {MOST_RANKS:,} ranks")
        if self.name == BIDIRECTIONAL and self.num_ranks % 2:
            raise PlanError(
                f"dualpipe needs an even number of pipeline ranks, got {self.num_ranks}: "
                'use an even number, or "schedule": "dualpipev", which runs on any number'
            )
        if _PARTS[self.name] is not None:
            if self.stages_per_rank is not None:
                raise PlanError(f"placement {self.name} has a fixed number of stages a rank: leave stages_per_rank out")
        elif self.stages_per_rank is None:
            raise PlanError(f"placement {self.name} needs stages_per_rank, the number of stages that a rank holds")
        elif self.stages_per_rank < 1:
            raise PlanError(f"stages_per_rank starts at 1, got {self.stages_per_rank}")
        elif self.num_stages > MOST_STAGES:
            raise PlanError(f"a pipeline has at most {MOST_STAGES:,} stages: use fewer stages_per_rank")

    @property
    def key(self) -> str:
        """The name, with the stages a rank where they are not fixed: what is measured of a placement goes by it."""
        return self.name if self.stages_per_rank is None else f"{self.name} of {self.stages_per_rank}"

    @property
    def num_stages(self) -> int:
        return self.parts * self.num_ranks

    @property
    def num_directions(self) -> int:
        """Directions in which micro-batches travel; each has a copy of every stage."""
        return 2 if self.name == BIDIRECTIONAL else 1

    @property
    def parts(self) -> int:
        """Stages that one of a linear cut into as many stages as there are ranks is cut into."""
        return self.stages_per_rank or _PARTS[self.name] or 1

    def direction(self, micro: int) -> int:
        """Direction of a micro-batch: 0 enters at stage 0 on rank 0, 1 at stage 0 on the last rank."""
        return micro % self.num_directions

    def rank(self, stage: int, direction: int = 0) -> int:
        """The rank that runs `stage` for micro-batches of `direction`."""
        if self.name == VEE:
            return min(stage, 2 * self.num_ranks - 1 - stage)
        if self.name == LOOP:
            return stage % self.num_ranks
        return self.num_ranks - 1 - stage if direction else stage

    def rank_of(self, stage: int, micro: int) -> int:
        """The rank that runs `stage` for micro-batch `micro`."""
        return self.rank(stage, self.direction(micro))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds: for `bidirectional` index = direction, else in order of the way."""
        if self.name in (LINEAR, LOOP):
            return tuple(range(rank, self.num_stages, self.num_ranks))
        return (rank, self.num_stages - 1 - rank)

    def edges(self) -> tuple[tuple[int, int], ...]:
        """The pairs of ranks (source, destination) between which tensors travel: outputs to the rank of the next stage,
        gradients back."""
        found: dict[tuple[int, int], None] = {}
        for direction in range(self.num_directions):
            for stage in range(self.num_stages - 1):
                here, there = self.rank(stage, direction), self.rank(stage + 1, direction)
                if here != there:
                    found |= {(here, there): None, (there, here): None}
        return tuple(sorted(found))

    def held(self, sizes: Sequence[int], rank: int) -> int:
        """What `rank` holds of a model of which the stages of the linear cut have these sizes, cut into equal parts."""
        return sum(sizes[stage // self.parts] for stage in self.stages_of(rank)) // self.parts

    def micros(self, direction: int, num_micro: int) -> range:
        """The micro-batches of one direction among 0..num_micro-1, in the order in which they enter."""
        return range(direction, num_micro, self.num_directions)

    def replicas(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of `stage`, index = direction."""
        return tuple(self.rank(stage, direction) for direction in range(self.num_directions))
