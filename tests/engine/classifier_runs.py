"""Jobs of the kind that DeepSpeed tests its pipeline engine with: a convolutional classifier, inputs of changing shape.

Each runs on DeepSpeed's own engine as well (schedule None).
"""

from __future__ import annotations

import copy
from functools import partialmethod
from unittest.mock import patch

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

CLASSES = 10


class Pictures(torch.utils.data.Dataset):
    """Noise on one of ten patterns, [3, 8, 8] each."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, CLASSES, (64,), generator=generator)
        self.images = patterns[self.labels] + 0.5 * torch.randn(64, 3, 8, 8, generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def flat(x):
    return x.flatten(1)


def network():
    """Convolutions, activations and pools as layers of their own, and a function between them and the classifier."""
    torch.manual_seed(11)
    return [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        flat,
        nn.Linear(48, CLASSES),
    ]


def settings(schedule, **pipeline):
    section = {"seed_layers": True, "activation_checkpoint_interval": 1, **pipeline}
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.005, "weight_decay": 3e-7, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,  # its default is 1.0, by a norm that DeepSpeed takes of the first stage only
        "steps_per_print": None,
        "pipeline": section | ({"schedule": schedule} if schedule else {}),
    }


def start(module, config, dataset):
    import dualpipe_engine

    # Without processes that read ahead, each of which would import everything anew.
    here = partialmethod(DeepSpeedEngine.deepspeed_io, num_local_io_workers=0)
    with patch.object(DeepSpeedEngine, "deepspeed_io", here):
        engine, *_ = dualpipe_engine.initialize(
            model=module, config=copy.deepcopy(config), model_parameters=module.parameters(), training_data=dataset
        )
    assert type(engine).__name__ == ("DualPipeEngine" if "schedule" in config["pipeline"] else "PipelineEngine")
    return engine


def classify(cases, steps):
    """`cases`: name -> (schedule, pipeline ranks, replicas, what else the "pipeline" section says); losses of each."""
    found = {}
    for name, (schedule, ranks, replicas, pipeline) in cases.items():
        module = PipelineModule(
            layers=network(), topology=PipeDataParallelTopology(ranks, replicas), loss_fn=nn.CrossEntropyLoss()
        )
        engine = start(module, settings(schedule, **pipeline), Pictures())
        found[name] = [float(engine.train_batch()) for _ in range(steps)]
        engine.destroy()
    return found


def evaluate(schedules, ranks, replicas, micros=2):
    """schedule -> mean loss of the untrained network over a loader that the engine has made."""
    found = {}
    for schedule in schedules:
        module = PipelineModule(
            layers=network(), topology=PipeDataParallelTopology(ranks, replicas), loss_fn=nn.CrossEntropyLoss()
        )
        config = settings(schedule) | {"train_batch_size": micros * replicas, "gradient_accumulation_steps": micros}
        engine = start(module, config, Pictures())
        loader = engine.deepspeed_io(Pictures(), route="eval", num_local_io_workers=0)
        found[schedule] = float(engine.eval_batch(iter(loader)))
        engine.destroy()
    return found


class Seeing(nn.Module):
    """Remembers the shapes of its inputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.shapes = nn.Linear(6, 6), set()

    def forward(self, x):
        self.shapes.add(tuple(x.shape))
        return self.linear(x)


class Lengths(torch.utils.data.Dataset):
    """Four samples in a row are of one length, the next four of another."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.full(((2, 3, 5, 8)[index // 4 % 4], 6), float(index % 7))
        return x, x.cos()


def shapes(cases, steps=6):
    """`cases`: name -> (schedule, pipeline ranks, replicas); losses, and the shapes that each layer has seen."""
    found = {}
    for name, (schedule, ranks, replicas) in cases.items():
        torch.manual_seed(11)
        module = PipelineModule(
            layers=[Seeing() for _ in range(8)],
            topology=PipeDataParallelTopology(ranks, replicas),
            loss_fn=nn.MSELoss(),
            dynamic_shape=True,
        )
        engine = start(module, settings(schedule), Lengths())
        losses = [float(engine.train_batch()) for _ in range(steps)]
        seen = {name: layer.shapes for name, layer in engine.module.named_modules() if isinstance(layer, Seeing)}
        found[name] = losses, seen
        engine.destroy()
    return found


def plain_descent(schedules, micros=2, rate=0.1):
    """Two factors 1, whose product with the input 1 shall be 0, after one step: schedule -> their values, and how often
    a forward hook of the module ran in a second step."""
    import dualpipe_engine

    found = {}
    for schedule in schedules:
        factors = [nn.Linear(1, 1, bias=False) for _ in range(2 if schedule != "dualpipev" else 4)]
        for factor in factors:
            nn.init.ones_(factor.weight)
        module = PipelineModule(layers=factors, num_stages=2, loss_fn=nn.MSELoss())
        config = settings(schedule, activation_checkpoint_interval=0) | {
            "train_batch_size": micros,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": rate}},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
        batch = [(torch.ones(1, 1), torch.zeros(1, 1))] * micros
        engine.train_batch(iter(batch))
        factors = [float(param) for param in engine.module.parameters()]
        seen = []
        engine.module.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        engine.train_batch(iter(batch))
        found[schedule] = factors, len(seen)
        engine.destroy()
    return found
