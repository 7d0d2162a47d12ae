"""Trainers of many kinds, stock and ours: heads, losses, optimizers. On pooled ranks, or as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers
from trainer_runs import VOCABULARY, Sentences, evened, make_model, pad
from trainer_start import trainer_class

from dualpipe_engine.errors import ConfigError

STEPS, IGNORED = 4, -100


def small(kind, **config):
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    if kind.startswith("Bert"):
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind.startswith(("Bert", "Llama")):
        sizes["vocab_size"] = VOCABULARY
    name = kind.partition("For")[0]
    made = getattr(transformers, f"{name}Config")(**sizes, **config)
    return getattr(transformers, kind)(made)


def resnet():
    torch.manual_seed(5)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))


class Rows(torch.utils.data.Dataset):
    """Samples of a kind of labels; `tokens` are ragged."""

    def __init__(self, labels, count=24, seed=1):
        self.labels, self.rows = labels, Sentences(count, seed=seed).rows
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = {"input_ids": self.rows[index]}
        if self.labels is not None:
            row["labels"] = self.labels(self.rows[index])
        return row


def of_rows(rows):
    """A batch with one label a row, or none."""
    batch = pad(rows)
    del batch["labels"]
    if "labels" in rows[0]:
        batch["labels"] = torch.stack([row["labels"] for row in rows])
    return batch


def of_tokens(rows):
    batch = pad(rows)
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORED)
    return batch | {"labels": labels}


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(index % 3)}


def with_pictures():
    """LLaVA, four of whose tokens stand for a picture."""
    torch.manual_seed(5)
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"use_cache": False}  # it would be among the predictions of a Trainer, as hidden states of the picture are
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=text | {"model_type": "llama", "num_attention_heads": 4},
        vision_config=tower | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16},
        image_token_index=60,
        keys_to_ignore_at_inference=["image_outputs"],
    )
    return transformers.LlavaForConditionalGeneration(config)


def illustrated(rows):
    batch = pad(rows)
    batch["input_ids"][:, 1:5] = 60
    batch["labels"][:, 1:5] = IGNORED
    size = (len(rows), 3, 32, 32)
    return batch | {"pixel_values": torch.randn(size, generator=torch.Generator().manual_seed(len(rows)))}


def half_masked(tokens):
    return torch.where(torch.arange(len(tokens)) % 2 == 0, tokens, IGNORED)


def mean_over_tokens(outputs, labels, num_items_in_batch=None):
    """Reads `logits`, and does not look at the number of items."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def sum_over_tokens(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def mean_over_rows(outputs, labels, num_items_in_batch=None):
    """Of means over the tokens of a row."""
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each.sum(-1) / labels.ne(IGNORED).sum(-1)).mean()


def focal(base):
    """A subclass with a loss of its own, as users write them."""

    class Focal(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            each = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")
            loss = ((1 - torch.exp(-each)) ** 2 * each).mean()
            return (loss, outputs) if return_outputs else loss

    return Focal


def own_optimizer(base):
    class Own(base):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                matrices = [param for param in self.model.parameters() if param.dim() > 1]
                others = [param for param in self.model.parameters() if param.dim() < 2]
                groups = [{"params": matrices}, {"params": others, "lr": 1e-2, "weight_decay": 0.0}]
                self.optimizer = torch.optim.RMSprop(groups, lr=1e-3)
            return self.optimizer

    return Own


def example_of(collate):
    batch = collate([Sentences(2)[0], Sentences(2)[1]])
    del batch["labels"]
    return batch


def with_schedule(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))}


def token_rows(**options):
    return {"data": lambda: Sentences(24), "collate": pad, **options}


def label_rows(labels=lambda tokens: tokens[0] % 3, **options):
    return {"data": lambda: Rows(labels), "collate": of_rows, **options}


#: name -> model, data and what else is given; see `run_kind`
KINDS = {
    "sequence classes": {"model": lambda: small("LlamaForSequenceClassification", num_labels=3, pad_token_id=0)}
    | label_rows(),
    "masked": {"model": lambda: small("BertForMaskedLM"), "data": lambda: Rows(half_masked), "collate": of_tokens},
    "token classes": {
        "model": lambda: small("BertForTokenClassification", num_labels=5),
        "data": lambda: Rows(lambda tokens: tokens % 5),
        "collate": of_tokens,
    },
    "images": {
        "model": lambda: small("ViTForImageClassification", image_size=16, patch_size=8, num_labels=3),
        "data": Pictures,
        "collate": None,
    },
    "causal": token_rows(model=make_model),
    "pictures": token_rows(model=with_pictures, ours=lambda: {"example_inputs": example_of(illustrated)})
    | {"collate": illustrated},
    "smoothed": token_rows(model=make_model, args={"label_smoothing_factor": 0.1}),
    "mean of tokens": token_rows(model=make_model, options=lambda model: {"compute_loss_func": mean_over_tokens}),
    "mean of rows": token_rows(model=make_model, options=lambda model: {"compute_loss_func": mean_over_rows}),
    "sum of tokens": token_rows(model=make_model, options=lambda model: {"compute_loss_func": sum_over_tokens}),
    "own loss": {"model": lambda: small("BertForSequenceClassification", num_labels=3), "subclass": focal}
    | label_rows(),
    "own optimizer and schedule": token_rows(model=make_model, options=with_schedule),
    "class of optimizer": token_rows(
        model=make_model,
        options=lambda model: {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 0.05})},
    ),
    "overridden optimizer": token_rows(model=make_model, subclass=own_optimizer),
    "several labels": {
        "model": lambda: small("BertForSequenceClassification", num_labels=4, problem_type="multi_label_classification")
    }
    | label_rows(lambda tokens: (tokens[:4] % 2).float()),
}

