"""Runs that load with each option, and what does not fit."""

import copy
import shutil
from pathlib import Path

import checkpoint_runs
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn


class Wider(training.Block):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(training.WIDTH, training.WIDTH)


class Kept(training.Block):
    """Has a part that is not trained, and a buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(training.WIDTH, training.WIDTH).requires_grad_(False)
        self.register_buffer("gain", self.frozen.bias[:1].clone())

    def forward(self, x):
        return super().forward(self.frozen(x) * self.gain)


ADAM = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.5}}


def start(schedule="dualpipe", zero=1, last=training.Block, scheduler=True, optimizer=True, kind=None, **sections):
    import dualpipe_engine

    layers = [LayerSpec(training.Embed), *[LayerSpec(training.Block) for _ in range(4)], LayerSpec(last)]
    layers += [LayerSpec(nn.Linear, training.WIDTH, training.VOCABULARY)]
    module = PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=training.cross_entropy)
    config = training.settings(4, zero=zero, schedule=schedule) | sections
    if kind is not None:
        config |= {"optimizer": kind, "zero_allow_untested_optimizer": True}
    for key, wanted in (("scheduler", scheduler), ("optimizer", optimizer), ("zero_optimization", optimizer)):
        if not wanted:
            del config[key]
    return dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))[0]


def evaluated(engine):
    return float(engine.eval_batch(training.stream(0, seed=5)))


def moments(engine):
    """What the optimizer has of gradients before."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sum(float(state["exp_avg"].abs().sum()) for state in inner.state.values() if "exp_avg" in state)


def plain(folder):
    """What loading says where something does not fit, and does where nothing needs to."""
    from dualpipe_engine.errors import DualPipeError

    said, found = {}, {}

    def tried(name, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
        except DualPipeError as error:
            said[name] = type(error).__name__, str(error)

    engine = start(scheduler=False)
    engine.train_batch(training.stream(0))
    state = {"optimizer": 1, "global_steps": "many", "lr_scheduler": [2], "mine": 3}
    engine.save_checkpoint(folder, tag="whole", client_state=state)
    found["saved"] = evaluated(engine)
    tried("function", engine.load_checkpoint, folder, "whole", custom_load_fn=print)
    _, client_state = engine.load_checkpoint(folder, "whole")
    found["client state"] = {key: client_state[key] for key in state} == state and engine.global_steps == 1
    engine.destroy()

    engine = start()
    tried("scheduler", engine.load_checkpoint, folder, "whole")
    engine.load_checkpoint(folder, "whole", load_lr_scheduler_states=False)
    found["without scheduler"] = evaluated(engine)
    engine.destroy()

    engine = start(last=Wider)
    tried("another layer", engine.load_checkpoint, folder, "whole", load_optimizer_states=False)
    weights = {"load_optimizer_states": False, "load_lr_scheduler_states": False}
    tried("another layer", engine.load_checkpoint, folder, "whole", **weights)
    engine.load_checkpoint(folder, "whole", load_module_strict=False, **weights)
    found["not strict"] = evaluated(engine)
    engine.destroy()

    engine = start(scheduler=False, optimizer=False)
    engine.load_checkpoint(folder, "whole")
    found["evaluation"] = evaluated(engine)
    engine.save_checkpoint(folder, "weights")
    engine.destroy()

    engine = start(scheduler=False)
    tried("no optimizer", engine.load_checkpoint, folder, "weights")
    engine.load_checkpoint(folder, "weights", load_optimizer_states=False)
    found["weights"] = evaluated(engine)
    return said, found


def other_kinds(folder):
    """What loading the states of another kind of optimizer says, and how far off the weights are that then load; and
    what loading the other kind of checkpoint says, and its weights alone."""
    from dualpipe_engine.engine.checkpoint.convert import convert
    from dualpipe_engine.errors import CheckpointError

    found = {}
    for zero, saved, kind in ((0, SGD, ADAM), (1, ADAM, SGD)):
        name = f"{saved['type']}{zero}"
        engine = start(zero=zero, kind=saved)
        engine.train_batch(training.stream(0))
        engine.save_checkpoint(folder, tag=name)
        before = evaluated(engine)
        engine.destroy()
        if dist.get_rank() == 0:
            convert(Path(folder, name), Path(folder, f"{name}u"))
        dist.barrier()
        for tag in (name, f"{name}u"):
            engine = start(zero=zero, kind=kind, checkpoint={"load_universal": tag.endswith("u")})
            try:
                engine.load_checkpoint(folder, tag=tag)
            except CheckpointError as error:
                engine.load_checkpoint(folder, tag=tag, load_optimizer_states=False)
                found[tag] = str(error), evaluated(engine) - before
            (other,) = {name, f"{name}u"} - {tag}
            try:
                engine.load_checkpoint(folder, tag=other)
            except CheckpointError as error:
                found[tag, other] = str(error), 0.0
            if other.endswith("u"):
                engine.load_checkpoint(folder, tag=other, load_optimizer_states=False)
                found[tag, other] = found[tag, other][0], evaluated(engine) - before
            engine.destroy()
    return found


def universal(folder, zeros):
    """Saved by stock DeepSpeed, converted by its converter: losses and moments of runs that load the weights alone; and
    what they say where something is missing that only files of layers have."""
    from dualpipe_engine.errors import DualPipeError

    found, said = {}, []
    for last in (training.Block, Kept):
        name = last.__name__
        engine = start(None, last=last)
        engine.train_batch(training.stream(0))
        engine.save_checkpoint(folder, tag=name)
        found[name, None] = float(engine.eval_batch(training.stream(0, seed=5))), 0.0
        engine.destroy()
        if dist.get_rank() == 0:
            checkpoint_runs.convert(Path(folder, name), Path(folder, f"{name}u"))
        dist.barrier()
        for zero in zeros:
            engine = start("1f1b", zero, last, checkpoint={"load_universal": True})
            options = {"load_module_only": True} if zero == 2 else {"load_optimizer_states": False}
            if last is Kept:
                try:
                    engine.load_checkpoint(folder, f"{name}u", **options)
                except DualPipeError as error:
                    said.append(str(error))
                dist.barrier()
                for path in Path(folder, name).glob("layer_*") if dist.get_rank() == 0 else ():
                    shutil.copy(path, Path(folder, f"{name}u"))
                dist.barrier()
            engine.load_checkpoint(folder, f"{name}u", **options)
            found[name, zero] = evaluated(engine), moments(engine)
            engine.destroy()
    return found, said
