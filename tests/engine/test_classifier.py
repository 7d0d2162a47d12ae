"""What DeepSpeed's own tests ask of its pipeline engine, asked of it and of ours."""

from __future__ import annotations

import classifier_runs
import pytest

STEPS, LEARNS = 4, 40
TOPOLOGIES = {
    "1 x 4": (1, 4, (None, "1f1b", "dualpipev")),
    "2 x 2": (2, 2, (None, "dualpipe", "dualpipev")),
    "4 x 1": (4, 1, (None, "dualpipe", "zb1p")),
}


NAMES = [pytest.param("1 x 4", marks=pytest.mark.all), "2 x 2", "4 x 1"]


def mean(losses):
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def data_parallel(ranks):
    """DeepSpeed's own engine on four replicas of an undivided model, without activation checkpointing."""
    cases = {"only": (None, 1, 4, {"activation_checkpoint_interval": 0})}
    losses = ranks.run(4, classifier_runs.classify, cases=cases, steps=LEARNS)[0]["only"]
    assert mean(losses[-10:]) < 0.75 * mean(losses[:10]), "it learns"
    return losses[:STEPS]


@pytest.mark.parametrize("name", NAMES)
def test_learns_like_data_parallelism(ranks, data_parallel, name):
    """Checkpointing, reentrant or not, and the schedule change nothing in the training."""
    pp, dp, schedules = TOPOLOGIES[name]
    cases = {
        f"{schedule}, reentrant {reentrant}": (schedule, pp, dp, {"use_reentrant": reentrant})
        for schedule in schedules
        for reentrant in (True, False)
        if schedule is not None or reentrant
    }
    for rank in ranks.run(4, classifier_runs.classify, cases=cases, steps=STEPS):
        for case, losses in rank.items():
            assert losses == pytest.approx(data_parallel, rel=1e-4), case


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_different_shapes(ranks, name):
    pp, dp, schedules = TOPOLOGIES[name]
    found = ranks.run(4, classifier_runs.shapes, cases={schedule: (schedule, pp, dp) for schedule in schedules})
    seen = {}
    for rank in found:
        for schedule, (losses, layers) in rank.items():
            assert losses == pytest.approx(found[0][None][0], rel=1e-4), schedule
            for layer, shapes in layers.items():  # one micro-batch takes one direction only: a twin may see nothing
                seen.setdefault((schedule, layer), set()).update(shapes)
    assert len(seen) == 8 * len(schedules)
    assert all(len({length for _, length, _ in shapes}) == 4 for shapes in seen.values())


def test_gradients_are_scaled_once_and_hooks_run(ranks):
    found = ranks.run(2, classifier_runs.plain_descent, schedules=[None, "dualpipe", "zb1p", "dualpipev"])
    for rank in found:
        for schedule, (factors, forwards) in rank.items():
            assert factors == pytest.approx([0.8] * len(factors)), schedule
            assert len(factors) == (2 if schedule in ("dualpipe", "dualpipev") else 1)
            assert forwards == (4 if schedule == "dualpipev" else 2), "hooks on the module run for each stage"


def test_loaders_that_the_engine_makes(ranks):
    """Both ends of a pipeline read the same samples, each replica its own."""
    found = ranks.run(4, classifier_runs.evaluate, schedules=[None, "dualpipe", "dualpipev"], ranks=2, replicas=2)
    for rank in found:
        assert list(rank.values()) == pytest.approx([found[0][None]] * 3, rel=1e-5)
