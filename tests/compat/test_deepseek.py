"""DeepSeek's interface against one process that runs micro-batches in turn: losses bit for bit, gradients to 1e-13."""

from __future__ import annotations

import threading

import deepseek_runs as runs
import pytest
import torch
from ranks import RankError

from dualpipe_engine.comm.transport import LocalHub, LocalTransport
from dualpipe_engine.compat.deepseek import StagePair
from dualpipe_engine.schedule.op import FB
from dualpipe_engine.schedule.search.make_plan import make_plan


def check_dualpipe(found):
    for rank, each in enumerate(found):
        assert each["train"] and each["infer"] and each["again"], f"rank {rank}: {each}"
        assert each["error"] < 1e-13 and each["error_again"] < 1e-13, f"rank {rank}: {each}"
        assert each["clean"] and not each["graph"] and each["left"] == 0
        mirrored = found[len(found) - 1 - rank]["digests"]
        assert each["digests"] == mirrored, "the copies of a stage differ"


@pytest.mark.parametrize(("size", "chunks"), [(2, 20), (4, 20), (4, 3), (2, 1), (4, 7)])
def test_example_with_weight_grad_store_and_overlap(ranks, size, chunks):
    found = ranks.run(size, runs.dualpipe, kind="OverlappedStage", chunks=chunks)
    check_dualpipe(found)
    plan = make_plan("dualpipe", size, chunks)
    pairs = [sum(op.kind == FB for op in program) for program in plan.programs]
    split = [sum(op.kind == "I" for op in program) for program in plan.programs]
    assert [each["pairs"] for each in found] == pairs
    assert [each["puts"] for each in found] == [2 * count for count in split]


def test_plain_layers(ranks):
    check_dualpipe(ranks.run(4, runs.dualpipe, kind="Stage", chunks=9))
    check_dualpipe(ranks.run(2, runs.dualpipe, kind="Stage", chunks=5, defer_weight_gradients=False))


def test_weight_gradients_left_in_the_queue(ranks):
    check_dualpipe(ranks.run(2, runs.dualpipe, kind="LaterStage", chunks=6))


def test_batch_dim_and_rank_mapping(ranks):
    check_dualpipe(ranks.run(2, runs.dualpipe, kind="OwnStage", chunks=6, dim=1))
    found = ranks.run(4, runs.dualpipe, kind="OwnStage", chunks=8, mapping=[2, 0, 3, 1])
    for each in found:
        assert each["train"] and each["infer"] and each["again"] and each["error"] < 1e-13
    assert [each["end"] for each in found] == [False, True, True, False]


def test_process_groups(ranks):
    for good, error in ranks.run(4, runs.subgroup, chunks=5):
        assert good and error < 1e-13


@pytest.mark.parametrize(
    ("size", "kind", "chunks", "dim", "mapping"),
    [
        (2, "OverlappedStage", 10, 0, None),
        (4, "Stage", 3, 1, [3, 1, 0, 2]),
        (1, "Stage", 2, 0, None),
        (3, "OwnStage", 9, 0, None),
    ],
)
def test_dualpipev(ranks, size, kind, chunks, dim, mapping):
    found = ranks.run(size, runs.dualpipev, kind=kind, chunks=chunks, dim=dim, mapping=mapping)
    for each in found:
        assert each["train"] and each["infer"] and each["evaluate"] and each["error"] < 1e-13, each
    if kind == "OverlappedStage":
        plan = make_plan("dualpipev", size, chunks)
        assert [each["pairs"] for each in found] == [sum(op.kind == FB for op in p) for p in plan.programs]


def test_tuples_and_shapes_that_change_between_steps(ranks):
    assert ranks.run(2, runs.tuples_and_shapes, chunks=5) == [[True] * 3] * 2


@pytest.mark.parametrize(
    ("what", "size", "message"),
    [
        ("mapping", 2, "rank_mapping must hold each of 0..1 once, got [0, 0]"),
        ("modules", 2, "takes the two stages of this rank, got 1 modules"),
        ("odd", 3, "even number of pipeline ranks, got 3"),
        ("criterion", 2, "training needs a criterion there"),
        ("rows", 2, "inputs of size 6 along dimension 0 cannot be cut into the 4 equal micro-batches"),
        ("chunks", 2, "num_chunks must be the number of micro-batches, at least 1, got 0"),
    ],
)
def test_refusals(ranks, what, size, message):
    with pytest.raises(RankError) as raised:
        ranks.run(size, runs.refused, what=what)
    assert len(raised.value.errors) == size
    for kind, text, _ in raised.value.errors.values():
        assert kind in ("ConfigError", "PlanError") and message in text


@pytest.mark.gloo  # over NCCL the watchdog ends the process
def test_a_rank_that_waits_gives_up_after_the_timeout_of_its_group(ranks):
    (said, took), (cause, _) = ranks.run(2, runs.lives_on, seconds=1)
    assert "no rows" in cause and "from pipeline rank 1" in said
    assert 0.9 < took < 60


def test_values_that_are_no_tensors_are_refused(ranks):
    [(said, goes_on)] = ranks.run(1, runs.refused_values)
    assert goes_on
    for text, expected in zip(
        said,
        [
            "inputs must be tensors (or None) with a dimension 0, along which micro-batches are cut, got list",
            "inputs must be tensors (or None) with a dimension 0, along which micro-batches are cut, got a tensor []",
            "labels must be tensors (or None) with a dimension 0, along which micro-batches are cut, got int",
            "num_chunks must be the number of micro-batches, at least 1, got 2.0",
            "criterion must return the loss of micro-batch 0 as a tensor, got NoneType",
            "stage 0 returns dict: it must return a tensor, or a tuple or list of tensors",
        ],
        strict=True,
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("schedule", "size", "chunks"), [("dualpipe", 6, 13), ("dualpipe", 8, 16), ("dualpipev", 6, 12)]
)
def test_many_ranks_in_threads(schedule, size, chunks):
    hub, failures = LocalHub(size), []
    num_stages = size if schedule == "dualpipe" else 2 * size
    model, (x, y) = runs.whole_model("Stage", num_stages), runs.batch(chunks)
    losses, _ = runs.reference(model, (x,), (y,), runs.criterion, chunks)
    held = [runs.pipeline_stages("Stage", model, (rank, num_stages - 1 - rank)) for rank in range(size)]
    found: dict[int, torch.Tensor] = {}

    def work(rank):
        try:
            pipe = StagePair(schedule, held[rank], 0, LocalTransport(hub, rank), size)
            mine = target = None
            if schedule == "dualpipev":
                mine, target = x, y
            elif rank in (0, size - 1):
                direction = int(rank > 0)
                mine, target = runs.of_direction(x, chunks, direction), runs.of_direction(y, chunks, 1 - direction)
            loss, _ = pipe.step(mine, num_chunks=chunks, criterion=runs.criterion, labels=(target,))
            if loss is not None:
                found[rank] = loss
        except BaseException as error:
            failures.append(error)
            hub.fail(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    if schedule == "dualpipev":
        assert torch.equal(found[0], losses)
    else:
        assert torch.equal(torch.cat([found[size - 1], found[0]]), losses)
    for rank in range(size):
        for place, stage in enumerate((rank, num_stages - 1 - rank)):
            copies = (
                [held[rank][place]]
                if schedule == "dualpipev"
                else [held[rank][place], held[size - 1 - rank][1 - place]]
            )
            for name, of in model[stage].named_parameters():
                total = sum(dict(each.named_parameters())[name].grad for each in copies)
                assert float((total - of.grad).norm() / of.grad.norm()) < 1e-13
