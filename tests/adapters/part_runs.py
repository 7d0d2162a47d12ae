"""Runs of models of transformers whose replicas share sequences, started on pooled ranks."""

from __future__ import annotations

import copy
import inspect
import itertools

import autoep_runs
import kinds
import models
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from dualpipe_engine.errors import ConfigError, PipelineRuntimeError

LENGTH, IGNORED = 8, -100
MICROS = 4


def stream(reader, kind="padded"):
    """Whole sequences of one group of replicas. Labels that count are spread unevenly, of each fourth micro-batch all
    in the first of four parts.

    Args:
        reader: number of the group.
        kind: "padded": with a mask; "packed": several documents in a row, by positions; "plain": neither; "single": one
            sequence.
    """
    generator = torch.Generator().manual_seed(50 + reader)
    number = 0
    while True:
        tokens = torch.randint(1, models.VOCABULARY, (1 + (kind != "single"), LENGTH), generator=generator)
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

    config = kinds.config_of(name) if name in kinds.MORE else autoep_runs.config_of(name)
    still = {key: 0.0 for key, value in vars(config).items() if "drop" in key and isinstance(value, float)}
    for key, value in (still | (changes or {})).items():
        setattr(config, key, value)
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


def each_or_why(cases):
    """The same; of what is refused, or no single chain, the sentence."""
    found = []
    for case in cases:
        try:
            found.append(gradients(**case))
        except ConfigError as error:
            found.append(str(error))
    return found


def gradients(
    name, schedule, size, ranks=2, replicas=2, experts=0, kind="padded", changes=None, loss="own", **pipeline
):
    """The loss, all reduced gradients and their norm of one batch, and the loss of an evaluation."""
    import dualpipe_engine

    _, adapter, loss_fn = built(name, changes, loss)
    topology = PipeDataParallelTopology(ranks, replicas)
    module = PipelineModule(adapter.to_layer_specs(), topology=topology, loss_fn=loss_fn)
    config = settings(schedule, size, experts, **pipeline) | {"gradient_clipping": 1.0}
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)

    def data(reader):
        return ((inputs, labels if loss == "own" else shifted(labels)) for inputs, labels in stream(reader, kind))

    evaluated = float(engine.eval_batch(data(7)))
    grads, step = {}, engine._exec_optimizer_step

    def capture():
        grads.update({key: param.grad.clone() for key, param in engine.module.named_parameters()})
        step()

    engine._exec_optimizer_step = capture
    said = autoep_runs.Said()
    autoep_runs.logger.addHandler(said)
    total = float(engine.train_batch(data(engine.data_rank)))
    autoep_runs.logger.removeHandler(said)
    with torch.no_grad():
        for key, param in engine.module.named_parameters():
            param.copy_(grads[key])
    found = {
        "loss": total,
        "norm": float(engine.get_global_grad_norm()),
        "evaluated": evaluated,
        "grads": autoep_runs.named(engine.module),
        "transfers": sorted({transfer.name for transfer in engine._transfers}),
        "said": [text for text in said.texts if "waits for its exchanges" in text],
        "waits": dict(engine.module.dualpipe_waits),
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
    return total, {key: param.grad for key, param in model.named_parameters() if param.grad is not None}


def train(name, folder, steps, sizes, experts=0):
    """Losses of the same job with sequences in one, two, ... parts; the second half of each goes on from a checkpoint
    of the first one's."""
    found = []
    for number, size in enumerate(sizes):
        readers = 2 // size
        for half in range(2):
            engine = start(name, settings("dualpipe", size, experts, zero=1))
            if half:
                engine.load_checkpoint(folder)
            else:
                data, losses = rows(engine.data_rank, readers), []
            losses += [float(engine.train_batch(data)) for _ in range(steps)]
            if not half and not number:
                engine.save_checkpoint(folder)
            engine.destroy()
        found.append(losses)
    return found


def start(name, config, changes=None):
    import dualpipe_engine

    _, adapter, loss_fn = built(name, changes)
    topology = PipeDataParallelTopology(2, 2)
    module = PipelineModule(adapter.to_layer_specs(), topology=topology, loss_fn=loss_fn)
    return dualpipe_engine.initialize(model=module, config=config)[0]


def rows(reader, readers):
    """The same sequences for any number of readers: each of two takes one row of a pair, one takes both."""
    generator = torch.Generator().manual_seed(9)
    mine = slice(None) if readers == 1 else slice(reader, reader + 1)
    while True:
        tokens = torch.randint(1, models.VOCABULARY, (2, LENGTH), generator=generator)[mine]
        yield {"input_ids": tokens}, tokens


def auto(path, name):
    """Of "schedule": "auto" the schedule, and the loss of a first batch, to which measuring has changed nothing."""
    import dualpipe_engine

    _, adapter, loss_fn = built(name, None)
    module = PipelineModule(adapter.to_layer_specs(), topology=PipeDataParallelTopology(2, 2), loss_fn=loss_fn)
    config = settings("auto", 2, 0, costs=str(path))
    rows = [(inputs["input_ids"][0], labels[0]) for inputs, labels in itertools.islice(stream(3, "plain"), 4)]
    engine, *_ = dualpipe_engine.initialize(model=module, config=config, training_data=rows)
    found = engine.plan.schedule, float(engine.train_batch(stream(0, "plain")))
    engine.destroy()
    return found


def refused(name, changes=None, **pipeline):
    """Start with what cannot work."""
    start(name, settings("zb1p", 2, 0, **pipeline), changes)


def apart():
    """A whole model of this process beside pieces that share sequences, and pieces of the same model afterwards."""
    from dualpipe_engine.adapters import get_model_adapter
    from dualpipe_engine.engine.checks.token_mixing import SHARED_HEADS

    model, *_ = built("llama", None)
    tokens = next(stream(0, "plain"))[0]["input_ids"]
    before = model(tokens).logits
    other, *_ = built("llama", None)
    [stage] = get_model_adapter(other).partition(1)
    stage.share_sequences(torch.distributed.group.WORLD)
    assert any(SHARED_HEADS in vars(part) for part in stage.modules())
    assert torch.equal(stage(tokens), before)
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(ConfigError, match="labels among the inputs"):
        stage({"input_ids": tokens, "labels": tokens})
    again = get_model_adapter(copy.deepcopy(other)).partition(1)[0]
    assert torch.equal(again(tokens), before) and torch.equal(stage(tokens), before)
    [again] = get_model_adapter(other).partition(1)
    assert not any(SHARED_HEADS in vars(part) for part in again.modules())
    assert torch.equal(again(tokens), before)
    with pytest.raises(PipelineRuntimeError, match="other pieces have been made"):
        stage(tokens)
