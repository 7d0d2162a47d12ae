"""RunState: what lives for one run of a program, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..comm.nest import Nest
from ..schedule.op import Op
from ..schedule.placement import Placement


class Feed(Protocol):
    """Where the ends of the pipeline get their data."""

    def inputs(self, micro: int) -> Nest:
        """What stage 0 takes for `micro`."""

    def labels(self, micro: int) -> Nest:
        """What the loss takes for `micro`."""


@dataclass
class BatchResult:
    """What the last stage made: losses (training) or outputs (inference) of the micro-batches that end on this rank."""

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Nest] = field(default_factory=dict)


class RunState:
    """Of one rank. Values are kept by (stage, micro-batch).

    Args:
        placement: of the plan that runs.
        feed: its data.
        train: whether backwards follow.

    Attributes:
        last: the last stage.
        result: what has ended here.
        inputs: of stages whose stage before is on this rank too.
        outputs: until they are sent.
        grads: of the outputs of a stage, from a stage after it on this rank; of the inputs of a stage, until they are
            sent.
        behind: what is done behind the sends, for which neighbours may wait: a function and its arguments.
        sent: outputs that have gone before their SEND_F.
        following: the op behind the one that runs, None behind the last.
        in_tail: whether the tail is at work, all of whose errors end the job.
    """

    def __init__(self, placement: Placement, feed: Feed, train: bool) -> None:
        self.feed, self.train = feed, train
        self.last = placement.num_stages - 1
        self.result = BatchResult()
        self.inputs: dict[tuple[int, int], Nest] = {}
        self.outputs: dict[tuple[int, int], Nest] = {}
        self.grads: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.behind: list[tuple[Callable[..., None], tuple[object, ...]]] = []
        self.sent: set[tuple[int, int]] = set()
        self.following: Op | None = None
        self.in_tail = False
        self._holders = [placement.replicas(stage) for stage in range(placement.num_stages)]

    def rank_of(self, stage: int, micro: int) -> int:
        """The pipeline rank that runs a stage for a micro-batch: `Placement.rank_of`, looked up."""
        holders = self._holders[stage]
        return holders[micro % len(holders)]

    def clear(self) -> None:
        """Drop all values."""
        for values in (self.inputs, self.outputs, self.grads, self.behind):
            values.clear()
