"""Runs of the Trainer, stock and ours, on pooled ranks."""

from __future__ import annotations

import torch
import transformers
from torch.utils.data import Dataset
from trainer_start import trainer_class

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


def evened(batch):
    """A batch with one more place in each row where there is an odd number."""
    fill, odd = {"labels": -100}, (0, batch["input_ids"].shape[1] % 2)
    return {name: torch.nn.functional.pad(each, odd, value=fill.get(name, 0)) for name, each in batch.items()}


def pad_even(rows):
    return evened(pad(rows))


def make_model(lora=False, **changes):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **changes,
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


def train(folder, stock=False, resume=None, lora=False, collate=pad, **options):
    """Train 8 steps, more than an epoch, with evaluation and a checkpoint after 4; what a user sees of it."""
    transformers.set_seed(0)
    kind = trainer_class(stock)
    seen = Seen()
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=8, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=3e-3, warmup_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=4, save_steps=4,
        report_to=[], use_cpu=True, weight_decay=0.1, disable_tqdm=True, optim="adamw_torch",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = kind(
        model=make_model(lora), args=arguments, train_dataset=Sentences(44), eval_dataset=Sentences(12, seed=2),
        data_collator=collate, compute_metrics=accuracy, callbacks=[seen], **options,
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


class Added:
    """`compute_metrics` batch by batch, which looks at inputs and losses too."""

    def __init__(self):
        self.rows = 0

    def __call__(self, seen, compute_result):
        assert len(seen.inputs["input_ids"]) == len(seen.predictions) and len(seen.losses)
        self.rows += len(seen.predictions)
        if not compute_result:
            return {}
        found, self.rows = {"rows": self.rows}, 0
        return found


def many_arguments(folder, stock=False):
    """A run with arguments of data, recomputation and evaluation that others leave alone."""
    kind, options = trainer_class(stock), {} if stock else {"num_chunks": 4}
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=8, per_device_eval_batch_size=8, report_to=[],
        learning_rate=3e-3, logging_steps=2, logging_first_step=True, eval_strategy="steps", eval_steps=2,
        eval_on_start=True, batch_eval_metrics=True, include_for_metrics=["inputs", "loss"], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", train_sampling_strategy="group_by_length",
        dataloader_drop_last=True, activation_checkpointing=True, data_seed=3, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4}, optim="sgd", optim_args="momentum=0.5", label_names=["labels"],
    )  # fmt: skip
    model = make_model()
    trainer = kind(
        model=model, args=arguments, train_dataset=Sentences(44), eval_dataset=Sentences(12, seed=2),
        data_collator=pad, compute_metrics=Added(), **options,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    evaluated = [row for row in logs if "eval_loss" in row]
    return {
        "losses": [row["loss"] for row in logs if "loss" in row],
        "steps": [row["step"] for row in logs if "loss" in row],
        "eval": [row["eval_loss"] for row in evaluated],
        "given": {"eval_rows": evaluated[-1]["eval_rows"], "rates": [r["learning_rate"] for r in logs if "loss" in r]},
        "recomputed": any(getattr(part, "gradient_checkpointing", False) for part in model.modules()),
    }


def in_bf16(folder, dtype=torch.float32, **options):
    """Two steps whose changes are smaller than what bf16 tells apart."""
    kind = trainer_class(stock=False)
    transformers.set_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-5, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", bf16=True, optim="adamw_torch",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = kind(
        model=make_model().to(dtype), args=arguments, train_dataset=Sentences(24), data_collator=pad, **options
    )
    trainer.train()
    trainer.save_model(folder)
    dtypes = {param.dtype for param in trainer._engine.module.parameters()}
    trainer._engine.destroy()
    return dtypes
