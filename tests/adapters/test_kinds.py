"""Kinds of models whose layout has surprises: stages compute what the model does, to the last bit, or are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_adapter import chained

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.errors import ConfigError

VOCABULARY, SIZE = 61, 32
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
WIDE = TEXT | {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURES = {key: value for key, value in WIDE.items() if not key.endswith("_id") and key != "vocab_size"}
PICTURES |= {"image_size": SIZE, "patch_size": 8}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}

#: name -> configuration, model, its arguments
KINDS = {
    "olmoe": ("Olmoe", "ForCausalLM", WIDE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("Mamba", "ForCausalLM", WIDE | {"state_size": 4, "time_step_rank": 4}),
    "falcon": ("Falcon", "ForCausalLM", TEXT | {"alibi": False}),
    "falcon, new": ("Falcon", "ForCausalLM", TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "mpt": ("Mpt", "ForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 4, "n_heads": 4}),
    "openai-gpt": ("OpenAIGPT", "LMHeadModel", GPT),
    "gpt2": ("GPT2", "LMHeadModel", GPT),
    "ctrl": ("CTRL", "LMHeadModel", GPT | {"dff": 48}),
    "electra": ("Electra", "ForMaskedLM", WIDE | {"embedding_size": 16}),
    "modernbert": ("ModernBert", "ForMaskedLM", WIDE | {"cls_token_id": 1, "sep_token_id": 2}),
    "vit-mae": (
        "ViTMAE",
        "ForPreTraining",
        PICTURES
        | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
        | {"decoder_intermediate_size": 24},
    ),
    "swinv2": (
        "Swinv2",
        "ForImageClassification",
        {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": SIZE}
        | {"patch_size": 2, "num_labels": 3},
    ),
    "clip": (
        "CLIP",
        "Model",
        {"text_config": WIDE | {"eos_token_id": 2}, "vision_config": PICTURES, "projection_dim": 16},
    ),
    "sam": (
        "Sam",
        "Model",
        {
            "vision_config": PICTURES | {"mlp_dim": 48, "output_channels": 16, "window_size": 2},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": SIZE, "patch_size": 8},
            "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2}
            | {"iou_head_hidden_dim": 16},
        },
    ),
}  # fmt: skip
#: Those whose forward is more than its blocks: an adapter has to notice.
REFUSED = {"openai-gpt", "ctrl", "electra", "vit-mae", "swinv2", "clip", "sam"}


def batch(model):
    generator = torch.Generator().manual_seed(9)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, SIZE, SIZE, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.all
@pytest.mark.parametrize("name", list(KINDS))
def test_stages_are_the_model_or_refused(name):
    family, head, sizes = KINDS[name]
    config = getattr(transformers, family + "Config")(**sizes)
    config.architectures = [family + head]
    torch.manual_seed(5)
    model = getattr(transformers, family + head)(config).eval()
    try:
        stages = get_model_adapter(model).partition(2)
    except ConfigError as error:
        assert name in REFUSED and len(str(error)) > 20
        return
    assert name not in REFUSED
    inputs = batch(model)
    with torch.no_grad():
        whole, found = model(**inputs).logits, chained([stage.eval() for stage in stages])(inputs)
    assert torch.equal(found, whole)
    try:
        stages = get_model_adapter(config=config).partition(2)
    except ConfigError as error:
        assert "without weights" in str(error) and "pass the model itself" in str(error)
        return
    drawn = {key: value for stage in stages for key, value in stage.state_dict().items()}
    expected = model.state_dict()
    assert drawn.keys() == expected.keys()
    for key, value in drawn.items():
        assert value.shape == expected[key].shape and bool(value.isfinite().all()), key
        if value.numel() > 500:
            assert float(value.std()) == pytest.approx(float(expected[key].std()), rel=0.2, abs=1e-6), key


def test_a_configuration_that_does_not_name_its_model():
    with pytest.raises(ConfigError, match=r"config.architectures"):
        get_model_adapter(config=transformers.ModernBertConfig())
