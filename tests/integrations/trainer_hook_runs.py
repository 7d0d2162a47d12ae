"""What users hang on a Trainer, stock and ours, on pooled ranks."""

from __future__ import annotations

import torch
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


def logging_itself(base):
    class Logging(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.log({"mine": 1.0})
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return Logging


def regularizing(base):
    class Regularizing(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss + 0.1 * model.lm_head.weight.square().mean()

    return Regularizing


def named(rows):
    """A batch with what only a loss reads: a name and a weight for each row."""
    batch = pad(rows)
    lengths = batch["attention_mask"].sum(1)
    return batch | {"weights": lengths / 8, "names": [f"of {length}" for length in lengths.tolist()]}


def weighing(base):
    class Weighing(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, weights, names = (inputs.pop(name) for name in ("labels", "weights", "names"))
            outputs = model(**inputs)
            logs = outputs.logits[:, :-1].float().log_softmax(-1)
            safe = labels[:, 1:].clamp(min=0).unsqueeze(-1)
            rows = -(logs.gather(-1, safe).squeeze(-1) * (labels[:, 1:] != -100)).sum(1)
            scales = torch.tensor([1.0 / int(name.removeprefix("of ")) for name in names])
            loss = (rows * weights * scales).mean()
            return (loss, outputs) if return_outputs else loss

    return Weighing


class Reclips(transformers.TrainerCallback):
    """Clips the second step by another norm."""

    def on_step_begin(self, args, state, control, **kwargs):
        args.max_grad_norm = (1.0, 0.01)[state.global_step % 2]


def make(folder, stock=False, change=None, given=None, **options):
    kind = trainer_class(stock)
    if not stock:
        options |= {"schedule": "zb1p", "num_chunks": 4}
    plain = {
        "output_dir": folder, "max_steps": 2, "logging_steps": 1, "remove_unused_columns": False,
        "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "save_strategy": "no", "optim": "adamw_torch",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**plain | (given or {}))
    options = {"model": make_model(), "data_collator": pad} | options
    return (change(kind) if change else kind)(args=arguments, train_dataset=Sentences(24), **options)


def told(call):
    from dualpipe_engine.errors import DualPipeError

    try:
        call()
    except DualPipeError as error:
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
    size = trainer.model.num_parameters(only_trainable=True)
    found = {"size": size, "before": before, "rates": watching.rates, "flops": flops, "gradients": watching.gradients}
    if stock:
        return found
    found["after"] = [told(lambda: trainer.model(**batch)), told(lambda: trainer.model.generate(batch["input_ids"]))]
    found["part"] = [told(trainer.model.state_dict), told(lambda: trainer.model.save_pretrained(folder))]
    found["again"] = told(make(folder, model=trainer.model).train)
    trainer._engine.destroy()
    return found


def clipped(folder, stock=False):
    """Losses and norms of plain SGD that clips each step otherwise, and of a run that goes on with another norm."""
    found, given = [], {"optim": "sgd", "learning_rate": 1.0, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    for how, start in (
        ({"callbacks": [Reclips()]}, None),
        ({"given": {"max_grad_norm": 0.02}}, f"{folder}/checkpoint-2"),
    ):
        trainer = make(folder, stock, **how | {"given": given | how.get("given", {})})
        trainer.train(resume_from_checkpoint=start)
        found += [row[name] for row in trainer.state.log_history for name in ("loss", "grad_norm") if "loss" in row]
        found.append(trainer.evaluate(Sentences(6, seed=2))["eval_loss"])
        if not stock:
            trainer._engine.destroy()
    return found


def with_a_part(folder):
    """A Trainer whose optimizer leaves out what trains."""
    model = make_model()
    return make(folder, model=model, optimizers=(torch.optim.SGD(model.lm_head.parameters(), lr=0.1), None))


def refused(folder):
    """What overridden methods and callbacks are answered with."""
    found = [
        told(make(folder, change=calling_itself).train),
        told(make(folder, change=stepping_itself).train),
        told(make(folder, change=logging_itself).train),
        told(make(folder, change=regularizing).train),
        told(lambda: make(folder, callbacks=[Early()])),
        told(with_a_part(folder).train),
        told(lambda: make(folder).train(resume_from_checkpoint=f"{folder}/checkpoint-9")),
        told(lambda: make(folder).train(resume_from_checkpoint=folder)),
    ]
    trainer = make(folder)
    return [*found, told(lambda: trainer.add_callback(Early)), trainer.add_callback(Watching)]


def weighed(folder, stock=False):
    """Losses of two steps, of a loss with weights of rows, and that of an evaluation."""
    trainer = make(folder, stock, change=weighing, data_collator=named, eval_dataset=Sentences(6, seed=2))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    losses.append(trainer.evaluate()["eval_loss"])
    if not stock:
        trainer._engine.destroy()
    return losses
