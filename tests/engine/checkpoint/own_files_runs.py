"""Checkpoints of a model whose tied head has a bias and whose loss has a weight and a buffer, on ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from dualpipe_engine.engine.checkpoint.convert import convert
from dualpipe_engine.errors import CheckpointError


class Biased(training.Embed):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(training.VOCABULARY))


def biased_head(module, x):
    return training.head(module, x) + module.bias


class Noted(training.Block):
    """Has a state besides its tensors."""

    note = "none"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


class Tempered(nn.Module):
    """A loss with a temperature that is trained, and a scale that is not."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, logits, labels):
        return training.cross_entropy(logits * self.temperature * self.scale, labels)


def start(schedule, zero, universal=False):
    import dualpipe_engine

    torch.manual_seed(7)
    layers = [
        TiedLayerSpec("embed", training.Embed, tied_weight_attr="weight"),
        *[LayerSpec(Noted) for _ in range(4)],
        TiedLayerSpec("embed", Biased, forward_fn=biased_head, tied_weight_attr="weight"),
    ]
    module = PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=Tempered())
    config = training.settings(4, zero=zero, schedule=schedule)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return dualpipe_engine.initialize(model=module, config=config)[0]


def noted(engine):
    return [part for part in engine.module.modules() if isinstance(part, Noted)]


def resumed(folder, saved, links):
    """Losses after a checkpoint of the run `saved` (schedule, ZeRO stage), and those of runs that load it: as it is,
    weights alone, or converted; and what is said where files that only some checkpoints have are gone."""
    engine, data = start(*saved), training.stream(0)
    engine.module.loss_fn.scale.fill_(0.5)
    for part in noted(engine):
        part.note = "saved"
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(folder, tag="1")
    found = {"saved": [float(engine.train_batch(training.stream(1))) for _ in range(2)]}
    engine.destroy()
    if dist.get_rank() == 0:
        convert(Path(folder, "1"), Path(folder, "1u"))
    dist.barrier()
    for how, schedule, zero in links:
        engine = start(schedule, zero, universal=how == "converted")
        tag = "1u" if how == "converted" else "1"
        engine.load_checkpoint(folder, tag=tag, load_optimizer_states=how != "weights")
        assert {part.note for part in noted(engine)} == {"saved"}
        found[how, schedule, zero] = [float(engine.train_batch(training.stream(1))) for _ in range(2)]
        engine.destroy()
    engine, found["gone"] = start(*saved), []
    for name in ("dualpipe_layer_05.pt", "dualpipe_loss.pt", "dualpipe_rank_00001.pt"):
        path = Path(folder, "1", name)
        if dist.get_rank() == 0:
            path.rename(f"{path}.aside")
        dist.barrier()
        try:
            engine.load_checkpoint(folder, tag="1", load_optimizer_states=False)
        except CheckpointError as error:
            found["gone"].append(name in str(error))
        dist.barrier()
        if dist.get_rank() == 0:
            Path(f"{path}.aside").rename(path)
        dist.barrier()
    engine.destroy()
    return found
