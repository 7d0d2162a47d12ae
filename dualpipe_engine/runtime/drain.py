"""Drain: the rest of a program whose batch has failed, without its computations.

What other ranks send is taken and dropped, and zeros are sent where they wait for something, so that the next batch
meets no message of this one. Reductions take part with what gradients there are. All ranks know by then that the batch
has failed, and none steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ..comm.p2p import Edges
from ..schedule.op import GRADIENTS, RECV_B, RECV_F, REDUCE, SEND_B, SEND_F, STEP, B, F, I, Op, atoms
from .run_state import RunState


class Failing(Protocol):
    """Who knows of batches that fail."""

    @property
    def failures(self) -> Mapping[int, object]:
        """A live view, which is empty as long as all goes well: a look at it costs an op nothing."""

    @property
    def batch_failed(self) -> bool:
        """Whether the batch has failed on a rank."""

    def fail_batch(self, error: Exception | None, where: str = "") -> None:
        """Return when all ranks know; raise where they cannot go on."""


class BatchFailed(Exception):
    """Another rank has said so; this one stops to compute."""


class Drain:
    """Of one rank's program.

    Args:
        rank: position in the pipeline.
        edges: transfers.
        handlers: by kind of op, those of receives, reductions and the step.
        state: of the run.
        accumulate: called as after every B and W of a stage.
    """

    def __init__(
        self,
        rank: int,
        edges: Edges,
        handlers: Mapping[str, Callable[[Op], None]],
        state: RunState,
        accumulate: Callable[[int], None],
    ) -> None:
        self._rank, self._edges, self._handlers = rank, edges, handlers
        self._state, self._accumulate = state, accumulate

    def run(self, op: Op) -> None:
        """Do for an op, or for what has failed of it, what other ranks wait for."""
        if op.kind in (RECV_F, RECV_B, REDUCE, STEP):
            self._handlers[op.kind](op)
        elif op.kind == SEND_F:
            if (op.stage, op.micro) not in self._state.sent:
                self._edges.send_no_output(op.stage, op.micro, self._state.rank_of(op.stage + 1, op.micro))
        elif op.kind == SEND_B:
            self._edges.send_no_grads(op.stage, op.micro, self._state.rank_of(op.stage - 1, op.micro))
        else:
            for part in atoms(op):
                self._compute_nothing(part)

    def _compute_nothing(self, op: Op) -> None:
        stage, micro = op.stage, op.micro
        if op.kind == F and stage > 0 and self._state.rank_of(stage - 1, micro) != self._rank:
            self._edges.drop_forward(stage, micro)
        if op.kind in (B, I) and stage < self._state.last and self._state.rank_of(stage + 1, micro) != self._rank:
            self._edges.drop_backward(stage, micro)
        if op.kind in GRADIENTS:
            self._accumulate(stage)
