"""Evaluation and prediction, stock and ours, on pooled ranks."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers
from torch.distributed import distributed_c10d
from trainer_kinds import Rows, of_rows, small
from trainer_runs import Sentences, accuracy, make_model, pad
from trainer_start import trainer_class

CLASSES = {"num_labels": 3, "pad_token_id": 0}


def make_trainer(folder, stock, model, change=lambda base: base, *, args=None, **options):
    kind = trainer_class(stock)
    if not stock:
        options["num_chunks"] = 3
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_eval_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **(args or {}),
    )  # fmt: skip
    return change(kind)(model=model, args=arguments, **options)


def two_outputs(base):
    """A subclass whose loss comes with outputs of its own."""

    class Two(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
            outputs = {"loss": loss, "hidden": logits, "first": logits[:, 0], "sure": logits.softmax(-1) > 0.4}
            return (loss, outputs) if return_outputs else loss

    return Two


def outputs(folder, stock=False):
    """Predictions of a subclass with several outputs, with and without what shrinks them, and without labels."""
    model = small("LlamaForSequenceClassification", **CLASSES)
    trainer = make_trainer(folder, stock, model, two_outputs, data_collator=of_rows)
    data = Rows(lambda tokens: tokens[0] % 3, count=19)
    found = [trainer.predict(data, ignore_keys=["hidden"])]
    trainer.preprocess_logits_for_metrics = lambda logits, labels: (logits[0].argmax(-1), labels)
    trainer.compute_metrics = lambda seen: {"rows": len(seen.predictions[0]), "sum": int(seen.predictions[1].sum())}
    found += [trainer.predict(data), trainer.evaluate(data)]
    trainer.preprocess_logits_for_metrics = trainer.compute_metrics = None
    found += [trainer.predict(Rows(None, count=9)), trainer.evaluate(Rows(None, count=9))]
    if not stock:
        trainer._engine.destroy()
    return [tuple(row)[:2] if isinstance(row, tuple) else row for row in found]


@contextmanager
def pickles():
    """Sizes in bytes of what this rank pickles for others."""
    sizes, convert = [], distributed_c10d._object_to_tensor

    def measured(*args, **kwargs):
        found = convert(*args, **kwargs)
        sizes.append(int(found[1]))
        return found

    with patch.object(distributed_c10d, "_object_to_tensor", measured):
        yield sizes


def watched(folder):
    """An evaluation with metrics: where logits are, how many at once, and how much is pickled."""
    living, most = [], []

    def watching(base):
        class Watching(base):
            def evaluation_loop(self, *args, **kwargs):
                self.gather_before = self.accelerator.pad_across_processes
                return super().evaluation_loop(*args, **kwargs)

        return Watching

    def shrink(logits, labels):
        living.append(weakref.ref(logits))
        most.append(sum(each() is not None for each in living))
        return logits

    trainer = make_trainer(
        folder, False, make_model(), watching, data_collator=pad, eval_dataset=Sentences(48, seed=2),
        compute_metrics=accuracy, preprocess_logits_for_metrics=shrink, args={"eval_accumulation_steps": 1},
    )  # fmt: skip
    trainer.evaluate()
    most.clear()
    living.clear()
    with pickles() as sizes:
        metrics = trainer.evaluate()
    assert trainer.accelerator.pad_across_processes == trainer.gather_before
    first = trainer.prediction_step(trainer.model_wrapped, pad([Sentences(3)[0]] * 3), False)
    trainer._engine.destroy()
    return {"metrics": metrics, "most": most, "pickled": max(sizes), "alone": first[1].shape}


def failing(folder):
    def broken(seen):
        raise KeyError("no such metric")

    trainer = make_trainer(
        folder, False, make_model(), data_collator=pad, eval_dataset=Sentences(8), compute_metrics=broken
    )
    trainer.evaluate()
