"""Tiny models of many kinds: decoders, encoders, both, vision, audio, several media, state spaces, experts."""

from __future__ import annotations

from typing import NamedTuple

import models
import torch
import transformers
from models import BERT, BLOCKS, MOE, NO_DROPOUT, TEXT, VISION, VOCABULARY

GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 32}
HEADS = {"head_dim": 8}
SIZED = BERT | {"max_position_embeddings": 40}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "max_position_embeddings": 40,
}
BART |= {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in (("ffn_dim", 48), ("attention_heads", 4))
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0}
WHISPER |= {"decoder_start_token_id": 1, "num_labels": 3, "classifier_proj_size": 16}
del WHISPER["max_position_embeddings"]
SPEECH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
SPEECH |= {"conv_dim": [8, 8, 8], "conv_stride": [5, 4, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3}
SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": VOCABULARY}
STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": BLOCKS}
MAMBA2 = STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
TOWER = {key: value for key, value in VISION.items() if key != "num_labels"} | {"num_hidden_layers": 3}
CLIP_TOWER = TOWER | {"model_type": "clip_vision_model", "patch_size": 16, "projection_dim": 16}
CLIP_TEXT = BERT | {"num_hidden_layers": 3, "eos_token_id": 2, "bos_token_id": 1}
STAGES = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": 64}
STAGES |= {"patch_size": 4, "num_labels": 3}
ROPE3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
IMAGE = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 56, "vision_end_token_id": 57}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
QWEN_TOWER |= {"temporal_patch_size": 2, "in_channels": 3}
QWEN2_VL = {"text_config": TEXT | ROPE3, "vision_config": QWEN_TOWER | {"embed_dim": 32, "mlp_ratio": 2}, **IMAGE}
QWEN3_VL = {
    "text_config": TEXT | HEADS | ROPE3,
    "vision_config": QWEN_TOWER
    | {
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    **IMAGE,
}
SAM = {
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32}
    | {"patch_size": 8, "mlp_dim": 48, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]},
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
}


class Kind(NamedTuple):
    """A kind of model.

    Args:
        config: class of the configuration.
        model: class of the model.
        settings: of the configuration.
        batch: what it reads: "tokens", "images", "sound", "spectrum", "captions" and so on (`batch_of`).
        example: whether its adapter needs the batch as `example_inputs`.
    """

    config: str
    model: str
    settings: dict[str, object]
    batch: str = "tokens"
    example: bool = False


