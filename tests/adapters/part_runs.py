"""Runs of models of transformers whose replicas share sequences, started on pooled ranks."""

from __future__ import annotations

import inspect

import autoep_runs
import models
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

LENGTH, IGNORED = 8, -100
MICROS = 4


def stream(reader, kind="padded"):
    """Whole sequences of one group of replicas. Labels that count are spread unevenly, of each fourth micro-batch all
    in the first of four parts.

    Args:
        reader: number of the group.
        kind: "padded": with a mask; "packed": several documents in a row, by positions; "plain": neither.
    """
    generator = torch.Generator().manual_seed(50 + reader)
    number = 0
    while True:
        tokens = torch.randint(1, models.VOCABULARY, (2, LENGTH), generator=generator)
        labels = tokens.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
        labels[:, 1] = tokens[:, 1]
        inputs = {"input_ids": tokens}
        if kind == "padded":
            inputs["attention_mask"] = torch.ones_like(tokens)
            inputs["attention_mask"][0, -3:] = 0
            labels[0, -3:] = IGNORED
        elif kind == "packed":
            inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0]])
        if number % 4 == 1:
            labels[:, 2:] = IGNORED
        number += 1
        yield inputs, labels


def built(name, changes, loss="own"):
    """The whole model, and its loss of outputs and labels of the tokens themselves."""
    from dualpipe_engine.adapters import get_model_adapter

    config = autoep_runs.config_of(name, **(changes or {}))
    model = autoep_runs.skewed(models.model_of(config), name)
    if not hasattr(config, "num_experts_per_tok"):  # whose products know no float64
        model = model.double()
    adapter = get_model_adapter(model)
    return model, adapter, adapter.loss_fn if loss == "own" else precise


def precise(logits, labels):
    """In float64, of labels of the next tokens."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def settings(schedule, size, experts, zero=0, **pipeline):
    config = autoep_runs.settings(schedule, zero=zero, section={"autoep_size": experts}, **pipeline)
    if not experts:
        del config["expert_parallel"]
    return config | ({"sequence_parallel_size": size} if size > 1 else {})


def each(cases):
    return [gradients(**case) for case in cases]


def gradients(
    name, schedule, size, ranks=2, replicas=2, experts=0, kind="padded", changes=None, loss="own", **pipeline
):
    """The loss, all reduced gradients and their norm of one batch, and the loss of an evaluation."""
    import dualpipe_engine

    _, adapter, loss_fn = built(name, changes, loss)
    topology = PipeDataParallelTopology(ranks, replicas)
    module = PipelineModule(adapter.to_layer_specs(), topology=topology, loss_fn=loss_fn)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings(schedule, size, experts, **pipeline))

    def data(reader):
        return ((inputs, labels if loss == "own" else shifted(labels)) for inputs, labels in stream(reader, kind))

    evaluated = float(engine.eval_batch(data(7)))
    grads = {}

    def capture():
        grads.update({key: param.grad.clone() for key, param in engine.module.named_parameters()})

    engine._exec_optimizer_step = capture
    total = float(engine.train_batch(data(engine.data_rank)))
    with torch.no_grad():
        for key, param in engine.module.named_parameters():
            param.copy_(grads[key])
    found = {
        "loss": total,
        "evaluated": evaluated,
        "grads": autoep_runs.named(engine.module),
        "transfers": sorted({transfer.name for transfer in engine._transfers}),
        "readers": engine.data_replicas,
    }
    engine.destroy()
    return found


def shifted(labels):
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()


def whole(name, readers, kind="padded", changes=None, loss="own", evaluate=False):
    """The oracle: loss and gradients of the whole model on whole sequences."""
    model, *_ = built(name, changes)
    total = 0.0
    numbers = (7,) if evaluate else range(readers)
    for reader in numbers:
        data = stream(reader, kind)
        for _ in range(MICROS):
            inputs, labels = next(data)
            more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
            if loss == "own":
                mean = model(**inputs, labels=labels, **more).loss
            else:
                mean = precise(model(**inputs, **more).logits, shifted(labels))
            mean = mean / (MICROS * len(numbers))
            mean.backward()
            total += float(mean.detach())
    return total, {key: param.grad for key, param in model.named_parameters()}
