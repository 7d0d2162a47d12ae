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


def config_of(name):
    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=32, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, bos_token_id=0, eos_token_id=0, architectures=["GPT2LMHeadModel"],
        )  # fmt: skip
    if name == "llama":
        return transformers.LlamaConfig(**TEXT, architectures=["LlamaForCausalLM"])
    raise ValueError(name)


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


def train(name, schedule, ranks, micros, steps=3, folder=None):
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
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "pipeline": {"schedule": schedule},
    }
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    data = stream()
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    return {"losses": losses, "weights": gather_state_dict(engine)}


def train_whole(name, micros, steps=3):
    """The oracle: the whole model in one process."""
    model = model_of(config_of(name))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data, losses = stream(), []
    for _ in range(steps):
        total = 0.0
        for _ in range(micros):
            inputs, labels = next(data)
            loss = model(**inputs, labels=labels).loss / micros
            loss.backward()
            total += float(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {"losses": losses, "weights": {name: value.detach() for name, value in model.state_dict().items()}}
