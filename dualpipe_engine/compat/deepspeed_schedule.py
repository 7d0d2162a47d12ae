"""DualPipeSchedule: a plan as a DeepSpeed `PipeSchedule`, for people who read, print or subclass DeepSpeed's schedules.

It is a view of the plan, not a second implementation: the engine runs the plan itself, without barriers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed.runtime.pipe import schedule as ds

from ..schedule.op import FB, B, F, I, Op, W, atoms
from ..schedule.plan import Plan
from ..schedule.search.make_plan import make_plan


class InputGradPass(ds.BufferOpInstruction):
    """I: the backward with respect to the inputs of a stage.

    grad_input = backward_input(buffers['output'], grad_output)
    """


class WeightGradPass(ds.BufferOpInstruction):
    """W: the weight gradients that an `InputGradPass` kept back."""


class OverlappedPass(ds.PipeInstruction):
    """F&B: a forward and a backward of different micro-batches, executed together.

    Keyword arguments are `forward` and `backward`, the two instructions that it stands for.
    """


class DualPipeSchedule(ds.PipeSchedule):
    """The instructions of one rank of a plan, in steps that are safe against a barrier.

    All ranks have the same number of steps. A step first makes the transfers of what the previous step computed, in one
    order that is the same on all ranks (source, then destination, activations before gradients), so that blocking
    sends and receives cannot wait for each other; then it computes at most one op. Ranks that have nothing to do in a
    step yield an empty list.

    Instructions carry `buffer_id`, and `stage` and `micro_batch` besides.

    Args:
        micro_batches: micro-batches of one pipeline.
        stages: pipeline ranks.
        stage_id: the rank in the pipeline.
        plan: the plan to show; None for DualPipe's reference order.

    Raises:
        PlanError: DualPipe cannot run on that many ranks.
    """

    def __init__(self, micro_batches: int, stages: int, stage_id: int, plan: Plan | None = None) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.plan = (plan or make_plan("dualpipe", stages, micro_batches)).compute_only()
        self._levels = _levels(self.plan)
        self._steps = list(self._make_steps(_Buffers()))

    def num_pipe_buffers(self) -> int:
        """Buffers that `buffer_id` names here; each holds a micro-batch from its receive to its last backward."""
        ids = [part.kwargs["buffer_id"] for step in self._steps for command in step for part in _parts(command)]
        return 1 + max(ids, default=0)

    def steps(self) -> Iterator[list[Any]]:
        """Yield this rank's instructions, a list a step."""
        yield from self._steps

    def _make_steps(self, buffers: _Buffers) -> Iterator[list[Any]]:
        computed: list[tuple[int, Op]] = []
        for level in self._levels:
            mine = next((op for rank, op in level if rank == self.stage_id), None)
            transfers = self._transfers(computed, buffers)
            for rank, op in computed:
                for part in atoms(op):
                    if rank == self.stage_id and part.kind in (B, W):
                        buffers.release(part.stage, part.micro)
            yield [*transfers, *self._compute(mine, buffers)]
            computed = level
        yield [*self._transfers(computed, buffers), ds.ReduceTiedGrads(), ds.ReduceGrads(), ds.OptimizerStep()]

    def _transfers(self, computed: Sequence[tuple[int, Op]], buffers: _Buffers) -> list[Any]:
        found = []
        placement, last = self.plan.placement, self.plan.placement.num_stages - 1
        for rank, op in computed:
            for kind, stage, micro, _ in atoms(op):
                if kind == W or stage == (last if kind == F else 0):
                    continue
                receiver = stage + (1 if kind == F else -1)
                target = placement.rank_of(receiver, micro)
                if target == rank:
                    continue
                if rank == self.stage_id:
                    send = ds.SendActivation if kind == F else ds.SendGrad
                    found.append((rank, target, kind != F, self._command(send, stage, micro, buffers)))
                elif target == self.stage_id:
                    receive = ds.RecvActivation if kind == F else ds.RecvGrad
                    found.append((rank, target, kind != F, self._command(receive, receiver, micro, buffers)))
        return [entry[3] for entry in sorted(found, key=lambda entry: entry[:3])]

    def _compute(self, op: Op | None, buffers: _Buffers) -> list[Any]:
        if op is None:
            return []
        if op.kind == FB:
            forward, backward = (self._pass(part, buffers) for part in op.parts)
            return [*self._load(op.parts[0], buffers), OverlappedPass(forward=forward, backward=backward)]
        return [*(self._load(op, buffers) if op.kind == F else ()), self._pass(op, buffers)]

    def _load(self, op: Op, buffers: _Buffers) -> list[Any]:
        if op.stage in (0, self.plan.placement.num_stages - 1):
            return [self._command(ds.LoadMicroBatch, op.stage, op.micro, buffers)]
        return []

    def _pass(self, op: Op, buffers: _Buffers) -> Any:
        kinds = {F: ds.ForwardPass, B: ds.BackwardPass, I: InputGradPass, W: WeightGradPass}
        return self._command(kinds[op.kind], op.stage, op.micro, buffers)

    @staticmethod
    def _command(kind: Any, stage: int, micro: int, buffers: _Buffers) -> Any:
        return kind(buffer_id=buffers.of(stage, micro), stage=stage, micro_batch=micro)


class _Buffers:
    """Numbers for the micro-batches that are alive on a rank."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], int] = {}

    def of(self, stage: int, micro: int) -> int:
        taken = set(self._held.values())
        free = next(number for number in range(len(taken) + 1) if number not in taken)
        return self._held.setdefault((stage, micro), free)

    def release(self, stage: int, micro: int) -> None:
        del self._held[stage, micro]


def _parts(command: Any) -> list[Any]:
    if isinstance(command, OverlappedPass):
        return [command.kwargs["forward"], command.kwargs["backward"]]
    return [command] if "buffer_id" in command.kwargs else []


def _levels(plan: Plan) -> list[list[tuple[int, Op]]]:
    """The plan in steps: an op stands one step after its predecessor on the rank and after what it needs."""
    needs: dict[tuple[str, int, int], int] = {}
    at = [0] * plan.placement.num_ranks
    free = [0] * plan.placement.num_ranks
    levels: dict[int, list[tuple[int, Op]]] = {}
    last = plan.placement.num_stages - 1

    def ready(part: Op) -> int | None:
        kind, stage, micro, _ = part
        if kind == F:
            return 0 if stage == 0 else needs.get((F, stage - 1, micro))
        if kind == W:
            return 0
        own = needs.get((F, stage, micro))
        if own is None or stage == last:
            return own
        return needs.get((B, stage + 1, micro))

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(plan.programs):
            while at[rank] < len(program):
                op = program[at[rank]]
                times = [ready(part) for part in atoms(op)]
                if None in times:
                    break
                level = max([free[rank], *(time for time in times if time is not None)])
                levels.setdefault(level, []).append((rank, op))
                for part in atoms(op):
                    if part.kind != W:
                        needs[F if part.kind == F else B, part.stage, part.micro] = level + 1
                free[rank] = level + 1
                at[rank] += 1
                moved = True
    return [levels.get(level, []) for level in range(max(levels) + 1)]
