"""Multi-token prediction under the schedules against the equations of the DeepSeek-V3 report in one process."""

from __future__ import annotations

from dataclasses import replace

import moe_runs
import mtp_runs
import pytest
import torch
import training
from safetensors.torch import load_file
from test_moe import assemble
from torch import nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.cli import main
from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER
from dualpipe_engine.models.block import MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.mtp import MTPBlock
from dualpipe_engine.models.positions import Yarn
from dualpipe_engine.models.routing import rebalance
from dualpipe_engine.models.transformer import FinalNorm, Head, TokenEmbedding, layers

WEIGHT, IGNORED = 0.3, -100
GROUPED = {"experts": 8, "groups": 4, "kept_groups": 2, "sequence_loss": 0.3}
CASES = {
    "dualpipe": {"model": {"mtp_depth": 1} | GROUPED, "schedule": "dualpipe"},
    "dualpipev": {"model": {"mtp_depth": 1, "blocks": 3}, "schedule": "dualpipev"},
    "zb1p": {"model": {"mtp_depth": 1, "dense_blocks": 1}, "schedule": "zb1p"},
}
LONG = {
    "every expert on every rank": {"model": {"mtp_depth": 2, "expert_parallel": 1}, "schedule": "dualpipe"},
    "recomputed": {"model": {"mtp_depth": 2} | GROUPED, "schedule": "dualpipe", "recompute": True},
    "no phases": {"model": {"mtp_depth": 2}, "schedule": "dualpipe", "overlap": False},
    "softmax gate": {"model": {"mtp_depth": 1, "balancing": "loss", "loss_weight": 0.5}, "schedule": "dualpipe"},
    "zbv": {"model": {"mtp_depth": 1, "blocks": 3}, "schedule": "zbv"},
    "1f1b": {"model": {"mtp_depth": 1}, "schedule": "1f1b"},
    "zb1p, no phases": {"model": {"mtp_depth": 1} | GROUPED, "schedule": "zb1p", "overlap": False},
}
#: What a configuration of transformers does not say, or says in one way only.
OWN = {"expert_parallel": 1, "sequence_loss": 0.0, "norm_eps": None, "init_std": None}
FURTHER = {"mtp_depth": 3, "expert_parallel": 1, "sequence_loss": 0.2}
SPREAD = {  # without a shared rank later tokens are predicted on several stages
    "dualpipe": {"model": FURTHER, "schedule": "dualpipe", "method": "uniform"},
    "dualpipev": {"model": FURTHER | {"blocks": 8}, "schedule": "dualpipev", "method": "uniform"},
    "zb1p": {"model": FURTHER, "schedule": "zb1p", "method": "uniform"},
}


class Reference(nn.Module):
    """The model by the report's equations 21 to 25."""

    def __init__(self, model):
        super().__init__()
        self.config = moe_runs.config(**model | {"expert_parallel": 1})
        parts = [spec.build() for spec in layers(self.config)]
        again = next(n for n, part in enumerate(parts) if n and isinstance(part, TokenEmbedding))
        self.parts = nn.ModuleDict({str(n): part for n, part in enumerate(parts) if n != again})

    def forward(self, tokens, labels):
        def of(kind):
            return [part for part in self.parts.values() if isinstance(part, kind)]

        (embedding,), (norm,), (head,) = of(TokenEmbedding), of(FinalNorm), of(Head)
        auxiliary = torch.zeros(1, dtype=torch.float64) if self.config.adds_loss else None
        state = self._state(functional.embedding(tokens, embedding.table.weight), auxiliary)
        for number in range(1, self.config.blocks + 1):
            state = self.parts[str(number)](state)
        h, auxiliary = state if isinstance(state, tuple) else (state, None)
        h = norm.norm(h)
        main = functional.cross_entropy(head.out(h).flatten(0, 1), labels.flatten())
        later = []
        for k, part in enumerate(of(MTPBlock), 1):
            ahead = functional.embedding(tokens[:, k:], embedding.table.weight)
            both = torch.cat([part.embedding_norm(ahead), part.hidden_norm(h[:, :-1])], dim=-1)
            block = MoEBlock(self.config)
            for name in ("norm1", "norm2", "attention", "router", "experts", "shared"):
                setattr(block, name, getattr(part, name))
            state = block(self._state(both @ part.project.weight.t(), auxiliary))
            h, auxiliary = state if isinstance(state, tuple) else (state, None)
            h = part.out_norm(h)
            counted = labels[:, k:] != IGNORED
            logs = head.out(h).log_softmax(-1).gather(-1, labels[:, k:, None].clamp(min=0))
            later.append(-logs[counted].sum() / (labels != IGNORED).sum())
        total = main + WEIGHT / self.config.mtp_depth * sum(later)
        return total if auxiliary is None else total + auxiliary[0]

    @staticmethod
    def _state(x, auxiliary):
        return x if auxiliary is None else (x, auxiliary)


