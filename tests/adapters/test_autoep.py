"""Experts of transformers' models shared by replicas ("expert_parallel"), against the whole model in one process."""

from __future__ import annotations

import copy
import functools
import sys
from types import SimpleNamespace

import autoep_runs
import models
import pytest
import torch
import training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dualpipe_engine.cli import main
from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.autoep.alike import difference
from dualpipe_engine.models.autoep.section import KEYS, REFUSED, read_section

ROUTERS = models.ROUTERS
SCHEDULES = ("dualpipe", "dualpipev", "zb1p")
NAMES = ("mixtral", "mixtral" + ROUTERS, "qwen3_moe", "qwen3_moe" + ROUTERS, "deepseek_v3")
#: An expert without a token is that of DeepSeek-V3, whose bias pushes tokens away from it.
SHORT = [("mixtral" + ROUTERS, "dualpipe"), ("deepseek_v3", "dualpipev"), ("qwen3_moe", "zb1p")]
REST = [[(name, schedule) for schedule in SCHEDULES if (name, schedule) not in SHORT] for name in NAMES]


def compare(found, case, whole):
    """Loss and gradients of all ranks with those of the whole model."""
    total, grads = whole
    seen = set()
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-5), case
        for name, grad in rank["grads"].items():
            expected = grads.get(name)
            if expected is None:  # of a buffer
                continue
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
            seen.add(name)
    assert seen == grads.keys()


def check(pool, pairs, **more):
    """With phases and without, which agree to the last bit."""
    cases = [
        {"name": name, "schedule": schedule, "overlap": overlap, **more}
        for name, schedule in pairs
        for overlap in ("auto", False)
    ]
    found = pool.run(more.get("ranks", 2) * 2, autoep_runs.each, cases=cases)
    wholes = {}
    for index, case in enumerate(cases):
        mine = [rank[index] for rank in found]
        key = case["name"]
        if key not in wholes:
            wholes[key] = autoep_runs.whole(key, changes=more.get("changes"))
        compare(mine, case, wholes[key])
        for rank in mine:
            assert rank["unphased"] == {}, case
            assert rank["transfers"] in ([], ["combine", "counts", "dispatch"]), case
            assert not any(".experts." in name or ".router." in name for name, _ in rank["split"]), case
        assert any(rank["transfers"] for rank in mine) == bool(case["overlap"]), case
        if case["overlap"] and case["schedule"] == "dualpipe" and "ranks" not in more:  # four micro-batches pair on two
            assert any(rank["pairs"] for rank in mine), case
    for rank in found:
        for phased, plain in zip(rank[::2], rank[1::2], strict=True):
            assert phased["loss"] == plain["loss"]
            for name, grad in phased["grads"].items():
                assert torch.equal(grad, plain["grads"][name]), name
    return found


@pytest.mark.parametrize(
    "pairs", [SHORT, *(pytest.param(pairs, marks=pytest.mark.all) for pairs in REST)], ids=["short", *NAMES]
)
def test_gradients_are_those_of_the_whole_model(ranks, pairs):
    found = check(ranks, pairs)
    for index, (name, _) in enumerate(pairs):
        if name == "deepseek_v3":
            grads = [
                grad[-1]
                for rank in found
                for key, grad in rank[2 * index]["grads"].items()
                if ".experts." in key and "shared" not in key
            ]
            assert grads and not any(grad.any() for grad in grads), "the last expert has no token"


@pytest.mark.all
def test_on_eight_ranks(ranks):
    check(ranks, [("qwen3_moe" + ROUTERS, "dualpipe")], ranks=4, changes={"blocks": 4})


@pytest.mark.all
def test_recomputed(ranks):
    check(ranks, [("mixtral" + ROUTERS, "dualpipe")], recompute=True)


