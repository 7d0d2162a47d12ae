"""The engine on gloo processes against stock DeepSpeed 1F1B and against one process."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import training
from pairwise import pairwise

FACTORS = {
    "schedule": ["dualpipe", "1f1b", "zb1p", "dualpipev", "zbv"],
    "pp": [4, 2, 8],
    "micros": [3, 8, 1, 11],
    "replicas": [1, 2],
    "zero": [1, 0],
    "tied": [True, False],
    "checkpointed": [False, True],
    "split_backward": ["auto", False],
    "optimize": [True, False],
}
KEYS = ("split_backward", "optimize", "activation_cap", "stages_per_rank")  #: of the "pipeline" section
RECOMPUTED = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}


def runs_here(row):
    """At most 8 processes, and those with few micro-batches, since they take the longest."""
    return row["pp"] * row["replicas"] <= 8 and (row["pp"] < 8 or row["micros"] < 11)


PAIRWISE = pairwise(FACTORS, runs_here)
WHOLE = list(product(FACTORS["schedule"], [(2, 1), (2, 4), (4, 3), (4, 8), (4, 11), (4, 20), (6, 12), (8, 16)]))


def name_of(case):
    return "-".join(str(value) for value in case.values())


def case_of(row):
    """What `training.train` is given for a row."""
    pipeline = {key: row[key] for key in KEYS if key in row}
    config = training.settings(row["micros"], row["replicas"], row["zero"], schedule=row["schedule"], **pipeline)
    more = {"module_kwargs": RECOMPUTED} if row["checkpointed"] else {}
    return {"config": config, "ranks": row["pp"], "replicas": row["replicas"], "tied": row["tied"], **more}


def reference_of(row):
    """The same training by stock DeepSpeed with all stages on one rank, which is what one row shares with others."""
    config = training.settings(row["micros"], row["replicas"])
    given = {"config": config, "ranks": 1, "replicas": row["replicas"], "tied": row["tied"], "blocks": 2 * row["pp"]}
    return "-".join(str(row[key]) for key in ("pp", "micros", "replicas", "tied")), given


def shared(ranks, rows):
    """Rank by rank what a row's training comes to, and what its reference does; rows of one size share a start."""
    runs = {}

    def run(world, cases):
        key = (world, *cases)
        if key not in runs:
            runs[key] = ranks.run(world, training.each, call=training.train, cases=cases)
        return runs[key]

    def of(row):
        world = row["pp"] * row["replicas"]
        ours = run(world, {name_of(r): case_of(r) for r in rows if r["pp"] * r["replicas"] == world})
        stock = run(row["replicas"], dict(reference_of(r) for r in rows if r["replicas"] == row["replicas"]))
        name, _ = reference_of(row)
        return [rank[name_of(row)] for rank in ours], [rank[name] for rank in stock]

    return of


@pytest.fixture(scope="module")
def trained(ranks):
    return shared(ranks, PAIRWISE)


def assert_same_training(ours, stock, tolerance=1e-5):
    assert len({tuple(rank["losses"]) for rank in ours}) == 1, "the loss is the same number on every rank"
    for key in ("losses", "norms"):
        assert ours[0][key] == pytest.approx(stock[0][key], rel=tolerance)
    assert ours[0]["lr"] == stock[0]["lr"]
    assert ours[0]["samples"] == stock[0]["samples"]
    assert ours[0]["eval_loss"] == pytest.approx(stock[0]["eval_loss"], rel=tolerance)
    expected = {name: value for rank in stock for name, value in rank["weights"].items()}
    assert {name for rank in ours for name in rank["weights"]} == expected.keys()
    for rank in ours:
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert_copies_identical(ours)


def assert_copies_identical(ours):
    for step in range(len(ours[0]["digests"])):
        seen = {}
        for rank in ours:
            for name, value in rank["digests"][step].items():
                assert seen.setdefault(name, value) == value, f"copies of {name} differ after step {step}"


@pytest.mark.parametrize("row", PAIRWISE, ids=name_of)
def test_trains_like_stock(trained, row):
    """Stock fp32 without ZeRO clips by the norm of stage 0 only, so the oracle is always stock under ZeRO-1."""
    ours, stock = trained(row)
    assert {rank["class"] for rank in ours} == {"DualPipeEngine"}
    assert {rank["class"] for rank in stock} == {"PipelineEngine"}
    assert_same_training(ours, stock)


@pytest.mark.all
@pytest.mark.parametrize("shape", dict.fromkeys(shape for _, shape in WHOLE))
def test_every_shape_trains_like_stock(ranks, shape):
    """Stock on as many ranks."""
    pp, micros = shape
    schedules = [None, *(schedule for schedule, of in WHOLE if of == shape)]
    cases = {
        schedule: {"config": training.settings(micros, schedule=schedule), "ranks": pp, "steps": 6}
        for schedule in schedules
    }
    found = ranks.run(pp, training.each, call=training.train, cases=cases)
    stock, *ours = ([rank[schedule] for rank in found] for schedule in schedules)
    for each in ours:
        assert_same_training(each, stock)


