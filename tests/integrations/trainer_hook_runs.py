"""What users hang on a Trainer, stock and ours, on pooled ranks."""

from __future__ import annotations

import transformers
from trainer_runs import Sentences, make_model, pad
from trainer_start import trainer_class


class Early(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        raise AssertionError


class Watching(transformers.TrainerCallback):
    """The remedies for what `Early` might want: gradients of micro-batches, and the step's other numbers."""

    def __init__(self):
        self.gradients, self.rates = 0, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.lm_head.weight.register_hook(self.count)

    def count(self, gradient):
        self.gradients += 1

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.rates.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))


def calling_itself(base):
    class Calling(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.model(**inputs).loss

    return Calling


def stepping_itself(base):
    class Stepping(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return model(**inputs).loss

    return Stepping


def make(folder, stock=False, change=None, **options):
    kind = trainer_class(stock)
    if not stock:
        options |= {"schedule": "zb1p", "num_chunks": 4}
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", optim="adamw_torch",
    )  # fmt: skip
    return (change(kind) if change else kind)(
        model=make_model(), args=arguments, train_dataset=Sentences(24), data_collator=pad, **options
    )


def told(call):
    from dualpipe_engine.errors import ConfigError

    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


def watched(folder, stock=False):
    """What a callback sees of two steps, what they count, and what calls of the model say before and after."""
    watching = Watching()
    trainer = make(folder, stock, callbacks=[watching])
    batch = pad([Sentences(1)[0]])
    before = float(trainer.model(**batch).loss)
    trainer.train()
    flops = trainer.state.log_history[-1]["total_flos"]
    found = {"before": before, "rates": watching.rates, "flops": flops, "gradients": watching.gradients}
    if stock:
        return found
    found["after"] = [told(lambda: trainer.model(**batch)), told(lambda: trainer.model.generate(batch["input_ids"]))]
    trainer._engine.destroy()
    return found


def refused(folder):
    """What overridden methods and callbacks are answered with."""
    found = [
        told(make(folder, change=calling_itself).train),
        told(make(folder, change=stepping_itself).train),
        told(lambda: make(folder, callbacks=[Early()])),
    ]
    trainer = make(folder)
    return [*found, told(lambda: trainer.add_callback(Early)), trainer.add_callback(Watching)]