@pytest.mark.parametrize("name", ["mixtral" + ROUTERS, pytest.param("deepseek_v3", marks=pytest.mark.all)])
def test_training_and_checkpoints(ranks, tmp_path, name):
    found = ranks.run(4, autoep_runs.train, name=name, folder=str(tmp_path))
    losses, weights = autoep_runs.train_whole(name)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, rel=1e-4)
        assert rank["resumed"] == rank["losses"][2:], "a resumed run goes on bit for bit"
        assert rank["moved"] == pytest.approx(rank["evaluated"], rel=1e-6), "files hold the block that was replaced"
        assert rank["experts"] and set(rank["experts"].values()) == {2 if name.startswith("mixtral") else 4}
    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == found[0]["weights"].keys() == weights.keys()
    assert all(torch.equal(exported[key], value) for key, value in found[0]["weights"].items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto").state_dict()
    assert loaded.keys() == exported.keys() and all(torch.equal(loaded[key], exported[key]) for key in loaded)
    for key, value in found[0]["weights"].items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_layers_of_a_users_own(ranks):
    found = ranks.run(4, autoep_runs.own_layers_both)
    assert [text.split(",")[0] for text in found[0][0]["said"]] == ["layer 2 runs without phases"]
    for phased, plain in found:
        assert phased["losses"] == plain["losses"]
        assert phased["transfers"] and not plain["transfers"]
        reason = "what it does after its experts is more than adding the residual stream"
        assert phased["unphased"] == {2: reason} and plain["unphased"] == {}


@pytest.mark.gloo  # it is named
def test_sizes_that_do_not_fit_are_refused_on_every_rank(ranks):
    cases = {
        "replicas": ({"section": {"autoep_size": 4}}, "does not divide the 2 replicas"),
        "experts": (
            {"changes": {"num_local_experts": 3}},
            "does not divide the 3 experts of layer 1: take one of 1, 3",
        ),
        "no experts": ({"name": "llama"}, "no layer has a block of experts"),
        "tensor parallelism": (
            {"model_parallel": 2, "section": {"autoep_size": 1}},
            "and tensor parallelism do not go",
        ),
        "preset": (
            {"name": "deepseek_v3", "section": {"preset_model": "qwen3_moe"}},
            "has no place for the weights shared_experts.down_proj.weight",
        ),
        "gate": ({"change": "other_gate"}, "cannot take the place of MixtralSparseMoeBlock (AttributeError: "),
        "hook": ({"change": "hooked"}, "has no place for the hooks of MixtralSparseMoeBlock"),
        "DeepEP": (
            {"libraries": ["deep_ep"], "section": {"comm_backend": "deepep", "comm_max_tokens_per_rank": 64}},
            "needs process groups of NCCL, not of gloo",
        ),
    }
    calls = {name: call for name, (call, _) in cases.items()}
    for rank in ranks.run(4, training.refusals, call=autoep_runs.fails, cases=calls):
        for name, (kind, text) in rank.items():
            assert kind == "ConfigError" and cases[name][1] in text, name


def plain(**keys):
    return {"pipeline": {"schedule": "dualpipe"}, "expert_parallel": {"enabled": True, **keys}}


WRONG = {
    "enabled": {"enabled": 1},
    "autoep_size": {"autoep_size": 0},
    "autoep_siz": {"autoep_siz": 2},
    "top_k": {"top_k": "2"},
    "route_norm": {"route_norm": "yes"},
    "use_grouped_mm": {"use_grouped_mm": "no"},
    "moe_layer_pattern": {"moe_layer_pattern": "("},
    "preset_model": {"preset_model": "mixtra"},
    "shared_experts_pattern": {"shared_experts_pattern": "shared"},
    "shared_experts_gate_pattern": {"shared_experts_gate_pattern": "shared"},
    "route_scale": {"route_scale": 2.0, "routed_scaling_factor": 3.0},
    "top_k_attr": {"top_k_attr": "top", "top_k": 2},
    "disable_triton_grouped_mm": {"disable_triton_grouped_mm": True, "use_grouped_mm": False},
    "combine_impl": {"combine_impl": "fused_weighted_sum"},
    "gate_up_impl": {"gate_up_impl": "fused", "use_grouped_mm": False},
    "score_func": {"score_func": "relu"},
}
WRONG |= {
    "comm_backend": {"comm_backend": "deepep"},
    "comm_num_sm": {"comm_num_sm": 8},
    "comm_qp_margin": {"comm_qp_margin": 8},
    "comm_max_tokens_per_rank": {"comm_max_tokens_per_rank": 8},
    "row_weighting_impl": {"row_weighting_impl": "fused"},
    "async_split_plan": {"async_split_plan": True},
    "expert_tensor_parallel_size": {"expert_tensor_parallel_size": 2},
    "validate_folding_routing": {"validate_folding_routing": True},
    "load_balance_coeff": {"load_balance_coeff": 0.1},
}


@pytest.mark.parametrize("key", WRONG)
def test_what_cannot_work_is_refused(key):
    with pytest.raises(ConfigError, match=key):
        read_config(plain(**WRONG[key]))
    read_config(plain(**{key: off[0] for key, (off, _) in REFUSED.items() if off}))
    if key != "enabled":
        read_config(plain(**WRONG[key]) | {"expert_parallel": {"enabled": False, **WRONG[key]}})
    assert REFUSED.keys() <= WRONG.keys()


DEEP_EP = {"comm_backend": "deepep", "autoep_size": 2, "comm_max_tokens_per_rank": 8}
DEEP_EP |= {"comm_num_sm": 8, "comm_qp_margin": 2}


class Pair:
    """A group of two ranks."""

    def size(self):
        return 2


def test_deep_ep_is_taken_where_it_is_installed(monkeypatch):
    with pytest.raises(ConfigError, match="deep_ep in version 2, which is not installed"):
        read_config(plain(**DEEP_EP))
    library = monkeypatch.setitem  # of version 1, then of 2
    library(sys.modules, "deep_ep", SimpleNamespace(Buffer=object))
    with pytest.raises(ConfigError, match="version 2"):
        read_config(plain(**DEEP_EP))
    library(sys.modules, "deep_ep", SimpleNamespace(ElasticBuffer=object))
    read_config(plain(**DEEP_EP, combine_impl="auto", row_weighting_impl="eager"))
    layer, _ = layer_of(**DEEP_EP)
    layer.use_deep_ep(group := Pair())
    assert layer._deep_ep._shared.buffer._limits == (8, 8, 10) and layer._deep_ep._shared.group is group
    for wrong, said in (
        (DEEP_EP | {"autoep_size": 1}, 'no effect without an "autoep_size" from 2'),
        (DEEP_EP | {"comm_max_tokens_per_rank": 0}, "must be a positive integer"),
        (DEEP_EP | {"combine_impl": "legacy_bmm"}, 'no effect beside "comm_backend": "deepep"'),
    ):
        with pytest.raises(ConfigError, match=said):
            read_config(plain(**wrong))


@functools.cache
def mixtral_block():
    return models.model_of(autoep_runs.config_of("mixtral")).model.layers[0]


def layer_of(block=None, **keys):
    """What takes the place of the block of experts of a layer."""
    from dualpipe_engine.models.autoep.find import find_blocks
    from dualpipe_engine.models.autoep.layer import SharedMoE

    block = copy.deepcopy(mixtral_block()) if block is None else block
    [(path, spec, completed)] = find_blocks(block, 0, read_section({"enabled": True, **keys}))
    return SharedMoE(spec, block.get_submodule(path), 1, 0, completed), spec


#: Keys -> what becomes of them in the layer and its specification.
REACH = [
    ({"top_k": 1}, lambda layer, spec: layer.top_k == 1),
    ({"score_func": "sigmoid"}, lambda layer, spec: layer.router.score_func == "sigmoid"),
    ({"score_apply": "pre"}, lambda layer, spec: layer.score_apply == "pre"),
    ({"route_norm": False}, lambda layer, spec: layer.router.route_norm is False),
    ({"route_scale": 2.0}, lambda layer, spec: layer.router.route_scale == 2.0),
    ({"routed_scaling_factor": 3.0}, lambda layer, spec: layer.router.route_scale == 3.0),
    (
        {"num_expert_groups": 2, "num_limited_groups": 1},
        lambda layer, spec: (layer.router.num_expert_groups, layer.router.num_limited_groups) == (2, 1),
    ),
    ({"use_grouped_mm": False}, lambda layer, spec: layer.experts.use_grouped_mm is False),
    ({"gate_up_impl": "fused"}, lambda layer, spec: layer.experts.gate_up_impl == "fused"),
    ({"combine_impl": "legacy_bmm"}, lambda layer, spec: layer.combine_impl == "legacy_bmm"),
    ({"expert_activation": "geglu_tanh"}, lambda layer, spec: layer.experts.activation == "geglu_tanh"),
    ({"preset_model": "qwen3_moe"}, lambda layer, spec: spec.model_family == "qwen3_moe"),
]


class Pool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, shape in (("inward", (4, 12, 8)), ("outward", (4, 8, 12)), ("beside", (4, 12, 8))):
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))


