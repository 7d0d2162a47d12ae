"""Runs of the Trainer, stock and ours, on pooled ranks."""

from __future__ import annotations

import torch
import transformers
from torch.utils.data import Dataset

VOCABULARY = 61


class Sentences(Dataset):
    """Token sequences of several lengths."""

    def __init__(self, count=48, seed=1, ragged=True):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(5, 10, (count,), generator=generator).tolist() if ragged else [8] * count
        self.rows = [
            (torch.randint(1, VOCABULARY, (n,), generator=generator) // 9 * 9 + 1) % VOCABULARY for n in lengths
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index]}


def pad(rows):
    """A batch of [rows, longest], with labels of -100 where a row has ended."""
    tokens = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def make_model(lora=False):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if lora:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
        with torch.no_grad():  # B starts as zeros: give both halves something to do
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.normal_(0, 0.05, generator=torch.Generator().manual_seed(9))
    return model


class Seen(transformers.TrainerCallback):
    def __init__(self):
        self.steps = self.saves = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def on_save(self, args, state, control, **kwargs):
        self.saves += 1


def accuracy(prediction):
    tokens = prediction.predictions.argmax(-1)[:, :-1]
    labels = prediction.label_ids[:, 1:]
    return {"accuracy": float((tokens == labels)[labels != -100].mean())}


def train(folder, stock=False, resume=None, lora=False, **options):
    """Train 8 steps, more than an epoch, with evaluation and a checkpoint after 4; what a user sees of it."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    transformers.set_seed(0)
    if stock:
        kind = transformers.Trainer
    else:
        from dualpipe_engine.compat import DualPipeTrainer as kind
    seen = Seen()
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=8, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=3e-3, warmup_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=4, save_steps=4,
        report_to=[], use_cpu=True, weight_decay=0.1, disable_tqdm=True, optim="adamw_torch",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = kind(
        model=make_model(lora), args=arguments, train_dataset=Sentences(44), eval_dataset=Sentences(12, seed=2),
        data_collator=pad, compute_metrics=accuracy, callbacks=[seen], **options,
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder + "/final")
    logs = trainer.state.log_history
    return {
        "steps": {row["step"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in logs if "loss" in row},
        "eval": {row["step"]: (row["eval_loss"], row["eval_accuracy"]) for row in logs if "eval_loss" in row},
        "train_loss": result.training_loss,
        "seen": (seen.steps, seen.saves),
    }


def short(folder):
    """The call of the README."""
    from dualpipe_engine.compat import DualPipeTrainer

    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in Sentences(24, ragged=False).rows]
    trainer = DualPipeTrainer(
        model=make_model(), args=arguments, train_dataset=data, num_chunks=8, enable_profiling=True
    )
    return trainer.train().global_step
