"""Awkward models: float64 gradients equal those of one process, whatever is tied, frozen or recomputed."""

from __future__ import annotations

import pytest
import topology_runs

CHECKPOINTS = {
    f"{'reentrant' if reentrant else 'not reentrant'}, interval {interval}": {
        "activation_checkpoint_interval": interval,
        "reentrant": reentrant,
        # A reentrant checkpoint gives a layer without floating-point inputs no gradient, in DeepSpeed too.
        "checkpointable_layers": ["Block"] if reentrant else None,
    }
    for interval in (1, 2, 100)
    for reentrant in (True, False)
}
COMPILED = "compiled by the engine"
OTHERS = {
    "micro-batches of different length": {"lengths": (3, 6, 4, 5, 2), "micros": 5},
    "compiled before initialize": {"compiled": "before"},
    "compiled after initialize": {"compiled": "after"},
    COMPILED: {"compiled": "by the engine"},
    "compiled, with functions as layers": {"compiled": "after", "layers": "a stage without parameters"},
}
CASES = {
    "layers": {name: {"layers": name} for name in topology_runs.LAYERS},
    "frozen": {name: {"freeze": name} for name in topology_runs.FREEZE},
    "checkpoints": CHECKPOINTS,
    "others": OTHERS,
}
#: What the short run has of each kind.
SHORT = {
    "layers": ("tied to the twin", "tied twice", "a rank without parameters"),
    "frozen": ("vectors frozen", "first stage frozen", "a rank frozen"),
    "checkpoints": ("reentrant, interval 1", "not reentrant, interval 2", "reentrant, interval 100"),
    "others": ("micro-batches of different length",),
}
PARTS = [(kind, SHORT[kind]) for kind in CASES]
REST = [
    (kind, tuple(name for name in CASES[kind] if name not in SHORT[kind]))
    for kind in CASES
    if len(SHORT[kind]) < len(CASES[kind])
]


def check(found):
    """`found`: for each rank, case -> what `topology_runs.gradients` returns."""
    for rank in found:
        for name, (loss, gradient, missing) in rank.items():
            assert loss < 1e-6, name  # the loss is reported in fp32
            assert gradient < 1e-10, name
            assert not missing, name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        *(pytest.param(*part, id=part[0]) for part in PARTS),
        *(pytest.param(*part, id=f"{part[0]}, the rest", marks=pytest.mark.all) for part in REST),
    ],
)
def test_dualpipe(ranks, kind, names):
    cases = {name: {"schedule": "dualpipe", "ranks": 4, **CASES[kind][name]} for name in names}
    check(ranks.run(4, topology_runs.many, cases=cases))


@pytest.mark.all
def test_compiled_by_the_engine(ranks):
    check(ranks.run(2, topology_runs.many, cases={"": {"schedule": "dualpipe", "ranks": 2, **OTHERS[COMPILED]}}))


def test_other_placements(ranks):
    chosen = {
        "1f1b": (
            *(CASES["layers"][name] for name in ("tied twice", "a rank without parameters")),
            CASES["frozen"]["a rank frozen"],
            CHECKPOINTS["reentrant, interval 2"],
        ),
        "dualpipev": (
            *(CASES["layers"][name] for name in ("tied twice", "tied to a neighbour")),
            CASES["frozen"]["first stage frozen"],
            CHECKPOINTS["not reentrant, interval 100"],
            OTHERS["micro-batches of different length"],
        ),
    }
    cases = {
        f"{schedule} {case}": {"schedule": schedule, "ranks": 4, **case}
        for schedule, some in chosen.items()
        for case in some
    }
    check(ranks.run(4, topology_runs.many, cases=cases))


def test_replicas(ranks):
    cases = {
        f"{schedule} {layers}": {"schedule": schedule, "ranks": 2, "replicas": 2, "layers": layers}
        for schedule, layers in (
            ("dualpipe", "tied twice"),
            ("dualpipe", "a stage without parameters"),
            ("1f1b", "tied twice"),
            ("dualpipev", "a stage without parameters"),
        )
    }
    check(ranks.run(4, topology_runs.many, cases=cases))


def test_changed_batch_size(ranks):
    """The plan of another number of micro-batches may finish stages in another order; here they share a weight."""
    cases = {
        f"{first} to {micros}": {"ranks": 2, "layers": "tied to the end", "first": first, "micros": micros}
        for first, micros in ((2, 3), (3, 2), (1, 2), (2, 1), (1, 4))
    }
    check(ranks.run(2, topology_runs.many, cases={k: {"schedule": "dualpipe", **case} for k, case in cases.items()}))


@pytest.mark.parametrize(
    "some",
    [
        {"ties": ("tied twice", None), "frozen rank": ("plain", "a rank frozen")},
        pytest.param(
            {"no parameters": ("a rank without parameters", None), "frozen vectors": ("plain", "vectors frozen")},
            marks=pytest.mark.all,
        ),
    ],
    ids=lambda some: ", ".join(some),
)
def test_zero_with_ties_and_frozen_parts(ranks, some):
    """Two fp32 steps under ZeRO are those under ZeRO-0, whose gradients the other tests compare."""
    cases = {name: {"layers": layers, "freeze": freeze} for name, (layers, freeze) in some.items()}
    for rank in ranks.run(4, topology_runs.under_zero, cases=cases):
        for name, (whole, *partitioned) in rank.items():
            for losses in partitioned:
                assert losses == pytest.approx(whole, rel=1e-5), name
            assert whole[0] > whole[-1], name