#: name -> micro-batches, what both are set to, and what else `training.train` is given.
ON_FOUR = {
    "plan file": (8, {}, {}),
    "no clipping": (8, {"zero": 0, "clip": 0.0}, {}),
    "bf16, ZeRO-1": (8, {"precision": "bf16"}, {}),
    "bf16, ZeRO-0": (11, {"precision": "bf16", "zero": 0}, {}),
    "untied": (8, {}, {"tied": False}),
}


@pytest.fixture(scope="module")
def on_four(ranks, tmp_path_factory):
    """Ours and stock's, both on four ranks."""
    from dualpipe_engine.schedule.search.make_plan import make_plan

    path = tmp_path_factory.mktemp("plan") / "plan.csv"
    path.write_text(make_plan("dualpipe", 4, 8).to_csv())
    cases = {}
    for name, (micros, both, more) in ON_FOUR.items():
        schedule = str(path) if name == "plan file" else "dualpipe"
        for who, taken in (("ours", schedule), ("stock", None)):
            cases[who, name] = {"config": training.settings(micros, schedule=taken, **both), "ranks": 4, **more}
    found = ranks.run(4, training.each, call=training.train, cases=cases)
    return lambda name: tuple([rank[who, name] for rank in found] for who in ("ours", "stock"))


def test_plan_file(on_four):
    assert_same_training(*on_four("plan file"))


def test_without_clipping_zero_0_equals_stock(on_four):
    ours, stock = on_four("no clipping")
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5)
    assert_copies_identical(ours)


@pytest.mark.parametrize("name", ["bf16, ZeRO-1", "bf16, ZeRO-0"])
def test_bf16_follows_stock(on_four, name):
    ours, stock = on_four(name)
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=0.03)
    norms = stock[0]["norms"]
    assert ours[0]["norms"] == pytest.approx(norms, rel=0.05, abs=0.01 * max(norms))
    assert_copies_identical(ours)


def test_predivided_gradients_are_the_same(ranks):
    cases = {
        (zero, factor): {
            "config": training.settings(3, 2, zero, schedule="dualpipe") | {"gradient_predivide_factor": factor},
            "ranks": 2,
            "replicas": 2,
        }
        for zero in (0, 1)
        for factor in (1.0, 3.0)
    }
    found = ranks.run(4, training.each, call=training.train, cases=cases)
    for zero in (0, 1):
        assert_same_training(*([rank[zero, factor] for rank in found] for factor in (3.0, 1.0)))


def test_zero_1_partitions_over_both_copies(on_four):
    ours, theirs = on_four("untied")
    total = sum(rank["optimizer_bytes"] for rank in theirs)
    assert sum(rank["optimizer_bytes"] for rank in ours) <= 1.01 * total
    largest = max(rank["optimizer_bytes"] for rank in theirs)
    assert max(rank["optimizer_bytes"] for rank in ours) <= 1.01 * largest


@pytest.mark.parametrize("pp", [2, 4])
def test_float64_gradients_equal_one_process(ranks, pp):
    gradients_are_those_of_one_process(ranks, pp, {2: (1,), 4: (3, 8)}[pp], ("dualpipe", "dualpipev", "zb1p"))


def gradients_are_those_of_one_process(ranks, pp, sizes, schedules):
    cases = {
        (schedule, micros): {"config": training.settings(micros, zero=0, schedule=schedule), "ranks": pp}
        for schedule in schedules
        for micros in sizes
    }
    everyone = ranks.run(pp, training.each, call=training.gradients, cases=cases)
    # All start with the same weights.
    start = {name: value for rank in everyone for name, value in rank[schedules[0], sizes[0]]["start"].items()}
    given = {micros: {"ranks": pp, "micros": micros, "start": start} for micros in sizes}
    [oracle] = ranks.run(1, training.each, call=training.sequential_gradients, cases=given)
    for schedule, micros in cases:
        found, expected = [rank[schedule, micros] for rank in everyone], oracle[micros]
        assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)  # the loss is reported in fp32
        copies = {}
        for rank in found:
            assert all(torch.equal(value, start[name]) for name, value in rank["start"].items())
            for name, grad in rank["grads"].items():
                copies.setdefault(name, []).append(grad)
        assert copies.keys() == expected["grads"].keys()
        for name, grads in copies.items():
            for grad in grads:
                torch.testing.assert_close(grad, expected["grads"][name], rtol=1e-10, atol=1e-12)


def test_every_rank_defers_its_matrices(ranks):
    config = training.settings(8, zero=0, schedule="dualpipe", optimize=False)  # with I and W on every rank
    found = ranks.run(4, training.gradients, config=config, ranks=4)
    assert all(rank["share"] > 0.6 for rank in found)
    assert all(math.isfinite(rank["loss"]) for rank in found)