class Custom(torch.nn.Module):
    """A layer with experts under names of its own."""

    def __init__(self):
        super().__init__()
        self.moe = torch.nn.Module()
        self.moe.route, self.moe.pool = torch.nn.Linear(8, 4, bias=False), Pool()
        self.moe.always, self.moe.share = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)
        self.config = type("Config", (), {"model_type": "mine", "many": 4, "few": 2})()


CUSTOM = {
    "moe_layer_pattern": r"model\.layers\.\d+\.moe",
    "router_pattern": "route",
    "expert_pattern": "pool",
    "expert_w1": "inward",
    "expert_w2": "outward",
    "expert_w3": "beside",
    "num_experts_attr": "many",
    "top_k_attr": "few",
    "has_shared_experts": True,
    "shared_experts_pattern": "always",
    "shared_experts_gate_pattern": "share",
}


def test_every_key_reaches_the_layers(monkeypatch):
    for keys, reached in REACH:
        layer, spec = layer_of(**keys)
        assert reached(layer, spec), keys
        assert not reached(*layer_of()), keys
    layer, spec = layer_of(block=Custom(), **CUSTOM)
    assert (layer.num_experts, layer.top_k, layer.hidden_size) == (4, 2, 8)
    assert layer.experts.w3.shape == (4, 12, 8) and layer.shared_experts_gate.out_features == 1
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "prefer_triton_grouped_mm", lambda self: True)
    assert layer_of()[0].experts.use_triton_grouped_mm
    assert not layer_of(disable_triton_grouped_mm=True)[0].experts.use_triton_grouped_mm
    tried = {key for keys, _ in REACH for key in keys} | CUSTOM.keys() | REFUSED.keys() | DEEP_EP.keys()
    assert set(KEYS) - tried == {"enabled", "disable_triton_grouped_mm"}