def own(name):
    """The engine's name of a parameter -> that of the reference."""
    return "parts." + name.replace("tied_modules.embedding.", "0.")


def reference_of(model, start, replicas, micros):
    module = Reference(model).double()
    missing, unexpected = module.load_state_dict({own(name): tensor for name, tensor in start.items()}, strict=False)
    assert not unexpected and all("router.bias" in name for name in missing)
    total = 0.0
    for replica in range(replicas):
        data = training.stream(replica)
        for _ in range(micros):
            each = module(*next(data)) / (micros * replicas)
            each.backward()
            total += float(each.detach())
    return module, total


def copies_of(found, key, case):
    """name -> tensors of all copies, experts whole; without what stands where a rank has no experts."""
    found = [rank | {key: {n: value for n, value in rank[key].items() if n != PLACEHOLDER}} for rank in found]
    if case["model"].get("expert_parallel", 2) > 1:
        return assemble(found, key)
    names = {name for rank in found for name in rank[key]}
    return {name: [rank[key][name] for rank in found if name in rank[key]] for name in names}


def check(found, case, replicas, micros=4):
    start = {name: copies[0] for name, copies in copies_of(found, "start", case).items()}
    module, total = reference_of(case["model"], start, replicas, micros)
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6)  # the loss is reported in fp32
    grads, wanted = copies_of(found, "grads", case), dict(module.named_parameters())
    assert {own(name) for name in grads} == set(wanted)
    for name, copies in grads.items():
        expected = wanted[own(name)].grad
        assert expected.any(), name
        for grad in copies:
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


def one_embedding(found, schedule):
    """Where first and last stage share a rank there is one table, used twice; elsewhere two."""
    both = [rank["tables"] for rank in found if len(rank["tables"]) > 1]
    assert bool(both) == (schedule in ("dualpipe", "dualpipev", "zbv"))
    assert all(len(set(tables)) == 1 for tables in both)


@pytest.mark.parametrize("cases", [CASES, pytest.param(LONG, marks=pytest.mark.all)], ids=["short", "long"])
def test_gradients_are_those_of_the_equations(ranks, cases):
    found = ranks.run(4, mtp_runs.gradients, cases=list(cases.values()), ranks=2, replicas=2)
    for index, case in enumerate(cases.values()):
        each = [rank[index] for rank in found]
        check(each, case, replicas=2)
        one_embedding(each, case["schedule"])
        if case["schedule"].startswith("dualpipe"):
            phased = case.get("overlap", True) and case["model"].get("expert_parallel", 2) > 1
            assert all(bool(rank["transfers"]) == phased for rank in each)


@pytest.mark.all
def test_depths_on_several_stages(ranks):
    found = ranks.run(4, mtp_runs.gradients, cases=list(SPREAD.values()), ranks=4, replicas=1)
    for index, case in enumerate(SPREAD.values()):
        each = [rank[index] for rank in found]
        check(each, case, replicas=1)
        one_embedding(each, case["schedule"])


