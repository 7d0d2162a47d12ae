"""Runs that save and load checkpoints, on pooled ranks."""

import copy
import os
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn


class Dropped(training.Block):
    """A block that draws random numbers."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


def cross_entropy(logits, labels):
    return training.cross_entropy(logits.float(), labels)  # stock DeepSpeed adds up losses in their own precision


def make_module(ranks, replicas=1, dropout=False, blocks=8):
    torch.manual_seed(7)
    layers = training.make_layers(blocks, tied=True)
    layers.insert(2, layers.pop(1))  # the converter refuses stock checkpoints without a file of layer 1
    if dropout:
        layers = [LayerSpec(Dropped) if getattr(each, "typename", 0) is training.Block else each for each in layers]
    topology = PipeDataParallelTopology(ranks, replicas)
    return PipelineModule(layers, topology=topology, loss_fn=cross_entropy)


def start(config, ranks, replicas=1, dropout=False, **kwargs):
    import dualpipe_engine

    module = make_module(ranks, replicas, dropout)
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config), **kwargs)
    return engine


class Tokens(torch.utils.data.Dataset):
    """22 samples: a batch of 16 does not divide them, nor do two replicas' batches."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        tokens = torch.randint(
            0, training.VOCABULARY, (training.LENGTH + 1,), generator=torch.Generator().manual_seed(index)
        )
        return tokens[:-1], tokens[1:]


def without_workers(deepspeed_io):
    """DeepSpeed's loaders start two processes a rank and pass, which takes longer here than the training."""

    def made(*args, **kwargs):
        return deepspeed_io(*args, **kwargs, num_local_io_workers=0)

    return made


def train_from(config, ranks, folder, steps, save_at=(), load=False, replicas=1):
    """Losses of `steps` steps on a data set, saved after the steps of `save_at`, resumed from the latest if `load`."""
    with patch.object(DeepSpeedEngine, "deepspeed_io", without_workers(DeepSpeedEngine.deepspeed_io)):
        engine = start(config, ranks, replicas, dropout=True, training_data=Tokens())
    torch.manual_seed(1000 + engine.global_rank)  # dropout differs between ranks
    client = engine.load_checkpoint(folder)[1] if load else None
    losses = []
    while engine.global_steps < steps:
        losses.append(float(engine.train_batch()))
        if engine.global_steps in save_at:
            engine.save_checkpoint(folder, client_state={"mine": [1, 2]})
    engine.data_iterator = engine.training_dataloader = None
    return {"losses": losses, "client": client, "lr": engine.get_lr(), "digests": digests(engine)}


def digests(engine):
    return {name: training.digest(value) for name, value in training.weights(engine).items()}


def merged_stream(replicas, micros):
    """What several replicas read in a batch of `micros` micro-batches in all, one after another."""
    streams = [training.stream(replica) for replica in range(replicas)]
    while True:
        for each in streams:
            yield from islice(each, micros // replicas)


def hop(
    config,
    ranks,
    folder,
    load=None,
    save=None,
    replicas=1,
    steps=0,
    skip=0,
    merged=1,
    universal=False,
    ours=False,
    **options,
):
    """Load, evaluate, train, evaluate, save: one link of a chain of schedules; `universal`: convert what is saved, by
    DeepSpeed's converter; `ours`: by our own."""
    engine = start(config, ranks, replicas)
    if load is not None:
        engine.load_checkpoint(folder, tag=load, **options)
    replica = getattr(engine, "data_rank", engine.grid.data_parallel_id)
    data = training.stream(replica)
    if merged > 1:
        data = merged_stream(merged, engine.gradient_accumulation_steps())
    for _ in range(skip * engine.gradient_accumulation_steps()):
        next(data)

    def evaluate():
        return float(engine.eval_batch(training.stream(0, seed=5), num_micro_batches=4))

    found = {"before": evaluate(), "losses": [float(engine.train_batch(data)) for _ in range(steps)]}
    found["after"] = evaluate()
    if save is not None:
        engine.save_checkpoint(folder, tag=save)
    engine.destroy()
    if universal or ours:
        dist.barrier()
        if dist.get_rank() == 0:
            (own_convert if ours else convert)(Path(folder, save), Path(folder, f"{save}u"))
            Path(folder, "latest_universal").write_text(f"{save}u")
        dist.barrier()
    return found


def hops(links):
    """Each link of a chain in turn, on the same ranks."""
    return [hop(**link) for link in links]


def save_with_a_function(config, ranks, folder):
    """A checkpoint of a model whose layer 1 is a plain function."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(model=training.make_module(ranks, 2), config=config)
    engine.train_batch(training.stream(0))
    engine.save_checkpoint(folder, tag="x")


def own_convert(source, target):
    from dualpipe_engine.engine.checkpoint.convert import convert

    convert(source, target)


def convert(source, target):
    """DeepSpeed's converter to universal checkpoints, as its command line calls it."""
    from types import SimpleNamespace

    from deepspeed.checkpoint.ds_to_universal import main

    main(
        SimpleNamespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


class Torn(BaseException):
    """No error of a write, which the ranks would agree on: the run ends."""


def torn_save(config, ranks, folder, broken_tag):
    """Save, train, then fail in the middle of the next save."""
    engine = start(config, ranks)
    data = training.stream(0)
    engine.train_batch(data)
    engine.save_checkpoint(folder, tag="first", client_state={"digests": digests(engine)})
    engine.train_batch(data)
    written = []

    def save(state_dict, file):
        if written:
            raise Torn(file.name)
        written.append(file)
        file.write(b"PK half")

    with patch.object(engine.checkpoint_engine, "save", save):
        engine.save_checkpoint(folder, tag=broken_tag)


def restored(config, ranks, folder):
    """What the latest checkpoint of `torn_save` restores."""
    engine = start(config, ranks)
    path, client = engine.load_checkpoint(folder)
    found = {"path": path, "same": digests(engine) == client["digests"]}
    engine.destroy()
    return found


def files_written(config, ranks, folder, replicas=1):
    """Paths that this rank writes for a checkpoint."""
    engine = start(config, ranks, replicas)
    save, paths = engine.checkpoint_engine.save, []

    def noted(state_dict, file):
        paths.append(os.path.basename(file.name))
        save(state_dict, file)

    with patch.object(engine.checkpoint_engine, "save", noted):
        engine.save_checkpoint(folder, tag="all")
    return paths


def sentences(config, ranks, folder, tags, latest):
    """What saving and loading under each tag, and loading under each content of `latest`, raises; then a good save."""
    from dualpipe_engine.errors import CheckpointError

    engine = start(config, ranks)
    engine.train_batch(training.stream(0))
    found = []

    def tried(call, *args):
        try:
            call(*args)
        except CheckpointError as error:
            found.append(str(error))
        else:
            found.append(None)

    for tag in tags:
        tried(engine.save_checkpoint, folder, tag)
        tried(engine.load_checkpoint, folder, tag)
    tried(engine.save_checkpoint, folder, f"of rank {dist.get_rank()}")
    for text in latest:
        if dist.get_rank() == 0:
            Path(folder, "latest").write_text(text)
        tried(engine.load_checkpoint, folder)
    there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    dist.barrier()
    engine.save_checkpoint(folder, "good")
    return found, there, float(engine.train_batch(training.stream(0)))