MORE = {
    # decoders
    "phi": Kind("PhiConfig", "PhiForCausalLM", BERT),
    "opt": Kind("OPTConfig", "OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, **SIZED}),
    "opt_350m": Kind(
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, **SIZED},
    ),
    "opt_layerdrop": Kind(
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.1, **SIZED}
    ),
    "bloom": Kind(
        "BloomConfig", "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 4}
    ),
    "falcon": Kind("FalconConfig", "FalconForCausalLM", BERT | {"alibi": False}),
    "falcon_alibi": Kind("FalconConfig", "FalconForCausalLM", BERT | {"alibi": True}),
    "falcon_new": Kind(
        "FalconConfig", "FalconForCausalLM", BERT | {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "mpt": Kind(
        "MptConfig",
        "MptForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": BLOCKS,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 32,
        },
    ),
    "openai_gpt": Kind("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT),
    "ctrl": Kind("CTRLConfig", "CTRLLMHeadModel", GPT | {"dff": 48}),
    "gpt_neo": Kind(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 40}
        | {"attention_types": [[["global", "local"], 2]], "window_size": 3},
    ),
    "gptj": Kind("GPTJConfig", "GPTJForCausalLM", GPT | NO_DROPOUT | {"rotary_dim": 4}),
    "codegen": Kind("CodeGenConfig", "CodeGenForCausalLM", GPT | NO_DROPOUT | {"rotary_dim": 4}),
    "xglm": Kind(
        "XGLMConfig",
        "XGLMForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}
        | {"max_position_embeddings": 40},
    ),
    "biogpt": Kind("BioGptConfig", "BioGptForCausalLM", SIZED),
    "stablelm": Kind("StableLmConfig", "StableLmForCausalLM", TEXT),
    "starcoder2": Kind("Starcoder2Config", "Starcoder2ForCausalLM", TEXT),
    "cohere": Kind("CohereConfig", "CohereForCausalLM", TEXT),
    "olmo2": Kind("Olmo2Config", "Olmo2ForCausalLM", TEXT),
    "granite": Kind("GraniteConfig", "GraniteForCausalLM", TEXT | {"embedding_multiplier": 3.0}),
    "glm4": Kind("Glm4Config", "Glm4ForCausalLM", TEXT | HEADS),
    "smollm3": Kind("SmolLM3Config", "SmolLM3ForCausalLM", TEXT),
    "gemma": Kind("GemmaConfig", "GemmaForCausalLM", TEXT | HEADS),
    "nemotron": Kind("NemotronConfig", "NemotronForCausalLM", TEXT),
    "gemma3n": Kind(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        TEXT
        | HEADS
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
        | {"num_kv_shared_layers": 0, "intermediate_size": [48] * BLOCKS},
    ),
    "llama_classes": Kind("LlamaConfig", "LlamaForSequenceClassification", TEXT | {"num_labels": 3}, "sentences"),
    # experts, state spaces, linear attention
    "olmoe": Kind("OlmoeConfig", "OlmoeForCausalLM", TEXT | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe": Kind("GraniteMoeConfig", "GraniteMoeForCausalLM", TEXT | {"num_local_experts": 4}),
    "qwen2_moe": Kind(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24}
    ),
    "qwen3_next": Kind(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        MOE
        | HEADS
        | {"num_experts": 4, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2}
        | {
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 2,
        },
    ),
    "mamba": Kind("MambaConfig", "MambaForCausalLM", STATES | {"time_step_rank": 4}),
    "falcon_mamba": Kind("FalconMambaConfig", "FalconMambaForCausalLM", STATES | {"time_step_rank": 4}),
    "mamba2": Kind("Mamba2Config", "Mamba2ForCausalLM", MAMBA2),
    "jamba": Kind(
        "JambaConfig",
        "JambaForCausalLM",
        TEXT
        | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    # encoders
    "roberta": Kind("RobertaConfig", "RobertaForMaskedLM", SIZED),
    "roberta_classes": Kind(
        "RobertaConfig", "RobertaForSequenceClassification", SIZED | {"num_labels": 3}, "sentences"
    ),
    "bert_answers": Kind("BertConfig", "BertForQuestionAnswering", BERT),
    "electra": Kind("ElectraConfig", "ElectraForMaskedLM", BERT | {"embedding_size": 16}),
    "albert": Kind("AlbertConfig", "AlbertForMaskedLM", BERT | {"embedding_size": 16}),
    "distilbert": Kind(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": BLOCKS, "n_heads": 4},
    ),
    "mpnet": Kind("MPNetConfig", "MPNetForMaskedLM", SIZED),
    "deberta_v2": Kind(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "roformer": Kind("RoFormerConfig", "RoFormerForMaskedLM", BERT | {"embedding_size": 16}),
    "esm": Kind("EsmConfig", "EsmForMaskedLM", SIZED | {"mask_token_id": 5, "position_embedding_type": "rotary"}),
    "xlm": Kind(
        "XLMConfig", "XLMWithLMHeadModel", {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 4, "n_heads": 4}
    ),
    "xlnet": Kind(
        "XLNetConfig",
        "XLNetLMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48},
    ),
    "funnel": Kind(
        "FunnelConfig",
        "FunnelForMaskedLM",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1, 1]},
    ),
    "layoutlm": Kind("LayoutLMConfig", "LayoutLMForMaskedLM", BERT),
    # encoders with a decoder, and such of which only the encoder runs
    "t5": Kind("T5Config", "T5ForConditionalGeneration", T5, "pairs"),
    "t5_tokens": Kind("T5Config", "T5ForTokenClassification", T5 | {"num_labels": VOCABULARY}),
    "t5_encoder": Kind("T5Config", "T5EncoderModel", T5),
    "bart": Kind("BartConfig", "BartForConditionalGeneration", BART, "pairs"),
    "bart_classes": Kind("BartConfig", "BartForSequenceClassification", BART | {"num_labels": 3}, "sentences"),
    "whisper": Kind("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, "spectrum"),
    # vision
    "vit_mae": Kind(
        "ViTMAEConfig",
        "ViTMAEForPreTraining",
        TOWER
        | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
        | {"decoder_intermediate_size": 24},
        "pictures",
    ),
    "beit": Kind("BeitConfig", "BeitForImageClassification", VISION, "images"),
    "deit": Kind("DeiTConfig", "DeiTForImageClassification", VISION, "images"),
    "swinv2": Kind("Swinv2Config", "Swinv2ForImageClassification", STAGES, "images"),
    "segformer": Kind(
        "SegformerConfig",
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "num_labels": 3}
        | {"decoder_hidden_size": 16, "image_size": 64},
        "images",
    ),
    "mobilenet_v2": Kind(
        "MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 3}, "images"
    ),
    "regnet": Kind(
        "RegNetConfig",
        "RegNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 2, 1],
            "groups_width": 8,
            "num_labels": 3,
        },
        "images",
    ),
    "poolformer": Kind(
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_labels": 3},
        "images",
    ),
    "sam": Kind("SamConfig", "SamModel", SAM, "pictures"),
    # audio
    "wav2vec2": Kind(
        "Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH | {"mask_time_prob": 0.0, "layerdrop": 0.0}, "sound", True
    ),
    "wav2vec2_layerdrop": Kind("Wav2Vec2Config", "Wav2Vec2ForCTC", SPEECH | {"mask_time_prob": 0.0}, "sound", True),
    "hubert": Kind("HubertConfig", "HubertForCTC", SPEECH | {"mask_time_prob": 0.0, "layerdrop": 0.0}, "sound", True),
    "whisper_classes": Kind("WhisperConfig", "WhisperForAudioClassification", WHISPER, "spectrum", True),
    "ast": Kind(
        "ASTConfig",
        "ASTForAudioClassification",
        {key: VISION[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size", "num_labels")}
        | {
            "num_hidden_layers": 4,
            "patch_size": 4,
            "max_length": 16,
            "num_mel_bins": 8,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        "values",
        True,
    ),
    # several media
    "clip": Kind(
        "CLIPConfig",
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": TOWER, "projection_dim": 16},
        "captions",
        True,
    ),
    "clip_tower": Kind("CLIPVisionConfig", "CLIPVisionModel", TOWER, "pictures"),
    "siglip_tower": Kind("SiglipVisionConfig", "SiglipVisionModel", TOWER, "pictures"),
    "llava": Kind(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP_TOWER, "image_token_index": 60},
        "illustrated",
        True,
    ),
    "qwen2_vl": Kind("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", QWEN2_VL),
    "qwen2_vl_images": Kind("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", QWEN2_VL, "patches", True),
    "qwen3_vl": Kind("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", QWEN3_VL),
    "qwen3_vl_images": Kind("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", QWEN3_VL, "patches", True),
}
KINDS = {
    name: Kind(*given, "images" if "image" in given[1].lower() else "tokens") for name, given in models.KINDS.items()
} | MORE


def config_of(name: str):
    kind = KINDS[name]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} if "vocab_size" in kind.settings else {}
    return getattr(transformers, kind.config)(**(ends | kind.settings), architectures=[kind.model])


