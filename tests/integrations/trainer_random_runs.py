"""Runs of the Trainer, stock and ours, whose batches or models draw random numbers."""

from __future__ import annotations

import random

import numpy
import torch
import transformers
from trainer_kinds import IGNORED, small
from trainer_runs import Sentences, pad
from trainer_start import trainer_class


class Masking:
    """A collator that masks tokens, at random by three generators or each third, and keeps what it has made."""

    def __init__(self, drawn):
        self.made, self.drawn = [], drawn

    def __call__(self, rows):
        batch = pad(rows)
        hidden = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"]) % 3 == 0
        if self.drawn:
            hidden = torch.rand(hidden.shape) < 0.3
            hidden[numpy.random.randint(len(rows)), random.randrange(hidden.shape[1])] = True
        batch["labels"] = batch["labels"].masked_fill(~hidden, IGNORED)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 0)
        self.made.append(batch["input_ids"])
        return batch


class Metrics:
    """`compute_metrics` that draws random numbers, on the rank that runs it."""

    def __call__(self, seen):
        torch.rand(3), numpy.random.rand(2), random.random()
        return {"rows": len(seen.predictions)}


def masked(folder, stock=False, dropout=0.0, drawn=True, resume=None, workers=0, **options):
    """Losses of six steps with an evaluation in between, the batches, and the evaluation."""
    transformers.set_seed(0)
    kind = trainer_class(stock)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=6, per_device_train_batch_size=8, per_device_eval_batch_size=8, report_to=[],
        learning_rate=3e-3, logging_steps=1, use_cpu=True, disable_tqdm=True, optim="adamw_torch", seed=3,
        dataloader_pin_memory=False, save_steps=4, eval_strategy="steps", eval_steps=2, dataloader_num_workers=workers,
    )  # fmt: skip
    model, collate = small("BertForMaskedLM"), Masking(drawn)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = dropout
    trainer = kind(
        model=model, args=arguments, train_dataset=Sentences(40), eval_dataset=Sentences(12, seed=2),
        data_collator=collate, compute_metrics=Metrics(), **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    logs = trainer.state.log_history
    return {
        "losses": {row["step"]: row["loss"] for row in logs if "loss" in row},
        "eval": {row["step"]: row["eval_loss"] for row in logs if "eval_loss" in row},
        "batches": collate.made,
    }