#: Those that a batch in parts would change.
KINDS_OF_WHOLE_BATCHES = {"statistics": {"model": resnet, "data": Pictures, "collate": None}}


def accuracy(seen):
    """Of classes, one or several a row or token."""
    logits, labels = seen
    right = (logits > 0) == (labels > 0.5) if logits.shape == labels.shape else logits.argmax(-1) == labels
    return {"accuracy": float(right[labels != IGNORED].mean()), "counted": int((labels != IGNORED).sum())}


def run_kind(name, folder, stock, steps=STEPS, even=False, **options):
    """Losses and norms of a few steps, loss and metrics of an evaluation, logits with and without labels; `even`: of
    rows of even lengths."""
    transformers.set_seed(0)
    given = (KINDS | KINDS_OF_WHOLE_BATCHES)[name]
    kind = trainer_class(stock)
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=3e-3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, optim="adamw_torch",
        dataloader_pin_memory=False, save_strategy="no", **given.get("args", {}),
    )  # fmt: skip
    model = given["model"]()
    more = given["options"](model) if "options" in given else {}
    if not stock and "ours" in given:
        more |= given["ours"]()
    trainer = given.get("subclass", lambda base: base)(kind)(
        model=model, args=arguments, train_dataset=given["data"](),
        data_collator=even_rows(given["collate"]) if even else given["collate"],
        compute_metrics=accuracy, **more, **options,
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    metrics = trainer.evaluate(given["data"]())
    seen = trainer.predict(given["data"]())
    found = {
        "losses": [row["loss"] for row in logs],
        "norms": [row["grad_norm"] for row in logs],
        "rates": [row["learning_rate"] for row in logs],
        "eval": metrics["eval_loss"],
        "metrics": [metrics["eval_accuracy"], metrics["eval_counted"]],
        "seen": [seen.metrics["test_loss"], seen.metrics["test_accuracy"]],
        "logits": torch.as_tensor(seen.predictions),
    }
    if even:
        trainer.data_collator = even_rows(given["collate"], labels=False)
        found["bare"] = torch.as_tensor(trainer.predict(given["data"]()).predictions)
    if given["collate"] is of_rows:
        found["bare"] = torch.as_tensor(trainer.predict(Rows(None)).predictions)
    if not stock:
        trainer._engine.destroy()
    return found


def even_rows(collate, labels=True):
    """`collate`, for rows of even lengths, with or without labels."""

    def collated(rows):
        batch = evened(collate(rows))
        return batch if labels else {name: each for name, each in batch.items() if name != "labels"}

    return collated


def shared(size):
    return {"sequence_parallel_size": size}


def refused(names, folder, **options):
    """Why each of them is."""
    found = {}
    for name in names:
        try:
            run_kind(name, folder, stock=False, **options)
        except ConfigError as error:
            found[name] = str(error)
    return found


def run_kinds(names, folder, stock=False, **options):
    return {name: run_kind(name, f"{folder}/{at}", stock, **options) for at, name in enumerate(names)}


#: Those whose loss is the model's own, of single tokens, so that replicas may share sequences.
OF_TOKENS = ("causal", "masked", "token classes", "own optimizer and schedule", "class of optimizer")
OF_TOKENS += ("overridden optimizer",)

if __name__ == "__main__":  # FOLDER STEPS [SIZE]: kinds in this process, or on all ranks of a launcher
    folder, steps, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ.get("RANK")
    more = {"stock": True} if rank is None else {"num_chunks": 4}
    names = KINDS
    if size := int((*sys.argv, "0")[3]):  # so many ranks share each sequence, of even lengths
        names = OF_TOKENS
        more |= {"even": True} | ({} if rank is None else {"num_stages": 2, "deepspeed_config": shared(size)})
    torch.save(run_kinds(list(names), str(folder), steps=steps, **more), folder / f"{rank or 0}.pt")
