import json

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.model_shape import KNOWN, held_params, load_shape, shape_of


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("deepseek-v3", 682.5, 38.1),
        ("qwen3-235b-a22b", 235, 21.6),
        ("mixtral-8x7b", 46.7, 12.7),
        ("llama-3-70b", 70.6, 69.5),
    ],
)  # as published; DeepSeek-V3 with its prediction module, whose head and embedding are shared
def test_parameters_are_the_published_ones(name, billions, active):
    shape = load_shape(name)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.01)


def test_layers_of_deepseek_v3():
    names = [layer.name for layer in load_shape("deepseek-v3").layers]
    assert names == ["embedding", *["dense"] * 3, *["moe"] * 58, "norm", "ahead", "mtp", "head"]


def test_a_hugging_face_configuration_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KNOWN["mixtral-8x7b"]))
    for name in (path, tmp_path):
        assert load_shape(str(name)).layers == load_shape("mixtral-8x7b").layers


SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 96, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
DEEPSEEK = SIZES | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 12}),
        ("Mixtral", {"num_local_experts": 4}),
        ("Qwen3Moe", {"num_experts": 4, "head_dim": 12}),
        ("Qwen3Moe", {"num_experts": 4, "mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True}),
        ("DeepseekV3", DEEPSEEK | {"first_k_dense_replace": 1}),
        ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2}),
    ],
)
def test_parameters_equal_those_of_transformers(tmp_path, kind, changes):
    """Read from the file that transformers writes; of multi-token prediction its models have no layers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    none = {"num_nextn_predict_layers": 0} if kind == "DeepseekV3" else {}
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes | none))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    config.save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    assert shape.parameters == sum(param.numel() for param in model.parameters())
    experts = [param.numel() for name, param in model.named_parameters() if ".mlp.experts." in name]
    assert sum(layer.experts for layer in shape.layers) == sum(experts)
    blocks = [sum(param.numel() for param in block.parameters()) for block in model.model.layers]
    assert [layer.params + layer.experts for layer in shape.layers[1:-1]] == blocks


@pytest.mark.parametrize("depth", [0, 2])
def test_parameters_equal_those_of_the_layers_that_train(tmp_path, depth):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from dualpipe_engine.models.config import MoEConfig
    from dualpipe_engine.models.transformer import layers

    config = transformers.DeepseekV3Config(**DEEPSEEK, first_k_dense_replace=1, num_nextn_predict_layers=depth)
    config.save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    built = [spec.build() for spec in layers(MoEConfig.from_hf(config, expert_parallel=2))]
    found = [sum(param.numel() for param in layer.parameters()) for layer in built]
    assert [layer.params + layer.experts // 2 for layer in shape.layers] == found
    tables = {2: shape.layers[0].params} if depth else {}
    assert shape.parameters == sum(found) + sum(each.experts // 2 for each in shape.layers) - sum(tables.values())
    assert held_params(shape.layers) == sum(layer.params for layer in shape.layers) - sum(tables.values())
    del torch


def test_a_tied_head_counts_once_where_the_embedding_is():
    first, *between, last = shape_of("tied", SIZES | {"tie_word_embeddings": True}).layers
    assert held_params([first, last]) == first.params + last.params - last.tied
    assert held_params([between[0], last]) == between[0].params + last.params


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"hidden_size": "x"}'])
def test_what_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no configuration"):
        load_shape(str(path))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'deepseek-v3'"):
        load_shape("deepseekv3")
