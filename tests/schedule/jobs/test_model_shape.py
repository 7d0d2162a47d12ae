import json

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.model_shape import KNOWN, load_shape


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
    assert names == ["embedding", *["dense"] * 3, *["moe"] * 58, "head", "moe", "shared head"]


def test_a_hugging_face_configuration_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KNOWN["mixtral-8x7b"]))
    assert load_shape(str(path)).layers == load_shape("mixtral-8x7b").layers


def test_parameters_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    matrices = sum(param.numel() for param in model.parameters() if param.dim() > 1)
    from dualpipe_engine.schedule.jobs.model_shape import shape_of

    assert shape_of("tiny", config.to_dict()).parameters == matrices


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"hidden_size": "x"}'])
def test_what_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no configuration"):
        load_shape(str(path))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'deepseek-v3'"):
        load_shape("deepseekv3")
