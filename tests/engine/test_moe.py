"""Expert parallelism in the engine against one process that holds all experts."""

from __future__ import annotations

import checkpoint_runs
import moe_runs
import pytest
import torch
import training
from torch import nn

from dualpipe_engine.models.routing import Router, rebalance
from dualpipe_engine.models.transformer import layers, loss

SKEWED = [0.5, 0.1, 0.0, -9.0]  # the last expert gets no token with top_k up to 3
CASES = {
    "top 1": ({"top_k": 1}, "dualpipe", None, False),
    "top 1, an expert without tokens": ({"top_k": 1}, "dualpipe", SKEWED, False),
    "top 4 of 4": ({"top_k": 4}, "dualpipe", None, False),
    "top 4, skewed": ({"top_k": 4, "experts": 8}, "dualpipe", [*SKEWED, *SKEWED], False),
    "auxiliary loss": ({"balancing": "loss", "loss_weight": 0.5, "attention": "grouped"}, "dualpipe", None, False),
    "recomputed": ({"balancing": "loss", "loss_weight": 0.5}, "dualpipe", None, True),
    "dualpipev": ({"dense_blocks": 1}, "dualpipev", SKEWED, False),
}


#: What the short run leaves to `--all`: another test, or the union of two others, has it.
LONG = ("top 1", "top 4 of 4", "auxiliary loss")


def assemble(found, key):
    """name -> tensors of all copies; experts put together from the shares of replicas 0 and 1."""
    copies = {}
    for rank in found:
        for name, tensor in rank[key].items():
            copies.setdefault(name, {}).setdefault(rank["replica"] % 2, []).append(tensor)
    result = {}
    for name, shares in copies.items():
        if ".experts." in name:
            result[name] = [torch.cat(pair) for pair in zip(shares[0], shares[1], strict=True)]
        else:
            result[name] = [tensor for each in shares.values() for tensor in each]
    return result


def oracle(model, bias, start, replicas, micros):
    """One process, all layers and experts, micro-batches one after another."""
    module = nn.Sequential(
        *[spec.build() for spec in layers(moe_runs.config(**model | {"expert_parallel": 1}))]
    ).double()
    module.load_state_dict(start, strict=False)
    moe_runs.set_routing(module, bias)
    total = 0.0
    for replica in range(replicas):
        data = training.stream(replica)
        for _ in range(micros):
            inputs, labels = next(data)
            each = loss(module(inputs), labels) / (micros * replicas)
            each.backward()
            total += float(each.detach())
    rebalance(module, None)
    return module, total


def check(found, case, replicas=2, micros=4):
    model, _, bias, _ = case
    start = {name: copies[0] for name, copies in assemble(found, "start").items()}
    module, total = oracle(model, bias, start, replicas, micros)
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6)  # the loss is reported in fp32
    grads = assemble(found, "grads")
    expected = dict(module.named_parameters())
    assert grads.keys() == expected.keys()
    for name, copies in grads.items():
        for grad in copies:
            torch.testing.assert_close(grad, expected[name].grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)
    routers = {name: part for name, part in module.named_modules() if isinstance(part, Router)}
    for rank in found:
        for name, load in rank["load"].items():
            torch.testing.assert_close(load, routers[name].load)
            torch.testing.assert_close(rank["bias"][name], routers[name].bias)
    return grads, routers


@pytest.mark.parametrize(
    "names",
    [tuple(name for name in CASES if name not in LONG), pytest.param(LONG, marks=pytest.mark.all)],
    ids=["short", "rest"],
)
def test_gradients_of_expert_parallelism_equal_one_process(ranks, names):
    cases = {name: CASES[name] for name in names}
    found = ranks.run(4, moe_runs.gradients, cases=list(cases.values()), ranks=2)
    for index, (name, case) in enumerate(cases.items()):
        each = [rank[index] for rank in found]
        grads, routers = check(each, case)
        assert all({"combine", "dispatch"} <= set(rank["transfers"]) for rank in each), name
        assert any(rank["pairs"] for rank in each), name
        if case[2] is not None and case[0].get("top_k") != 4:
            idle = [copy[3] for key, copies in grads.items() if ".experts." in key for copy in copies]
            assert idle and all(not grad.any() for grad in idle), name
            assert all(router.load[3] == 0 for router in routers.values()), name


def test_experts_are_shared_within_one_pipeline_position(ranks):
    case = CASES["top 1"]
    check([rank[0] for rank in ranks.run(8, moe_runs.gradients, cases=[case], ranks=4)], case)


def train_alone(model, start, learning_rate, replicas=2, micros=4, steps=4):
    """One process with torch's Adam, clipped by the norm of all gradients; the losses, and the norm of step 2."""
    module = nn.Sequential(*[spec.build() for spec in layers(moe_runs.config(**model | {"expert_parallel": 1}))])
    module.load_state_dict(start, strict=False)
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    streams = [training.stream(replica) for replica in range(replicas)]
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for data in streams:
            for _ in range(micros):
                inputs, labels = next(data)
                each = loss(module(inputs), labels) / (micros * replicas)
                each.backward()
                total += float(each.detach())
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        optimizer.step()
        rebalance(module, None)
        losses.append(total)
    return losses, norms[1]


@pytest.mark.parametrize("zero", [0, 1])
def test_training_and_checkpoints_with_experts(ranks, tmp_path, zero):
    settings = training.settings(4, 2, zero=zero, schedule="dualpipe", clip=0.5)
    del settings["scheduler"]
    settings["optimizer"] = {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False, "torch_adam": True}}
    model = {"bias_rate": 0.05}
    found = ranks.run(4, moe_runs.train, model=model, settings=settings, ranks=2, folder=str(tmp_path))
    start = {name: copies[0] for name, copies in assemble(found, "start").items()}
    losses, norm = train_alone(model, start, 0.01)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses[: len(rank["losses"])], rel=1e-4)
        assert rank["norm"] == pytest.approx(norm, rel=1e-4)
    assert all(rank["same"] for rank in found)
    for rank in found:
        assert rank["resumed"] == rank["losses"][2:]
    file = torch.load(next(tmp_path.glob("*/layer_01-model_states.pt")), weights_only=False)
    assert len(file["experts.up"]) == 4, "a layer's file holds the experts of all ranks"
    if zero == 0:
        return
    # Two fp32 moments of every weight, in one place only; partitions are padded.
    elements = sum(value.numel() for value in start.values())
    assert sum(rank["optimizer_bytes"] for rank in found) == pytest.approx(8 * elements, rel=0.05)
    with pytest.raises(Exception, match="share the experts"):  # DeepSpeed's converter would take one rank's for all
        checkpoint_runs.convert(tmp_path / "global_step2", tmp_path / "universal")


@pytest.mark.all
def test_auto_measures_experts_that_ranks_share(ranks, tmp_path):
    path = tmp_path / "costs.json"
    found = ranks.run(4, moe_runs.measured, path=path, ranks=2)
    assert len(found[0]["seconds"]) == 6 and all(min(rank["seconds"]) > 0 for rank in found)
    fixed = ranks.run(4, moe_runs.measured, path=path, ranks=2, schedule=found[0]["schedule"])
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in fixed], "measuring left something behind"


def test_experts_of_another_replica_are_refused_on_every_rank(ranks):
    ranks.run(4, moe_runs.misplaced, ranks=2)


def test_deepspeeds_own_engine_refuses_shared_experts(ranks):
    ranks.run(4, moe_runs.stock, ranks=2)
