"""The doctor on synthetic profiles: each fault gets its advice, a healthy job gets none."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from simulated_profile import HEALTHY, profile

from dualpipe_engine.profiling.breakdown import (
    COMMUNICATION,
    DATA_TIME,
    OPTIMIZER,
    OTHER,
    REDUCING,
)
from dualpipe_engine.profiling.doctor import diagnose
from dualpipe_engine.profiling.report import print_findings
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate


def found(case):
    findings = diagnose(case)
    assert [each.cost for each in findings] == sorted((each.cost for each in findings), reverse=True)
    return {each.name: each for each in findings}


def test_a_healthy_job_is_left_alone():
    case = profile()
    assert found(case) == {}
    console = Console(file=io.StringIO(), width=120)
    print_findings(case, [], console)
    assert "Nothing stands out" in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "advice", "change"),
    [
        ("exposed communication", "bf16 activations", {"rank0": {COMMUNICATION: 0.2}}),
        ("reduction not hidden", "communication_data_type", {"rank0": {REDUCING: 0.2}}),
        ("reduction not hidden", "ZeRO stage 1", {"rank0": {REDUCING: 0.2}, "zero_stage": 2}),
        ("optimizer", "fused", {"rank0": {OPTIMIZER: 0.3}}),
        ("optimizer", "ZeRO stage 1: 2 ranks", {"rank0": {OPTIMIZER: 0.3}, "zero_stage": 0}),
        ("data", "workers", {"rank0": {DATA_TIME: 0.1}}),
        ("small ops", "larger micro-batches", {"rank0": {OTHER: 0.3}}),
        ("unsteady steps", "checkpoints", {"steps": [1.2, 1.2, 1.2, 1.2, 3.0]}),
        ("slow rank", "bind_cores_to_rank", {"slow": 1.5}),
    ],
)
def test_each_fault_alone_is_named_with_its_remedy(name, advice, change):
    case = profile(**change)
    findings = found(case)
    assert set(findings) == {name}
    assert advice in findings[name].advice
    assert 0 < findings[name].cost < case.step


def test_pairs_that_do_not_overlap_lead_to_dualpipev():
    case = profile(costs=replace(HEALTHY, fb=0.03))
    findings = found(case)
    assert '"dualpipev"' in findings["overlap not effective"].advice
    assert "100%" in findings["overlap not effective"].fact
    assert "another schedule is faster" not in findings
    console = Console(file=io.StringIO(), width=200)
    print_findings(case, [replace(findings["overlap not effective"], gain=-0.001)], console)
    assert "expected gain: memory, for 1.0 ms a step" in console.file.getvalue()


def test_a_few_micro_batches_are_too_few():
    case = profile(micros=2)
    finding = found(case)["few micro-batches"]
    assert '"gradient_accumulation_steps": 4' in finding.advice
    more = make_plan("dualpipe", 4, 4, HEALTHY, optimize=True)
    assert finding.gain == pytest.approx(case.step - simulate(more, HEALTHY).makespan / 2)
    assert finding.cost == pytest.approx(max(rank.bubble for rank in case.ranks))


def test_uneven_stages_lead_to_pairs():
    uneven = CostModel((0.01, 0.01, 0.01, 0.03), (0.01, 0.01, 0.01, 0.03), (0.01, 0.01, 0.01, 0.03))
    case = profile("1f1b", costs=uneven)
    finding = found(case)["unbalanced stages"]
    assert '"partition_method": "pairs"' in finding.advice
    assert "rank 3" in finding.fact
    assert "2.00x" in finding.fact
    even = CostModel(0.015, 0.015, 0.015)
    assert finding.gain == pytest.approx(case.step - simulate(case.plan, even).makespan)
    assert "unbalanced stages" not in found(profile("1f1b", costs=uneven, partition_method="pairs"))


def test_a_slower_schedule_is_named():
    case = profile("1f1b", micros=12, costs=CostModel(0.01, 0.01, 0.01))
    finding = found(case)["another schedule is faster"]
    assert '"schedule": "' in finding.advice
    assert "1x parameters" in finding.fact  # without overlap a second copy wins too little
    assert finding.gain > 0.05 * case.step


def test_weights_that_are_not_split_off():
    heavy = CostModel(0.01, 0.018, 0.002)
    findings = found(profile("zbv", micros=8, costs=heavy, weight_split=0.1))
    assert "10%" in findings["weight gradients not split off"].fact
    assert "weight gradients not split off" not in found(profile("zbv", micros=8, costs=heavy, weight_split=0.9))


@pytest.mark.parametrize(
    ("device", "value", "named"), [("cuda", "1", True), ("cuda", None, False), ("cpu", "1", False)]
)
def test_few_hardware_queues_matter_on_cuda(device, value, named):
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": value}
    findings = found(profile(rank0={COMMUNICATION: 0.2}, device=device, environment=environment))
    assert ("few hardware queues" in findings) is named
    assert "exposed communication" in findings


def test_the_report_gives_numbers_and_gain():
    case = profile(rank0={DATA_TIME: 0.1})
    console = Console(file=io.StringIO(), width=120)
    print_findings(case, diagnose(case), console)
    text = console.file.getvalue()
    assert "1. data: rank 0 reads inputs and labels for 100.0 ms" in text
    assert "expected gain: 100.0 ms a step" in text
