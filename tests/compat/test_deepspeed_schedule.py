"""DualPipeSchedule: every rank's instructions, run with a barrier between steps and blocking transfers."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule as ds

from dualpipe_engine.compat.deepspeed_schedule import DualPipeSchedule, InputGradPass, OverlappedPass, WeightGradPass
from dualpipe_engine.schedule.op import atoms
from dualpipe_engine.schedule.search.make_plan import make_plan

TRANSFERS = (ds.SendActivation, ds.SendGrad, ds.RecvActivation, ds.RecvGrad)


def parts_of(command):
    return [command.kwargs["forward"], command.kwargs["backward"]] if isinstance(command, OverlappedPass) else [command]


def run_with_barriers(schedules):
    """A rank may only pass a step when all have; transfers of a step are rendezvous, one after another on each rank."""
    steps = [list(schedule) for schedule in schedules]
    assert len({len(rank) for rank in steps}) == 1
    placement = schedules[0].plan.placement
    present = [set() for _ in steps]  # (kind, stage, micro) that a rank holds
    buffers = [{} for _ in steps]
    done = [[] for _ in steps]
    for number in range(len(steps[0])):
        queues = [[command for command in rank[number] if isinstance(command, TRANSFERS)] for rank in steps]
        while any(queues):
            moved = False
            for rank, queue in enumerate(queues):
                if not queue or not isinstance(queue[0], (ds.SendActivation, ds.SendGrad)):
                    continue
                send = queue[0].kwargs
                forward = isinstance(queue[0], ds.SendActivation)
                stage = send["stage"] + (1 if forward else -1)
                target = placement.rank_of(stage, send["micro_batch"])
                if not queues[target]:
                    continue
                receive = queues[target][0]
                if not isinstance(receive, ds.RecvActivation if forward else ds.RecvGrad):
                    continue
                assert (receive.kwargs["stage"], receive.kwargs["micro_batch"]) == (stage, send["micro_batch"])
                made = ("F" if forward else "B", send["stage"], send["micro_batch"])
                assert made in present[rank], f"step {number}: rank {rank} sends {made} before it is made"
                present[target].add(("in" + made[0], stage, send["micro_batch"]))
                queue.pop(0)
                queues[target].pop(0)
                moved = True
            assert moved, f"step {number} does not complete: {queues}"
        for rank in range(len(steps)):
            for command in steps[rank][number]:
                for part in parts_of(command):
                    check_compute(part, present[rank], buffers[rank], done[rank], placement)
    return done


def check_compute(part, present, buffers, done, placement):
    last = placement.num_stages - 1
    args = part.kwargs
    if not args:
        return
    key = (args["stage"], args["micro_batch"])
    stage, micro = key

    def came(kind, source):
        local = 0 <= source <= last and placement.rank_of(source, micro) == placement.rank_of(stage, micro)
        return (kind, source, micro) in present if local else ("in" + kind, stage, micro) in present

    if isinstance(part, ds.ForwardPass):
        assert stage == 0 or came("F", stage - 1)
        assert args["buffer_id"] not in {b for k, b in buffers.items() if k != key}, "buffer is in use"
        buffers[key] = args["buffer_id"]
        present.add(("F", *key))
        done.append(f"{stage}F{micro}")
    elif isinstance(part, (ds.BackwardPass, InputGradPass)):
        assert ("F", *key) in present
        assert buffers[key] == args["buffer_id"]
        assert stage == last or came("B", stage + 1)
        present.add(("B", *key))
        done.append(f"{stage}{'I' if isinstance(part, InputGradPass) else 'B'}{micro}")
        if isinstance(part, ds.BackwardPass):
            del buffers[key]
    elif isinstance(part, WeightGradPass):
        assert buffers.pop(key) == args["buffer_id"]
        done.append(f"{stage}W{micro}")


@pytest.mark.parametrize("name", ["dualpipe", "1f1b", "zb1p", "dualpipev", "zbv"])
@pytest.mark.parametrize(("ranks", "micros"), [(2, 1), (2, 4), (4, 3), (4, 8), (8, 20)])
def test_steps_are_safe_against_a_barrier(name, ranks, micros):
    plan = make_plan(name, ranks, micros)
    schedules = [DualPipeSchedule(micros, ranks, rank, plan) for rank in range(ranks)]
    done = run_with_barriers(schedules)
    for rank, program in enumerate(plan.programs):
        assert done[rank] == [str(part) for op in program for part in atoms(op)]


def test_defaults_to_dualpipe_and_is_a_pipe_schedule():
    schedule = DualPipeSchedule(micro_batches=8, stages=4, stage_id=1)
    assert isinstance(schedule, ds.PipeSchedule)
    assert schedule.plan == make_plan("dualpipe", 4, 8)
    final = list(schedule)[-1]
    assert [type(command) for command in final[-3:]] == [ds.ReduceTiedGrads, ds.ReduceGrads, ds.OptimizerStep]
    assert schedule.num_pipe_buffers() <= 6
