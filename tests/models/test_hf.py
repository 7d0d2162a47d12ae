"""The transformer against transformers' own DeepSeek-V3, in one process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from deepspeed.pipe import TiedLayerSpec
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models import hf_weights
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.transformer import layers, loss

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 640,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "num_mtp_layers": 0,
}


def hf_config(**changes):
    return DeepseekV3Config(**(SIZES | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}} | changes))


def theirs(config):
    """transformers' model; the biases tell where they are used."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.3)
    return model


class Whole(nn.Sequential):
    """All layers in one process, the second use of the embedding through the first one."""

    def __init__(self, config, replica=0):
        specs = layers(config, replica)
        super().__init__(*[spec.build() for spec in specs])
        for number, spec in enumerate(specs):
            if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
                self[number] = nn.Identity()
                self[number].forward = lambda state, again=spec.forward_fn: again(self[0], state)


def ours(config, model, folder, **choices):
    model.save_pretrained(folder)
    found = MoEConfig.from_hf(config, **choices)
    whole = Whole(found)
    hf_weights.load(whole, found, folder)
    return found, whole


def gradients_of(whole, config, tmp_path):
    """Published name -> gradient, by writing gradients where weights are."""
    with torch.no_grad():
        for param in whole.parameters():
            param.copy_(param.grad)
    hf_weights.save(whole, config, tmp_path / "gradients")
    return read(tmp_path / "gradients")


def read(folder):
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "rope_interleave": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
        {"norm_topk_prob": False, "n_group": 1, "topk_group": 1, "rope_parameters": YARN, "first_k_dense_replace": 0},
    ],
    ids=["yarn with mscale", "no positions to stretch", "yarn alone"],
)
def test_logits_and_gradients_are_those_of_transformers(changes, tmp_path):
    config = hf_config(**changes)
    model = theirs(config)
    found, whole = ours(config, model, tmp_path / "theirs")
    tokens = torch.randint(0, 23, (2, 40))
    wanted, logits = model(tokens[:, :-1]).logits, whole(tokens[:, :-1])
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6 * float(wanted.detach().abs().max()))
    loss(wanted, tokens[:, 1:]).backward()
    loss(logits, tokens[:, 1:]).backward()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.grad)
    model.save_pretrained(tmp_path / "their gradients")
    saved, mine = read(tmp_path / "their gradients"), gradients_of(whole, found, tmp_path)
    assert mine.keys() == saved.keys()
    for name, gradient in saved.items():
        if "e_score" not in name:
            assert gradient.any() or ".experts." in name, name
            near = min(1e-6, 4e-6 * float(gradient.abs().max()))
            torch.testing.assert_close(mine[name], gradient, rtol=1e-6, atol=near, msg=lambda m, n=name: n + m)


