"""Training runs of the reporting tests: what users read from the engine beside the loss."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch
import training
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology


class Reporting(PipelineModule):
    """Keeps parts of its loss in the way of Megatron-DeepSpeed: the loss function is a method of the module."""

    def __init__(self, ranks, replicas):
        torch.manual_seed(7)
        self.parts = None
        super().__init__(
            layers=training.make_layers(2 * ranks),
            topology=PipeDataParallelTopology(ranks, replicas),
            loss_fn=self.loss_of,
        )
        self.last = OrderedDict(language=torch.zeros(()), penalty=torch.zeros(()))

    def loss_of(self, logits, labels):
        language, penalty = training.cross_entropy(logits, labels), logits.square().mean()
        self.last = OrderedDict(language=language.detach(), penalty=penalty.detach())
        return language + 0.01 * penalty

    def get_additional_losses(self):
        return self.last


def report(folder, schedule, ranks, replicas=1, lengths=(5,)):
    """Three steps with monitors on, and a length of the data for each step (curriculum learning)."""
    import dualpipe_engine

    config = training.settings(3, replicas, schedule=schedule)
    config["csv_monitor"] = {"enabled": True, "output_path": f"{folder}/csv", "job_name": "job"}
    config["tensorboard"] = {"enabled": True, "output_path": f"{folder}/tensorboard", "job_name": "job"}
    engine, *_ = dualpipe_engine.initialize(model=Reporting(ranks, replicas), config=config)
    replica = engine.place.replica if schedule else engine.grid.data_parallel_id
    boundary, step = {"before": engine.is_gradient_accumulation_boundary()}, engine.optimizer.step

    def watched(*args, **kwargs):
        boundary["in the step"] = engine.is_gradient_accumulation_boundary()
        return step(*args, **kwargs)

    engine.optimizer.step = watched
    losses, additional, data = [], [], training.stream(replica)
    for length in lengths * (3 if len(lengths) == 1 else 1):
        batch = [next(data) for _ in range(3)]
        engine.reset_activation_shape()
        losses.append(float(engine.train_batch(iter([tuple(part[:, :length] for part in each) for each in batch]))))
        additional.append({name: float(loss) for name, loss in engine.get_additional_losses().items()})
    boundary["after"] = engine.is_gradient_accumulation_boundary()
    for monitor in (engine.monitor.tb_monitor, engine.monitor.csv_monitor):
        getattr(monitor, "flush", lambda: None)()
    names = {"steps": engine.global_steps, "samples": engine.global_samples}
    return {"losses": losses, "additional": additional, "boundary": boundary, "counts": names}


def written(folder):
    """Events of both monitors: tag -> [(samples, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    csv = {}
    for path in sorted(Path(folder, "csv").rglob("*.csv")):
        rows = [line.split(",") for line in path.read_text().split("\n")[1:] if line]
        csv[path.stem] = [(int(float(samples)), float(value)) for samples, value in rows]
    events = EventAccumulator(str(next(Path(folder, "tensorboard").rglob("events.*")).parent))
    events.Reload()
    board = {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in sorted(events.Tags()["scalars"])}
    assert all(math.isfinite(value) for values in (csv | board).values() for _, value in values)
    return csv, board
