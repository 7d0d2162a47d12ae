"""Runs of TRL's trainers, stock and ours, on pooled ranks."""

from __future__ import annotations

import argparse
import json
import textwrap

import torch
import transformers


def paragraphs(count):
    """Text that is on every machine: of a module's documentation."""
    text = " ".join(f"{argparse.__doc__} {json.__doc__} {textwrap.TextWrapper.__doc__}".split()).split(". ")
    return [text[at % len(text)] + "." for at in range(count)]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"vocab_size": 320, "special_tokens": ["<pad>", "<end>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(paragraphs(40), trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def make_model(vocabulary):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def start(folder, steps, **options):
    """What is given to the configuration of any of TRL's trainers."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6,
        "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "save_strategy": "no", "bf16": False, "max_length": 24,
    } | options  # fmt: skip


def told(trainer):
    """Logs of a run without its times."""
    timed = ("runtime", "per_second", "train_loss", "total_flos")
    return [
        {name: value for name, value in row.items() if not any(each in name for each in timed)}
        for row in trainer.state.log_history
    ]


def trained(trainer, stock):
    trainer.train()
    trainer.evaluate()
    if not stock:
        trainer._engine.destroy()
    return told(trainer)


def sft(folder, stock=False, steps=4, config=None, rows=None, **options):
    import datasets
    import trl

    arguments = trl.SFTConfig(**start(folder, steps, **(config or {})))
    if stock:
        kind = trl.SFTTrainer
    else:
        from dualpipe_engine.integrations.trl import DualPipeSFTTrainer as kind
    tokenizer = make_tokenizer()
    rows = rows or {"text": paragraphs(30)}
    trainer = kind(
        model=make_model(len(tokenizer)), args=arguments, train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict({name: values[:8] for name, values in rows.items()}),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    return trained(trainer, stock)


def dpo(folder, stock=False, steps=4, config=None, **options):
    import datasets
    import trl

    arguments = trl.DPOConfig(**start(folder, steps, precompute_ref_log_probs=True) | (config or {}))
    if stock:
        kind = trl.DPOTrainer
    else:
        from dualpipe_engine.integrations.trl import DualPipeDPOTrainer as kind
    tokenizer = make_tokenizer()
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [f"Question {at}?" for at in range(20)],
            "chosen": [f" It is {at * at}, {'as ever' * (at % 3)}." for at in range(20)],
            "rejected": [f" No {'idea' * (at % 4)}" for at in range(20)],
        }
    )
    trainer = kind(
        model=make_model(len(tokenizer)), args=arguments, train_dataset=rows, eval_dataset=rows.select(range(7)),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    return trained(trainer, stock)