def batch_of(name: str, model) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Inputs, and labels where the model has a loss for them."""
    torch.manual_seed(9)
    kind = KINDS[name].batch
    tokens = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    size = getattr(model.config, "image_size", 64)
    classes = torch.tensor([1, 0])
    if kind == "tokens":
        return {"input_ids": tokens, "attention_mask": mask}, tokens
    if kind == "sentences":
        return {"input_ids": tokens * mask, "attention_mask": mask}, classes
    if kind == "pairs":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}, tokens[:, :5]
    if kind in ("images", "pictures"):
        size = size if isinstance(size, int) else 64
        return {"pixel_values": torch.randn(2, 3, size, size)}, classes if kind == "images" else None
    if kind == "captions":
        return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32)}, None
    if kind == "illustrated":
        tokens[:, 1:5] = 60
        return {"input_ids": tokens, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 32, 32)}, tokens
    if kind == "patches":
        tokens[:, 1], tokens[:, 2:6], tokens[:, 6] = 56, 58, 57
        inputs = {"pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        return inputs | {
            "input_ids": tokens,
            "attention_mask": mask,
            "mm_token_type_ids": (tokens == 58).long(),
        }, tokens
    if kind == "sound":
        return {"input_values": torch.randn(2, 800)}, None
    if kind == "values":
        return {"input_values": torch.randn(2, 16, 8)}, classes
    assert kind == "spectrum"
    return {"input_features": torch.randn(2, 8, 32)}, classes