@pytest.mark.all
@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_training_and_checkpoints(ranks, tmp_path, schedule):
    """Adam with clipped gradients, and the optimizer's state of an embedding with two uses."""
    settings = training.settings(4, 2, zero=1, schedule=schedule, clip=0.5)
    del settings["scheduler"]
    model = {"mtp_depth": 1, "bias_rate": 0.05} | GROUPED
    found = ranks.run(4, moe_runs.train, model=model, settings=settings, ranks=2, folder=str(tmp_path))
    start = {name: copies[0] for name, copies in assemble(found, "start").items()}
    module = Reference(model)
    module.load_state_dict({own(name): tensor for name, tensor in start.items()}, strict=False)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    streams, losses = [training.stream(replica) for replica in range(2)], []
    for _ in range(4):
        optimizer.zero_grad()
        each = [module(*next(data)) / 8 for data in streams for _ in range(4)]
        sum(each).backward()
        losses.append(float(sum(each)))
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        rebalance(module, None)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        assert rank["same"] and rank["resumed"] == rank["losses"][2:]


@pytest.mark.all
def test_weights_move_to_another_cut_in_the_published_format(ranks, tmp_path):
    found = ranks.run(4, mtp_runs.moved, model={"mtp_depth": 1, "bias_rate": 0.05} | GROUPED, folder=str(tmp_path))
    for rank in found:
        assert rank["read and evaluated"] == pytest.approx(rank["evaluated"], rel=1e-5)
        assert rank["evaluated"] < rank["next"] - 0.5, "evaluation is of the next token alone"
        assert rank["read and evaluated"] < rank["read and trained"] - 0.5


def test_checkpoints_become_folders_of_transformers(ranks, tmp_path):
    model = {"mtp_depth": 1, "dense_blocks": 1, "yarn": Yarn(factor=4.0, length=16), "q_rank": 8} | GROUPED
    ranks.run(4, mtp_runs.saved, model=model, folder=str(tmp_path / "saved"), written=str(tmp_path / "written"))
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(tmp_path / "saved"), "--out", str(out)]) == 0
    written = {}
    for path in (tmp_path / "written").glob("*.safetensors"):
        written |= load_file(path)
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == written.keys() and all(torch.equal(exported[key], written[key]) for key in written)
    theirs = DeepseekV3ForCausalLM.from_pretrained(out)
    ours = moe_runs.config(**model)
    assert replace(MoEConfig.from_hf(theirs.config), **OWN) == replace(ours, **OWN, value_head=8, normalised=True)
    held = theirs.state_dict()
    assert torch.equal(held["model.layers.0.mlp.down_proj.weight"], written["model.layers.0.mlp.down_proj.weight"])
    for block in range(1, ours.blocks):
        prefix = f"model.layers.{block}.mlp.experts."
        for expert in range(ours.experts):
            parts = [written[f"{prefix}{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            assert torch.equal(held[f"{prefix}gate_up_proj"][expert], torch.cat(parts[:2]))
            assert torch.equal(held[f"{prefix}down_proj"][expert], parts[2])
    again = get_model_adapter(folder=str(out)).stage(1, ours.blocks).state_dict()
    assert again and all(torch.equal(value, held[key]) for key, value in again.items())


@pytest.mark.all
def test_auto_measures_layers_that_look_ahead(ranks, tmp_path):
    path, model = tmp_path / "costs.json", {"mtp_depth": 1, "sequence_loss": 0.3}
    found = ranks.run(4, moe_runs.measured, path=path, ranks=2, **model)
    assert len(found[0]["seconds"]) == 9 and all(min(rank["seconds"]) > 0 for rank in found)
    fixed = ranks.run(4, moe_runs.measured, path=path, ranks=2, schedule=found[0]["schedule"], **model)
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in fixed], "measuring left something behind"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_sentence_of_all_ranks(ranks, tmp_path, rank):
    said = ranks.run(2, mtp_runs.saved_on_a_full_disk, model={"expert_parallel": 1}, folder=str(tmp_path), rank=rank)
    assert said[0] == said[1] and "cannot be written" in said[0] and "make room or name another folder" in said[0]
    assert all(path.stat().st_size > 512 for path in tmp_path.iterdir()), "no torn file"


def test_gate_and_biases_stay_precise(ranks):
    for rank in ranks.run(2, mtp_runs.low_precision, model={"mtp_depth": 1, "expert_parallel": 1}):
        assert set(rank["buffers"].values()) == {torch.float32} and rank["gate"] == torch.float32
        assert rank["biases moved"]
