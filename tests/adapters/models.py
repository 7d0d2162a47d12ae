"""Tiny models, and training runs of them that the tests start on pooled ranks."""

from __future__ import annotations

import torch
import transformers
from transformers.utils import logging

logging.set_verbosity_error()

VOCABULARY, BLOCKS = 61, 5
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EPS = 1e-5  #: of Adam: a gradient that is zero but for rounding, as that of a bias of keys, takes no whole step


MOE = TEXT | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.1}
VISION = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8, "num_labels": 3}
BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}

#: name -> (configuration class, model class, settings)
KINDS = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 32, **NO_DROPOUT},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", TEXT),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", TEXT | {"sliding_window": 3}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", TEXT),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", TEXT | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", TEXT | {"head_dim": 8, "sliding_window": 3}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", TEXT | {"head_dim": 8, "sliding_window": 3}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", TEXT),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", BERT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MOE | {"num_experts": 4, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        MOE
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
        | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 3},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "bert_classes": ("BertConfig", "BertForTokenClassification", BERT | {"num_labels": VOCABULARY}),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", BERT),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", VISION),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "layer_type": "basic"}
        | {"num_labels": 3},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "image_size": 64, "num_labels": 3},
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": 64}
        | {"patch_size": 4, "num_labels": 3},
    ),
}
NAMES = sorted(KINDS)


ROUTERS = "+routers"  #: ends the name of a model that trains with its routers' auxiliary loss


def config_of(name):
    kind, model, settings = KINDS[name.removesuffix(ROUTERS)]
    ends = {"bos_token_id": 1, "eos_token_id": 2} if "vocab_size" in settings else {}
    if name.endswith(ROUTERS):
        settings = settings | {"output_router_logits": True}
    return getattr(transformers, kind)(**settings, **ends, architectures=[model])


def model_of(config):
    torch.manual_seed(5)
    return getattr(transformers, config.architectures[0])(config)


def stream(seed=3):
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(1, VOCABULARY, (2, 7), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, -2:] = 0
        yield {"input_ids": tokens, "attention_mask": mask}, tokens


def train(name, schedule, ranks, micros, steps=2, folder=None, save=None):
    """Train under a schedule; the losses, and the gathered weights on rank 0."""
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine
    from dualpipe_engine.adapters import gather_state_dict, get_model_adapter

    config = config_of(name)
    adapter = get_model_adapter(model_of(config)) if folder is None else get_model_adapter(folder=folder)
    module = PipelineModule(adapter.to_layer_specs(), num_stages=ranks, loss_fn=adapter.loss_fn)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "eps": EPS, "adam_w_mode": False, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "pipeline": {"schedule": schedule},
    }
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    data = stream()
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    if save is not None:
        engine.save_checkpoint(save)
    found = {"losses": losses, "weights": gather_state_dict(engine)}
    engine.destroy()
    return found


def train_whole(name, micros, steps=2):
    """The oracle: the whole model in one process."""
    model = model_of(config_of(name))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=EPS)
    data, losses = stream(), []
    for _ in range(steps):
        total = 0.0
        for _ in range(micros):
            inputs, labels = next(data)
            loss = model(**inputs, labels=labels).loss / micros
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "weights": {name: value.detach() for name, value in model.state_dict().items()}}
