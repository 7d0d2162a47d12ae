"""Placement: which rank runs which stage for which micro-batch. All mirror arithmetic lives here."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError

LINEAR = "linear"
BIDIRECTIONAL = "bidirectional"
VEE = "vee"


def parts_of(name: str) -> int:
    """Stages of a placement that each stage of the linear one is cut into."""
    return 2 if name == VEE else 1


def directions_of(name: str) -> int:
    """Directions in which micro-batches travel through a placement; each has a copy of every stage."""
    return 2 if name == BIDIRECTIONAL else 1


MOST_RANKS = 100_000  #: of one pipeline


@dataclass(frozen=True)
class Placement:
    """Stages and micro-batches on ranks (DeepSeek-V3 report, section 3.2.1, figure 5; `vee`: the cut-in-half note).

    | name | stages | rank r holds |
    |---|---|---|
    | linear | PP | stage r |
    | bidirectional | PP (even) | stage r for direction 0, stage PP-1-r for direction 1 |
    | vee | 2 PP | stages r and 2 PP-1-r |

    Raises:
        PlanError: the name is unknown, or the rank count cannot carry it.
    """

    name: str
    num_ranks: int

    def __post_init__(self) -> None:
        if self.name not in (LINEAR, BIDIRECTIONAL, VEE):
            raise PlanError(f"unknown placement {self.name!r}: use {LINEAR}, {BIDIRECTIONAL} or {VEE}")
        if self.num_ranks < 1:
            raise PlanError(f"a pipeline needs at least one rank, got {self.num_ranks}")
        if self.num_ranks > MOST_RANKS:
            raise PlanError(f"a pipeline has at most {MOST_RANKS:,} ranks")
        if self.name == BIDIRECTIONAL and self.num_ranks % 2:
            raise PlanError(
                f"dualpipe needs an even number of pipeline ranks, got {self.num_ranks}: "
                'use an even number, or "schedule": "dualpipev", which runs on any number'
            )

    @property
    def num_stages(self) -> int:
        return self.parts * self.num_ranks

    @property
    def num_directions(self) -> int:
        return directions_of(self.name)

    @property
    def parts(self) -> int:
        """Stages that one of a linear cut into as many stages as there are ranks is cut into."""
        return parts_of(self.name)

    def direction(self, micro: int) -> int:
        """Direction of a micro-batch: 0 enters at stage 0 on rank 0, 1 at stage 0 on the last rank."""
        return micro % self.num_directions

    def rank(self, stage: int, direction: int = 0) -> int:
        """The rank that runs `stage` for micro-batches of `direction`."""
        if self.name == VEE:
            return min(stage, 2 * self.num_ranks - 1 - stage)
        return self.num_ranks - 1 - stage if direction else stage

    def rank_of(self, stage: int, micro: int) -> int:
        """The rank that runs `stage` for micro-batch `micro`."""
        return self.rank(stage, self.direction(micro))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds: for `bidirectional` index = direction, for `vee` in order of the way."""
        if self.name == LINEAR:
            return (rank,)
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

    def micros(self, direction: int, num_micro: int) -> range:
        """The micro-batches of one direction among 0..num_micro-1, in the order in which they enter."""
        return range(direction, num_micro, self.num_directions)

    def replicas(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of `stage`, index = direction."""
        return tuple(self.rank(stage, direction) for direction in range(self.num_directions))