#: Name of a model, changes of its configuration, keys -> what is said of its block, or that it is done alike.
ALIKE = [
    ("mixtral", {}, {}, None),
    ("mixtral", {}, {"preset_model": "qwen3_moe"}, None),
    ("mixtral", {"router_jitter_noise": 0.1}, {}, "in training: set its router_jitter_noise to 0"),
    ("mixtral", {}, {"preset_model": "deepseek_v3"}, "routes otherwise than MixtralSparseMoeBlock"),
    ("mixtral", {}, {"preset_model": "deepseek_v3", "score_func": "sigmoid"}, None),  # as the user says
    ("qwen3_moe", {}, {}, None),
    ("qwen3_moe", {"norm_topk_prob": True}, {}, None),
    ("qwen3_moe", {"routed_scaling_factor": 2.0}, {}, "routes otherwise than Qwen3MoeSparseMoeBlock"),
    ("deepseek_v3", {}, {}, None),
    ("deepseek_v3", {"routed_scaling_factor": 1.5, "norm_topk_prob": False}, {}, None),
    ("deepseek_v3", {}, {"preset_model": "qwen3_moe"}, "has no place for the weights shared_experts.down_proj.weight"),
    ("deepseek_v3", {}, {"preset_model": "qwen3_moe", "top_k": 1}, "has no place for the weights"),
    ("deepseek_v3", {}, {"preset_model": "deepseek_v2"}, "DeepseekV3MoE"),
    ("deepseek_v3", {}, {"preset_model": "minimax_m3"}, "has experts that compute otherwise than those of Deep"),
    ("deepseek_v3", {}, {"preset_model": "minimax_m3", "top_k": 2}, "has experts that compute otherwise"),
    ("deepseek_v3", {}, {"preset_model": "minimax_m3", "expert_activation": "swiglu"}, None),
    ("mixtral", {}, {"preset_model": "qwen3_5_moe"}, None),
]


@pytest.mark.parametrize(("name", "changes", "keys", "said"), ALIKE)
def test_a_block_that_the_layer_does_not_replace_is_told(name, changes, keys, said):
    block = models.model_of(autoep_runs.config_of(name, **changes)).model.layers[-1]
    source = block.mlp
    before = {key: value.clone() for key, value in source.state_dict().items()}
    layer, _ = layer_of(block, **keys)
    found = difference(source, layer, read_section({"enabled": True, **keys}))
    assert found is None if said is None else said in found
    if said is None and "top_k" not in keys and "score_func" not in keys:
        hidden = torch.randn(2, 5, 32)
        torch.testing.assert_close(layer(hidden), source(hidden))  # a tensor, not a tuple
    assert before.keys() == source.state_dict().keys()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in before.items())


class Feeding(torch.nn.ModuleDict):
    def forward(self, x):
        return self["down_proj"](torch.nn.functional.silu(self["gate_proj"](x)) * self["up_proj"](x))


