"""Stages of every known architecture against the whole model: loss, outputs and gradients to the last bit."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import transformers
from torch import nn

from dualpipe_engine.adapters import get_model_adapter, register_adapter
from dualpipe_engine.errors import ConfigError

TEXT = dict(models.TEXT)
SIZES = {"vocab_size": 61, "num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "LlamaForCausalLM": ("LlamaConfig", TEXT),
    "LlamaForCausalLM tied": ("LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "MistralForCausalLM": ("MistralConfig", {**TEXT, "sliding_window": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", TEXT),
    "Qwen3ForCausalLM": ("Qwen3Config", {**TEXT, "head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**TEXT, "head_dim": 8, "sliding_window": 4}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**TEXT, "head_dim": 8, "sliding_window": 4}),
    "Phi3ForCausalLM": ("Phi3Config", {**TEXT, "original_max_position_embeddings": 64, "max_position_embeddings": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
    "MixtralForCausalLM": ("MixtralConfig", {**TEXT, "num_local_experts": 4}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**TEXT, **MOE, "head_dim": 8, "num_experts": 4}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {**TEXT, **MOE, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
         "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "GptOssForCausalLM": ("GptOssConfig", {**TEXT, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4}),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
         "local_attention": 4},
    ),
    "ViTForImageClassification": ("ViTConfig", {**SIZES, "image_size": 16, "patch_size": 4}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**SIZES, "image_size": 16, "patch_size": 4}),
}  # fmt: skip


def make_model(name):
    config_name, options = ARCHITECTURES[name]
    options = {key: value for key, value in options.items() if config_name != "ViTConfig" or key != "vocab_size"}
    torch.manual_seed(5)
    config = getattr(transformers, config_name)(**options)
    return getattr(transformers, name.split()[0])(config).eval()


def batch_of(model):
    torch.manual_seed(6)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, torch.tensor([0, 1])
    tokens = torch.randint(3, 61, (2, 7))
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}, tokens


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_equal_the_whole_model(name, parts):
    model = make_model(name)
    inputs, labels = batch_of(model)
    whole = copy.deepcopy(model)
    expected = whole(**inputs, labels=labels)
    expected.loss.backward()
    adapter = get_model_adapter(model)
    value = inputs
    for stage in adapter.partition(num_partitions=parts):
        value = stage.eval()(value)
    assert torch.equal(value, expected.logits)
    loss = adapter.loss_fn(value, labels)
    assert torch.equal(loss, expected.loss)
    loss.backward()
    names = dict(model.named_parameters())
    for key, param in whole.named_parameters():
        found = names[key].grad
        assert (found is None) == (param.grad is None), key
        assert found is None or torch.equal(found, param.grad), key


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification"])
def test_names_of_weights_are_the_models(name):
    model = make_model(name)
    adapter = get_model_adapter(model)
    found = [key for stage in adapter.partition(num_partitions=4) for key, _ in stage.named_parameters()]
    assert sorted(found) == sorted(key for key, _ in model.named_parameters())


def test_plain_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    x = torch.randn(3, 4)
    value = x
    for stage in get_model_adapter(model, example_inputs=x).partition(num_partitions=2):
        value = stage(value)
    assert torch.equal(value, model(x))


def test_encoder_decoders_are_refused_with_the_reason():
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match=r"T5.*encoder"):
        get_model_adapter(transformers.T5ForConditionalGeneration(config))


def test_too_many_stages_are_refused():
    with pytest.raises(ConfigError, match="at most 5"):
        get_model_adapter(make_model("LlamaForCausalLM")).partition(num_partitions=6)


def test_a_users_adapter_is_taken():
    class Mine(nn.Module):
        pass

    register_adapter(Mine, lambda model: ("mine", model))
    model = Mine()
    assert get_model_adapter(model) == ("mine", model)


def test_stages_are_built_from_files_without_the_whole_model(tmp_path):
    model = make_model("LlamaForCausalLM tied")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    adapter = get_model_adapter(folder=str(tmp_path))
    assert all(param.is_meta for param in adapter.model.parameters())
    inputs, _ = batch_of(model)
    value = inputs
    for stage in adapter.partition(num_partitions=2):
        assert not any(param.is_meta for param in stage.parameters())
        value = stage.eval()(value)
    assert torch.equal(value, model(**inputs).logits)
