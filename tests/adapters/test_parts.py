"""Models of transformers on parts of sequences, against the whole model on whole sequences in one process."""

from __future__ import annotations

import kinds
import part_runs as runs
import pytest
import torch
import training
from models import ROUTERS

LLAMA = {"name": "llama"}
ONE_HEAD = {"name": "qwen3", "changes": {"num_key_value_heads": 1}}  # fewer heads of keys than parts
EXPERTS = {"name": "qwen3_moe", "experts": 2}
CASES = [
    {**ONE_HEAD, "schedule": "zb1p", "size": 2, "kind": "packed"},
    {**EXPERTS, "name": "qwen3_moe" + ROUTERS, "schedule": "dualpipe", "size": 2},
    {"name": "gpt2", "schedule": "dualpipev", "size": 2, "loss": "precise", "kind": "single"},
]
#: Windows, documents, learned positions, tied weights, latent attention, attention to both sides.
KINDS = [
    {"name": "mistral", "kind": "padded"},
    {"name": "gemma3", "kind": "packed"},
    {"name": "gpt_neox", "kind": "padded"},
    {"name": "llama_tied", "kind": "packed", "tiled_loss": 3, "tiled_mlp": 2},
    {"name": "deepseek_v3", "kind": "plain", "experts": 2},
    {"name": "bert", "kind": "padded"},
    {"name": "llama", "kind": "padded", "recompute": ["norm", "mlp"]},
    {"name": "llama", "kind": "packed", "offload_activations": True},
    {**EXPERTS, "overlap": False},
    {**EXPERTS, "activation_checkpoint_interval": 1, "use_reentrant": False},
]


def check(found, case):
    size, replicas = case["size"], case.get("replicas", 2)
    given = {key: case[key] for key in ("name", "kind", "changes", "loss") if key in case}
    total, grads = runs.whole(readers=replicas // size, **given)
    evaluated, _ = runs.whole(readers=1, evaluate=True, **given)
    norm = float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    # Layers offer the exchanges of their attention as phases, unless they are told not to. Not all ranks have some.
    again = bool(case.get("activation_checkpoint_interval"))
    phased = {"heads", "tokens"} if case.get("overlap") is not False and not again else set()
    assert {name for rank in found for name in rank["transfers"]} & {"heads", "tokens"} == phased, case
    assert any(rank["waits"] for rank in found) == again, case
    assert [len(rank["said"]) for rank in found] == [int(again), *[0] * (len(found) - 1)], case
    seen, exact = set(), case.get("loss") == "precise"
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6), case  # reported in fp32
        assert rank["evaluated"] == pytest.approx(evaluated, rel=1e-6), case
        assert rank["norm"] == pytest.approx(norm, rel=1e-5), case
        assert rank["readers"] == replicas // size
        for name, grad in rank["grads"].items():
            if name not in grads:  # of a buffer, or of what is never used
                continue
            rtol, atol = (1e-10, 1e-12) if exact else (1e-5, 1e-7)
            torch.testing.assert_close(grad, grads[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
            seen.add(name)
    assert seen == grads.keys()


def test_gradients_are_those_of_whole_sequences(ranks):
    found = ranks.run(4, runs.each, cases=CASES)
    for number, case in enumerate(CASES):
        check([rank[number] for rank in found], case)


@pytest.mark.all
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_every_model_and_schedule(ranks, schedule):
    cases = [{**case, "schedule": schedule, "size": 2} for case in (LLAMA, ONE_HEAD, EXPERTS, *KINDS)]
    found = ranks.run(4, runs.each, cases=cases, timeout=300)
    for number, case in enumerate(cases):
        check([rank[number] for rank in found], case)


@pytest.mark.all
@pytest.mark.parametrize("name", ["llama", "qwen3_moe" + ROUTERS])
def test_auto_measures_parts(ranks, tmp_path, name):
    found = ranks.run(4, runs.auto, path=tmp_path / "costs.json", name=name)
    total, _ = runs.whole(name, 1, "plain")
    for schedule, loss in found:
        assert (schedule, loss) == (found[0][0], pytest.approx(total, rel=1e-5))
    assert found[0][0] != "auto"


#: Kinds of models that mix tokens elsewhere than in transformers' attention functions, or in its "eager" one alone.
OTHERS = {"gemma2", "gpt_oss", "bloom", "falcon", "falcon_alibi", "falcon_new", "mpt", "gpt_neo", "qwen3_next"}
OTHERS |= {"mamba", "falcon_mamba", "mamba2", "jamba"}
TEXTS = [name for name, kind in kinds.KINDS.items() if kind.batch == "tokens"]


@pytest.mark.all
def test_every_kind_is_right_or_refused(ranks):
    """A kind that is refused is one of `OTHERS`, or cannot be cut."""
    cases = [{"name": name, "schedule": "zb1p", "size": 2, "kind": "plain"} for name in TEXTS]
    found = ranks.run(4, runs.each_or_why, cases=cases, timeout=300)
    right = set()
    for number, case in enumerate(cases):
        mine = [rank[number] for rank in found]
        if isinstance(mine[0], str):
            assert len(set(mine)) == 1
            assert ("parts of sequences" in mine[0]) == (case["name"] in OTHERS), mine[0]
        else:
            check(mine, case)
            right.add(case["name"])
    assert len(right) > 30 and not right & OTHERS


@pytest.mark.all
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_on_more_ranks(ranks, schedule):
    """Four parts; two groups of two."""
    cases = [
        {**case, "schedule": schedule, "size": size, "replicas": 4}
        for case, size in ((LLAMA, 4), (ONE_HEAD, 4), (EXPERTS, 4), (EXPERTS, 2))
    ]
    found = ranks.run(8, runs.each, cases=cases, timeout=300)
    for number, case in enumerate(cases):
        check([rank[number] for rank in found], case)


@pytest.mark.all
@pytest.mark.parametrize("case", [LLAMA, EXPERTS], ids=["llama", "experts"])
def test_training_and_checkpoints_are_those_of_another_size(ranks, tmp_path, case):
    found = ranks.run(4, runs.train, folder=str(tmp_path), steps=10, sizes=(1, 2), timeout=300, **case)
    for whole, parts in found:
        assert len(whole) == 20 and parts == pytest.approx(whole, rel=1e-5)


REFUSED = {
    "eager": ({"name": "llama", "changes": {"_attn_implementation": "eager"}}, "build the model with"),
    "heads": (
        {"name": "llama", "changes": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}},
        "3 attention heads cannot be divided",
    ),
    "another attention": ({"name": "falcon"}, "FalconAttention mixes tokens and does not know"),
    "linear attention": ({"name": "qwen3_next"}, "Qwen3NextGatedDeltaNet mixes tokens"),
    "states": ({"name": "mamba"}, "MambaBlock mixes tokens"),
    "one output a sequence": ({"name": "llama_classes"}, "not known to give an output for each token"),
    "recompute": ({"name": "llama", "recompute": ["self_attn"]}, "has transfers that are not to be repeated"),
}


def test_what_cannot_work_is_refused(ranks):
    calls = {name: call for name, (call, _) in REFUSED.items()}
    for rank in ranks.run(4, training.refusals, call=runs.refused, cases=calls):
        for name, (_, text) in rank.items():
            assert REFUSED[name][1] in text, (name, text)


def test_other_models_of_a_process_stay_whole(ranks):
    ranks.run(1, runs.apart)
