"""Trainers of models with experts, stock and ours, on pooled ranks."""

from __future__ import annotations

import torch
import transformers
from trainer_runs import VOCABULARY, Sentences, pad
from trainer_start import trainer_class

ROWS, STEPS, MICROS, WEIGHT = 16, 3, 4, 0.5


def make_model(weight=WEIGHT):
    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, router_aux_loss_coef=weight, output_router_logits=True,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(17)
    for part in model.modules():  # that tell experts apart
        if type(part).__name__.endswith("Router"):
            part.weight.data = torch.randn(part.weight.shape, generator=generator) * 0.5
    return model


class Data(Sentences):
    """Rows of one length, so that it does not matter with which others a row is padded."""

    def __init__(self, count, seed=1):
        super().__init__(count, seed=seed, ragged=False)


def train(folder, stock=False, rows=ROWS, **options):
    """Losses, norms and loads of each step; weights and the loss of an evaluation after them.

    The stock Trainer reads a micro-batch at a time, and adds up their auxiliary losses where a mean is meant.
    """
    kind, sizes = trainer_class(stock), {}
    transformers.set_seed(0)
    if stock:
        sizes["gradient_accumulation_steps"] = MICROS
        rows //= MICROS
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=rows, per_device_eval_batch_size=ROWS,
        learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, optim="adamw_torch",
        dataloader_pin_memory=False, save_strategy="no", adam_epsilon=1e-5, weight_decay=0.1, **sizes,
    )  # fmt: skip
    trainer = kind(
        model=make_model(WEIGHT / MICROS if stock else WEIGHT), args=arguments, train_dataset=Data(3 * ROWS),
        data_collator=pad, **options,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder + "/final")
    logs = [row for row in trainer.state.log_history if "loss" in row]
    found = {name: [row[key] for row in logs] for name, key in (("losses", "loss"), ("norms", "grad_norm"))}
    found["loads"] = [{key: row[key] for key in row if key.startswith("expert_load/")} for row in logs]
    if not stock:
        seen = trainer.predict(Data(ROWS, seed=2))
        found |= {"evaluated": seen.metrics["test_loss"], "logits": torch.as_tensor(seen.predictions)}
        trainer._engine.destroy()
    return found