class Looped(torch.nn.Module):
    """A block with a list of experts, which chooses the worst where it is told to."""

    def __init__(self, worst=False, returned=None):
        super().__init__()
        self.gate, self.worst = torch.nn.Linear(8, 4, bias=False), worst
        self.returned = returned or (lambda out, logits: out)
        names = ("gate_proj", "down_proj", "up_proj")
        linear = {name: torch.nn.Linear(8, 8, bias=False) for name in names}
        self.experts = torch.nn.ModuleList(Feeding(copy.deepcopy(linear)) for _ in range(4))

    def forward(self, hidden):
        x = hidden.view(-1, 8)
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(2, largest=not self.worst)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return self.returned(out.view_as(hidden), logits)


def replaced(moe, **changes):
    """What takes the place of a block of a user's own, and how it differs."""
    block = torch.nn.Module()
    block.mlp = moe
    block.config = type("Config", (), {"model_type": "mine", "num_experts": 4, "num_experts_per_tok": 2})()
    keys = {"preset_model": "qwen3_moe", "expert_w1": "gate_proj", "expert_w2": "down_proj", "expert_w3": "up_proj"}
    layer, _ = layer_of(block, **keys | changes)
    return layer, difference(moe, layer, read_section({"enabled": True, **keys | changes}))


def test_a_list_of_experts_is_tried_too():
    assert replaced(Looped())[1] is None
    assert "routes otherwise than Looped" in replaced(Looped(worst=True))[1]
    swapped = {"expert_w1": "up_proj", "expert_w3": "gate_proj"}
    assert "has experts that compute otherwise than those of Looped" in replaced(Looped(), **swapped)[1]


def test_a_layer_returns_what_its_block_returns():
    hidden = torch.randn(2, 5, 8)
    for returned in (lambda out, logits: (out, logits), lambda out, logits: out.flatten(0, 1)):
        block = Looped(returned=returned)
        layer, found = replaced(block)
        assert found is None
        torch.testing.assert_close(layer(hidden), block(hidden))
    for returned, said in (
        (lambda out, logits: (out, logits.softmax(-1)), "routes otherwise"),
        (lambda out, logits: {"out": out}, "does not return what Looped returns"),
        (lambda out, logits: (out, logits, logits), "does not return what Looped returns"),
    ):
        assert said in replaced(Looped(returned=returned))[1]


def test_hooks_that_would_get_lost_are_told():
    for hooked in (
        lambda block: block.register_forward_hook(lambda *_: None),
        lambda block: block.gate.register_full_backward_pre_hook(lambda *_: None),
        lambda block: block.experts[1]["up_proj"].weight.register_hook(lambda grad: grad),
    ):
        block = Looped()
        hooked(block)
        assert "has no place for the hooks of Looped" in replaced(block)[1]


def test_state_dicts_have_the_names_of_the_block():
    block = Custom()
    layer, _ = layer_of(block=block, **CUSTOM)
    source = {name: tensor.clone() for name, tensor in block.moe.state_dict().items()}
    with layer.whole(keep=True):
        found = layer.state_dict(prefix="a.")
    assert found.keys() == {f"a.{name}" for name in source}
    assert all(torch.equal(found[f"a.{name}"], tensor) for name, tensor in source.items())
    changed = {name: tensor + 1 for name, tensor in source.items()}
    layer.load_state_dict(changed)
    with layer.whole(keep=True):
        assert all(torch.equal(tensor, changed[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.all
def test_training_in_bf16(ranks, tmp_path):
    found = ranks.run(4, autoep_runs.train, name="qwen3_moe" + ROUTERS, folder=str(tmp_path), precision="bf16")
    losses, _ = autoep_runs.train_whole("qwen3_moe" + ROUTERS)
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, rel=0.02)
        assert rank["resumed"] == rank["losses"][2:]
        assert rank["moved"] == pytest.approx(rank["evaluated"], rel=0.01)


@pytest.mark.all
def test_zero_stages_and_sizes_agree(ranks):
    cases = [("dualpipe", stage, {}) for stage in (0, 1, 2)]
    cases += [("dualpipe", 1, {"autoep_size": 1}), ("1f1b", 1, {"use_grouped_mm": False})]
    found = ranks.run(4, autoep_runs.stages_of_zero, cases=cases)
    for rank in found:
        for case, each in zip(cases, rank, strict=True):
            assert each == pytest.approx(found[0][0], rel=1e-5), case
