"""Multi-token prediction by replicas that share sequences, against the report's equations on whole ones."""

from __future__ import annotations

import pytest
import sequence_runs as runs
import test_moe
import test_mtp
import torch

from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER

LATENT = {"heads": 4, "q_rank": 6, "mtp_depth": 2, "sequence_loss": 0.5}
GROUPED = {"attention": "grouped", "heads": 4, "kv_heads": 1, "mtp_depth": 1, "balancing": "loss", "loss_weight": 0.5}
CASES = [
    {"model": LATENT, "schedule": "dualpipe", "size": 2},
    {"model": GROUPED, "schedule": "zb1p", "size": 2, "pipeline": {"tiled_loss": 2}},
]
LONG = [
    {"model": LATENT | {"blocks": 3}, "schedule": "dualpipev", "size": 2, "pipeline": {"overlap": False}},
    {"model": LATENT | {"blocks": 3}, "schedule": "zbv", "size": 2},
    {"model": LATENT, "schedule": "dualpipe", "size": 2, "pipeline": {"recompute": True}},
]


def check(found, case):
    start = {name: copies[0] for name, copies in test_moe.assemble(found, "start").items()}
    start.pop(PLACEHOLDER, None)
    reference = test_mtp.Reference(case["model"]).double()
    missing, unexpected = reference.load_state_dict({test_mtp.own(name): each for name, each in start.items()}, False)
    assert not unexpected and all("router.bias" in name for name in missing)
    readers = case.get("replicas", 2) // case["size"]
    total = 0.0
    for reader in range(readers):
        data = runs.stream(reader)
        for _ in range(runs.MICROS):
            each = reference(*next(data)) / (runs.MICROS * readers)
            each.backward()
            total += float(each.detach())
    grads = {name: param.grad for name, param in reference.named_parameters()}
    seen = test_moe.assemble(found, "grads")
    seen.pop(PLACEHOLDER, None)
    assert {test_mtp.own(name) for name in seen} == set(grads)
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6)
    for name, copies in seen.items():
        for copy in copies:
            torch.testing.assert_close(copy, grads[test_mtp.own(name)], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("cases", [CASES, pytest.param(LONG, marks=pytest.mark.all)], ids=["some", "others"])
def test_later_tokens_are_those_of_whole_sequences(ranks, cases):
    found = ranks.run(4, runs.gradients, cases=cases)
    for number, case in enumerate(cases):
        check([rank[number] for rank in found], case)


@pytest.mark.all
def test_tokens_ahead_beyond_the_next_part(ranks):
    """Parts of two tokens, and three predictions ahead; two groups of two replicas."""
    cases = [
        {"model": LATENT | {"mtp_depth": 3}, "schedule": "dualpipe", "size": 4, "replicas": 4},
        {"model": LATENT, "schedule": "zb1p", "size": 2, "replicas": 4},
    ]
    found = ranks.run(8, runs.gradients, cases=cases, timeout=300)
    for number, case in enumerate(cases):
        check([rank[number] for rank in found], case)
