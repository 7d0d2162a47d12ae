"""DualPipeSchedule: a plan as a DeepSpeed `PipeSchedule`, for people who read, print or subclass DeepSpeed's schedules.

It is a view of the plan, not a second implementation: the engine runs the plan itself, without barriers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspeed.runtime.pipe import schedule as ds

from ..schedule.op import FB, GRADIENTS, RECV_B, RECV_F, SEND_B, SEND_F, B, F, I, Op, W, atoms
from ..schedule.plan import Plan
from ..schedule.search.make_plan import make_plan
from ..schedule.walk import walk

_TRANSFERS = {
    SEND_F: ds.SendActivation,
    RECV_F: ds.RecvActivation,
    SEND_B: ds.SendGrad,
    RECV_B: ds.RecvGrad,
}


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

    def steps(self) -> Iterator[list[ds.PipeInstruction]]:
        """Yield this rank's instructions, a list a step."""
        yield from self._steps

    def _make_steps(self, buffers: _Buffers) -> Iterator[list[ds.PipeInstruction]]:
        computed: list[tuple[int, Op]] = []
        for level in self._levels:
            mine = next((op for rank, op in level if rank == self.stage_id), None)
            transfers = self._transfers(computed, buffers)
            for rank, op in computed:
                for part in atoms(op):
                    if rank == self.stage_id and part.kind in GRADIENTS:
                        buffers.release(part.stage, part.micro)
            yield [*transfers, *self._compute(mine, buffers)]
            computed = level
        yield [*self._transfers(computed, buffers), ds.ReduceTiedGrads(), ds.ReduceGrads(), ds.OptimizerStep()]

    def _transfers(self, computed: Sequence[tuple[int, Op]], buffers: _Buffers) -> list[ds.PipeInstruction]:
        found = []
        placement, last = self.plan.placement, self.plan.placement.num_stages - 1
        for rank, op in computed:
            for part in atoms(op):
                if part.kind == W:
                    continue
                send = part.send()
                receive = send.other_end()
                if not 0 <= receive.stage <= last:
                    continue
                target = placement.rank_of(receive.stage, receive.micro)
                if target == rank:
                    continue
                for there, transfer in ((rank, send), (target, receive)):
                    if there == self.stage_id:
                        command = self._command(_TRANSFERS[transfer.kind], transfer.stage, transfer.micro, buffers)
                        found.append((rank, target, not send.is_forward, command))
        return [entry[3] for entry in sorted(found, key=lambda entry: entry[:3])]

    def _compute(self, op: Op | None, buffers: _Buffers) -> list[ds.PipeInstruction]:
        if op is None:
            return []
        if op.kind == FB:
            forward, backward = (self._pass(part, buffers) for part in op.parts)
            return [*self._load(op.parts[0], buffers), OverlappedPass(forward=forward, backward=backward)]
        return [*(self._load(op, buffers) if op.kind == F else ()), self._pass(op, buffers)]

    def _load(self, op: Op, buffers: _Buffers) -> list[ds.PipeInstruction]:
        if op.stage in (0, self.plan.placement.num_stages - 1):
            return [self._command(ds.LoadMicroBatch, op.stage, op.micro, buffers)]
        return []

    def _pass(self, op: Op, buffers: _Buffers) -> ds.PipeInstruction:
        kinds = {F: ds.ForwardPass, B: ds.BackwardPass, I: InputGradPass, W: WeightGradPass}
        return self._command(kinds[op.kind], op.stage, op.micro, buffers)

    @staticmethod
    def _command(kind: type[ds.PipeInstruction], stage: int, micro: int, buffers: _Buffers) -> ds.PipeInstruction:
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


def _parts(command: ds.PipeInstruction) -> list[ds.PipeInstruction]:
    if isinstance(command, OverlappedPass):
        return [command.kwargs["forward"], command.kwargs["backward"]]
    return [command] if "buffer_id" in command.kwargs else []


def _levels(plan: Plan) -> list[list[tuple[int, Op]]]:
    """The plan in steps: an op stands one step after its predecessor on the rank and after what it needs."""
    num_stages, num_micro = plan.placement.num_stages, plan.num_micro
    grads = num_stages * num_micro
    made: dict[int, int] = {}  # result -> the level after that of its op
    free = [0] * plan.placement.num_ranks
    levels: dict[int, list[tuple[int, Op]]] = {}

    def needs(part: Op) -> Iterator[int]:
        """The results that an op takes."""
        if part.kind != W:
            source = part.receive().other_end().stage
            if part.kind != F:
                yield part.stage * num_micro + part.micro  # of its own forward
            if 0 <= source < num_stages:
                yield source * num_micro + part.micro + (0 if part.kind == F else grads)

    def attempt(rank: int, position: int) -> int | list[int]:
        op = plan.programs[rank][position]
        level = free[rank]
        for part in atoms(op):
            for key in needs(part):
                if key not in made:
                    return key
                level = max(level, made[key])
        levels.setdefault(level, []).append((rank, op))
        free[rank] = level + 1
        results = [
            part.stage * num_micro + part.micro + (0 if part.kind == F else grads)
            for part in atoms(op)
            if part.kind != W
        ]
        made.update(dict.fromkeys(results, level + 1))
        return results

    walk(plan.programs, attempt)
    return [levels.get(level, []) for level in range(max(levels) + 1)]