def test_multi_token_prediction_is_that_of_transformers(tmp_path):
    config = hf_config(num_mtp_layers=2)
    model = theirs(config).eval()
    further = MtpModel(model, 2)
    further.config._attn_implementation = "eager"
    found = MoEConfig.from_hf(config)
    whole = Whole(found)
    hf_weights.save(whole, found, tmp_path, config)  # fresh weights of ours, read by theirs
    state = read(tmp_path)
    model.load_state_dict(packed(state, config.num_hidden_layers), strict=True)
    for depth in range(2):
        prefix = f"model.layers.{config.num_hidden_layers + depth}."
        part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        assert torch.equal(part.pop("embed_tokens.weight"), state["model.embed_tokens.weight"])
        assert torch.equal(part.pop("shared_head.head.weight"), state["lm_head.weight"])
        named = {n: part.pop(n) for n in ("enorm.weight", "hnorm.weight", "eh_proj.weight")}
        named["post_norm.weight"] = part.pop("shared_head.norm.weight")
        named |= {f"mtp_block.{name}": tensor for name, tensor in pack_experts(part).items()}
        further.layers[depth].load_state_dict(named, strict=True)
    tokens = torch.randint(0, 23, (2, 12))
    output = whole(tokens)
    assert [each.shape[1] for each in output[4]] == [11, 10]
    hidden = model.model(tokens).last_hidden_state
    for depth, logits in enumerate(output[4], 1):
        positions = torch.arange(depth, 12)[None]
        hidden = step(further, depth - 1, hidden[:, :-1], tokens[:, depth:], positions)
        torch.testing.assert_close(logits, model.lm_head(hidden), rtol=1e-5, atol=1e-5)
    assert whole.eval()(tokens).shape == (2, 12, 23)
    torch.testing.assert_close(whole(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)


def step(further, depth, hidden, tokens, positions):
    embedded = further.embed_tokens(tokens)
    mask = torch.full((1, 1, len(positions[0]), len(positions[0])), -torch.inf).triu(1)
    around = further.rotary_emb(embedded, position_ids=positions)
    return further.layers[depth](embedded, hidden, around, mask, positions, None)


def packed(state, blocks):
    """Published entries of the main model -> transformers' modules."""
    own = {n: t for n, t in state.items() if not n.startswith("model.layers.") or int(n.split(".")[2]) < blocks}
    return pack_experts(own)


def pack_experts(state):
    found, experts = {}, {}
    for name, tensor in state.items():
        if ".experts." not in name and not name.startswith("mlp.experts."):
            found[name] = tensor
            continue
        before, after = name.split("experts.")
        number, kind, _ = after.split(".")
        experts.setdefault(before + "experts.", {}).setdefault(int(number), {})[kind] = tensor
    for prefix, each in experts.items():
        every = [each[number] for number in sorted(each)]
        found[prefix + "gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in every])
        found[prefix + "down_proj"] = torch.stack([e["down_proj"] for e in every])
    return found


def test_saved_weights_load_in_transformers_and_back(tmp_path):
    config = hf_config(num_mtp_layers=1)
    found = MoEConfig.from_hf(config)
    whole, again = Whole(found), Whole(found)
    hf_weights.save(whole, found, tmp_path, config)
    index = json.loads((tmp_path / hf_weights.INDEX).read_text())["weight_map"]
    assert set(index) == set(read(tmp_path)) and "model.layers.2.mlp.experts.7.down_proj.weight" in index
    hf_weights.load(again, found, tmp_path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, 23, (1, 9))
    torch.testing.assert_close(model(tokens).logits, whole.eval()(tokens), rtol=1e-5, atol=1e-5)


def test_a_rank_reads_its_own_experts_only(tmp_path, monkeypatch):
    config = hf_config(num_mtp_layers=1)
    found = MoEConfig.from_hf(config)
    whole = Whole(found)
    hf_weights.save(whole, found, tmp_path)
    share, read_entries = Whole(replace(found, expert_parallel=2), replica=1), []
    fill = hf_weights._fill
    monkeypatch.setattr(
        hf_weights,
        "_fill",
        lambda layer, wanted, read: fill(layer, wanted, lambda name: read_entries.append(name) or read(name)),
    )
    hf_weights.load(share, replace(found, expert_parallel=2), tmp_path)
    experts = {int(name.split(".")[5]) for name in read_entries if ".experts." in name}
    assert experts == {4, 5, 6, 7} and len(read_entries) == len(set(read_entries))
    for name, tensor in share.state_dict().items():
        wanted = whole.state_dict()[name]
        assert torch.equal(tensor, wanted[4:] if ".experts." in name else wanted), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    ],
)
def test_what_a_configuration_asks_for_in_vain(changes, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_hf(hf_config(**changes))


def test_folders_that_do_not_fit(tmp_path):
    config = hf_config()
    found = MoEConfig.from_hf(config)
    hf_weights.save(Whole(found), found, tmp_path)
    with pytest.raises(ConfigError, match=r"no entry model\.layers\.2\."):
        more = MoEConfig.from_hf(config, mtp_depth=1)
        hf_weights.load(Whole(more), more, tmp_path)
    with pytest.raises(ConfigError, match=r"make \[28, 8\].*is \[32, 8\]"):
        wider = MoEConfig.from_hf(config, value_head=8)
        hf_weights.load(Whole(wider), wider, tmp_path)
    with pytest.raises(ConfigError, match="neither"):
        hf_weights.load(Whole(found), found, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="layers of dualpipe_engine"):
        hf_weights.load(nn.Sequential(nn.Linear(2, 2)), found, tmp_path)
