""" "offload_activations": the same training to the last bit, with activations in host memory meanwhile."""

from __future__ import annotations

import time

import offload_runs
import pytest
from ranks import RankError

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.engine.plan import make_lowered_plan
from dualpipe_engine.engine.section import DualPipeConfig
from dualpipe_engine.errors import ConfigError, PlanError
from dualpipe_engine.schedule.orders.registry import KNOWN, SCHEDULES
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.offload import offload
from dualpipe_engine.schedule.search.make_plan import make_plan

AGAIN = {"recompute": True}
APART = {"overlap": False}
#: schedule, ZeRO stage, more of the "pipeline" section, and what is computed again beside
SHORT = [
    ("dualpipev", 1, {}, [AGAIN]),
    ("zb1p", 2, APART, [{}]),
    ("zbv", 0, APART, [{"recompute": ["norm", "activation"]}]),
]
ALL = {
    name: (4, [(name, zero, more, [{}, AGAIN]) for zero in (0, 1, 2) for more in ({}, APART)], 1) for name in SCHEDULES
}


def check(found, plain, moved):
    for rank in found:
        assert rank[moved]["losses"] == rank[plain]["losses"], moved
        assert rank[moved]["weights"] == rank[plain]["weights"], moved
        assert not rank[plain]["copies"]
        assert not rank[moved]["left"], moved
        assert (rank[moved]["copies"] > 0) == (rank[moved]["out"] > 0), moved
        assert rank[moved]["back"] == rank[moved]["out"], moved
    assert any(rank[moved]["copies"] for rank in found), moved


@pytest.mark.parametrize(
    ("size", "cases", "wanted"),
    [
        pytest.param(2, SHORT, True, id="some"),
        *(pytest.param(*case, id=name, marks=pytest.mark.all) for name, case in ALL.items()),
    ],
)
def test_trains_to_the_same_bits(ranks, size, cases, wanted):
    """With phases and without, W apart where the schedule has it so, beside what is computed again and alone.
    What is computed again alone: test_recompute."""
    runs, pairs = {}, []
    for schedule, zero, more, beside in cases:
        plain = f"{schedule}, ZeRO-{zero}, {more}"
        runs[plain] = {"schedule": schedule, "zero": zero, **more}
        for each in beside:
            runs[f"{plain}, {each}"] = runs[plain] | each | {"offload_activations": wanted}
            pairs.append((plain, f"{plain}, {each}"))
    steps, micros = (1, 4) if size == 2 else (2, 8)
    found = ranks.run(size, offload_runs.train, cases=runs, ranks=size, steps=steps, micros=micros)
    for pair in pairs:
        check(found, *pair)
    for rank in found:
        assert all(run["split"] == KNOWN[runs[name]["schedule"]].splits for name, run in rank.items())


@pytest.mark.all
@pytest.mark.parametrize(
    ("more", "precision"),
    [
        ({"model": {"expert_parallel": 2, "mtp_depth": 1, "balancing": "loss"}}, "fp32"),
        ({"model": {"attention": "grouped", "q_rank": None}}, "bf16"),
        ({"activation_checkpoint_interval": 1}, "fp32"),
        ({"split_backward": False}, "bf16"),
    ],
)
def test_other_models_train_to_the_same_bits(ranks, more, precision):
    runs = {
        f"offload {wanted}": {
            "schedule": "dualpipev",
            "zero": 1,
            "precision": precision,
            "offload_activations": wanted,
            **more,
        }
        for wanted in (False, True)
    }
    found = ranks.run(4, offload_runs.train, cases=runs, ranks=2, replicas=2)
    check(found, *runs)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.all), False])
def test_inputs_that_checkpointing_keeps_are_refused(ranks, reentrant):
    case = {"schedule": "dualpipev", "zero": 1, "activation_checkpoint_interval": 1, "use_reentrant": reentrant}
    with pytest.raises(RankError, match='"offload_activations" moves nothing of layers under'):
        ranks.run(2, offload_runs.train, cases={"": case | {"overlap": False, "offload_activations": True}}, ranks=2)


def test_what_one_rank_refuses_all_refuse_by_its_sentence(ranks):
    """Layers of the first rank alone are run without phases."""
    layers = {"dense_blocks": 4, "blocks": 6}
    case = {"schedule": "zb1p", "zero": 0, "activation_checkpoint_interval": 1, "use_reentrant": False}
    found = ranks.run(2, offload_runs.refused, model=layers, ranks=2, offload_activations=True, **case)
    assert found[0] == found[1]
    assert found[0][0] == "ConfigError" and found[0][1].startswith('"offload_activations" moves nothing of layers')


def test_more_than_any_rank_can_spare_is_refused(ranks):
    """A later change of the batch takes what can be."""
    found = ranks.run(2, offload_runs.refused, ranks=2, zero=0, schedule="1f1b", offload_activations=9)
    assert found[0] == found[1]
    assert found[0][0] == "PlanError" and "offload_activations = 9: on no rank of 1f1b" in found[0][1]
    config = DualPipeConfig(schedule="1f1b", offload_activations=9)
    assert make_lowered_plan(config, 4, 8).unlowered() == offload(make_plan("1f1b", 4, 8), 1)


def test_a_late_copy_is_exposed_in_the_profile(ranks, tmp_path):
    plain, late = (
        ranks.run(2, offload_runs.small, offload_activations=wanted, late_s=late, folder=str(tmp_path))
        for wanted, late in ((False, 0.0), (True, 0.2))
    )
    assert [run["losses"] for run in late] == [run["losses"] for run in plain]
    copies, exposed = late[0]["copies"], late[0]["exposed"]
    assert copies > 0 and late[0]["waited"] > 0.1 * copies
    assert exposed["communication"] > 0.1 * copies
    assert any("reload" in name for name in late[0]["names"]) and "0OFFLOAD1" in late[0]["names"]
    assert not any("reload" in name for name in plain[0]["names"])


def test_a_copy_that_never_ends_is_a_sentence_within_the_timeout(ranks):
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(2, offload_runs.small, offload_activations=True, late_s=1000.0, p2p_timeout_s=3, timeout=100)
    assert time.monotonic() - started < 60
    errors = [message for _, message, _ in caught.value.errors.values()]
    assert len(errors) == 2 and all("has not come back from host memory within 1.5 s" in each for each in errors), (
        errors
    )
    assert any("op 0I1: what stage 0 keeps of micro-batch 1" in each for each in errors), errors


@pytest.mark.parametrize(
    ("wanted", "said"), [(0, "greater than or equal to 1"), ("all", "offload_activations"), (1.5, "offload")]
)
def test_values_that_have_no_meaning(wanted, said):
    with pytest.raises(ConfigError, match=said):
        read_config({"pipeline": {"schedule": "dualpipe", "offload_activations": wanted}})


def test_stock_does_not_offload():
    with pytest.raises(ConfigError, match=r'"offload_activations" .* does nothing under'):
        read_config({"pipeline": {"offload_activations": True}})


def test_a_plan_file_says_itself_what_leaves(tmp_path):
    plan = offload(make_plan("1f1b", 4, 8), 1)
    path = tmp_path / "plan.csv"
    path.write_text(lower(plan).to_csv())
    config = DualPipeConfig(schedule=str(path))
    assert make_lowered_plan(config, 4, 8) == lower(plan)
    with pytest.raises(PlanError, match="leave the number out"):
        make_lowered_plan(config.model_copy(update={"offload_activations": 1}), 4, 8)
