""" "recompute": the same training to the last bit, and sentences for names that cannot be."""

from __future__ import annotations

import pytest
import recompute_runs
import torch
import training
from ranks import RankError
from torch import nn

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.orders.registry import SCHEDULES

#: schedule, ZeRO stage, and more of the "pipeline" section
SHORT = [("dualpipe", 1, {}), ("zb1p", 2, {"overlap": False}), ("zbv", 0, {})]
ALL = [
    (schedule, zero, {} if overlap else {"overlap": False})
    for schedule in SCHEDULES
    for zero in (0, 1, 2)
    for overlap in (True, False)
]


def check(found, pairs):
    for rank in found:
        for plain, again in pairs:
            assert rank[again]["losses"] == rank[plain]["losses"], again
            assert rank[again]["weights"] == rank[plain]["weights"], again
            assert rank[again]["transfers"] == rank[plain]["transfers"], again
            assert rank[again]["recomputed"] and not rank[plain]["recomputed"], again


@pytest.mark.parametrize("cases", [SHORT, pytest.param(ALL, marks=pytest.mark.all)], ids=["some", "all"])
def test_trains_to_the_same_bits(ranks, cases):
    runs, pairs = {}, []
    for number, (schedule, zero, more) in enumerate(cases):
        name = f"{schedule}, ZeRO-{zero}, {more}"
        for wanted in (False, (True, recompute_runs.NAMES)[number % 2]):
            runs[f"{name}, {wanted}"] = {"schedule": schedule, "zero": zero, "recompute": wanted, **more}
        pairs.append(tuple(list(runs)[-2:]))
    found = ranks.run(2, recompute_runs.train, cases=runs, ranks=2, timeout=600)
    check(found, pairs)
    assert all(any(run["split"] for run in rank.values()) for rank in found)


@pytest.mark.parametrize(
    ("more", "precision"),
    [
        pytest.param(
            {"model": {"expert_parallel": 2, "mtp_depth": 1, "balancing": "loss"}}, "fp32", marks=pytest.mark.all
        ),
        pytest.param({"model": {"attention": "grouped", "q_rank": None}}, "bf16", marks=pytest.mark.all),
        pytest.param({"activation_checkpoint_interval": 1, "use_reentrant": False}, "fp32", marks=pytest.mark.all),
        pytest.param(
            {"activation_checkpoint_interval": 1, "use_reentrant": False, "overlap": False},
            "fp32",
            marks=pytest.mark.all,
        ),
        pytest.param({"split_backward": False}, "fp32", marks=pytest.mark.all),
    ],
)
def test_other_models_train_to_the_same_bits(ranks, more, precision):
    runs = {
        f"recompute {wanted}": {"schedule": "dualpipe", "zero": 1, "precision": precision, "recompute": wanted, **more}
        for wanted in (False, True)
    }
    check(ranks.run(4, recompute_runs.train, cases=runs, ranks=2, replicas=2), [tuple(runs)])


def test_random_numbers_are_drawn_once(ranks):
    plain, again = (ranks.run(2, recompute_runs.small, recompute=wanted) for wanted in (False, ["drop"]))
    for (losses, weights), (losses_again, weights_again) in zip(plain, again, strict=True):
        assert losses == losses_again
        assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("wanted", "more", "said"),
    [
        (["norn"], {}, "no module of any layer has a name with 'norn' in it: did you mean"),
        (True, {}, "none does: give names"),
        pytest.param(  # which torch's dispatcher tells, but not of groups that are Python's
            ["sum"], {}, "0.sum communicates, which is not to be repeated", marks=pytest.mark.gloo
        ),
    ],
)
def test_names_that_cannot_be(ranks, wanted, more, said):
    with pytest.raises(RankError) as caught:
        ranks.run(2, recompute_runs.small, recompute=wanted, **more)
    assert any(said in error[1] for error in caught.value.errors.values()), caught.value.errors


def test_layers_with_phases_are_not_named_whole(ranks):
    case = {"schedule": "dualpipe", "zero": 0, "recompute": ["MoEBlock"]}
    with pytest.raises(RankError, match="has transfers that are not to be repeated"):
        ranks.run(2, recompute_runs.train, cases={"whole": case}, ranks=2)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(["("], "no regular expression"), ([".*"], "matches anything"), (3, "recompute"), ("norm", "recompute")],
)
def test_values_that_have_no_meaning(wanted, said):
    with pytest.raises(ConfigError, match=said):
        read_config({"pipeline": {"schedule": "dualpipe", "recompute": wanted}})


def test_statistics_are_not_seen_twice(ranks):
    with pytest.raises(RankError, match=r'would see each twice.*leave out its name in "recompute"'):
        ranks.run(2, recompute_runs.small, schedule="zb1p", layers=Normed, recompute=["norm"])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(training.WIDTH)
        self.out = nn.Linear(training.WIDTH, training.WIDTH)

    def forward(self, x):
        return self.out(self.norm(x))


@pytest.mark.all
def test_auto_measures_what_is_left(ranks, tmp_path):
    for plain, again in ranks.run(2, recompute_runs.measure, folder=str(tmp_path), timeout=300):
        assert all(0.3 * held < less < 0.9 * held for held, less in zip(plain, again, strict=True))


@pytest.mark.all
def test_auto_computes_again_where_memory_is_short(ranks, tmp_path):
    for measured, schedule, again, plain in ranks.run(2, recompute_runs.chosen, folder=str(tmp_path), timeout=300):
        for held, less in zip(measured.costs.activation_bytes, measured.recomputed.activation_bytes, strict=True):
            assert 0.3 * held < less < 0.9 * held
        for name in ("f", "i", "w"):
            assert all(map(float.__ge__, getattr(measured.recomputed, name), getattr(measured.costs, name)))
        assert again[0] == plain[0] == schedule
        assert again[1] and not plain[1]
        assert again[2] == plain[2]
