"""What a Lightning program may do, by the stock Trainer in one process and by DualPipe on two ranks."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path

import torch
from deepspeed.pipe import TiedLayerSpec
from dualpipe_engine.integrations.lightning import DualPipeStrategy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from dualpipe_engine.compat import DualPipeLightningModule
from dualpipe_engine.errors import ConfigError

warnings.filterwarnings("ignore")
WIDTH, ROWS, BATCH = 8, 32, 8


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class PhasedBlock(Block):
    """As a block, in two phases."""

    def phases(self):
        from dualpipe_engine.runtime.phases import COMPUTE, Phase

        return [Phase("up", COMPUTE, self._up), Phase("down", COMPUTE, self._down)]

    def _up(self, x):
        return x, torch.tanh(self.up(x))

    def _down(self, pair):
        return pair[0] + self.down(pair[1])


class TakesDict(nn.Module):
    """The sum of two inputs of a dict, or of one alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH)

    def forward(self, batch):
        return self.first(batch["x"]) + self.second(batch["y"])


def head(module, x):
    return nn.functional.linear(x, module.weight.t())


def layers(kind):
    torch.manual_seed(3)
    first = TakesDict() if kind == "dict" else nn.Linear(4, WIDTH)
    block = PhasedBlock if kind == "phases" else Block
    return [first, *[block() for _ in range(3)], nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)]


class Tied(nn.Module):
    """In one process: the first layer's weight is the last one's too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, WIDTH, bias=False)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return head(self.first, self.blocks(self.first(x)))


def tied_layers():
    whole = Tied()

    def first(*args, **kwargs):
        return copy.deepcopy(whole.first)

    class First(nn.Linear):
        def __new__(cls, *args, **kwargs):
            return first()

    return [
        TiedLayerSpec("ends", First, 4, WIDTH, tied_weight_attr="weight"),
        *whole.blocks,
        TiedLayerSpec("ends", First, 4, WIDTH, forward_fn=head, tied_weight_attr="weight"),
    ]


def data(kind, rows=ROWS):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(rows, 4, generator=generator), torch.randn(rows, 4, generator=generator)
    label = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    if kind == "dict":
        samples = [{"x": a, "y": b, "labels": c} for a, b, c in zip(x, y, label, strict=True)]
    else:
        samples = list(zip(x, label, strict=True))
    return DataLoader(samples, batch_size=BATCH)


def optimizer_of(kind, module):
    if kind == "groups":
        decayed = [param for param in module.parameters() if param.dim() > 1]
        rest = [param for param in module.parameters() if param.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 0.01, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    if kind == "reclips":
        return torch.optim.SGD(module.parameters(), lr=0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    if kind == "plateau":
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
    if kind == "one cycle":  # of the rate, and of Adam's first decay
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
    return optimizer


class Steps:
    """What both modules do."""

    def configure_optimizers(self):
        return optimizer_of(self.kind, self)

    def on_before_optimizer_step(self, optimizer):
        if self.kind == "plain":
            square = sum(float(p.grad.square().sum()) for p in self.parameters() if p.grad is not None)
            self.trainer.squares.append(square)

    def on_train_batch_start(self, batch, batch_idx):
        if self.kind == "reclips":
            self.trainer.gradient_clip_val = (1.0, None, 0.01, 0.02)[batch_idx]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.losses.append(float(outputs["loss"]) * self.trainer.accumulate_grad_batches)
        if self.kind == "clips":
            for param in self.parameters():
                param.data.clamp_(-0.25, 0.2)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.kind == "skips" and batch_idx == 1:
            optimizer_closure()  # and no step: the gradients are given up
        elif self.kind == "skips" and batch_idx == 2:
            optimizer_closure()
            optimizer.step()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Stock(Steps, LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.model = Tied() if kind == "tied" else nn.Sequential(*layers(kind))

    def loss(self, batch):
        inputs, labels = (batch, batch["labels"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self.model(inputs).float(), labels)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.model(batch if isinstance(batch, dict) else batch[0])

    def whole(self):
        return {name.removeprefix("model."): value for name, value in self.state_dict().items()}


class Piped(Steps, DualPipeLightningModule):
    def __init__(self, kind, model=None):
        model = model or (tied_layers() if kind == "tied" else nn.Sequential(*layers(kind)))
        super().__init__(model, num_chunks=4)
        self.kind = kind

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs.float(), targets)

    def whole(self):
        return self.state_dict()


#: Case -> kind of the module, arguments of the Trainer, of the strategy.
CASES = {
    "plain": ("plain", {"gradient_clip_val": 0.1}, {"deepspeed_config": {"zero_optimization": {"stage": 0}}}),
    "zero-1": ("zero", {"gradient_clip_val": 0.1}, {}),
    "zero-2": ("zero", {"gradient_clip_val": 0.1}, {"deepspeed_config": {"zero_optimization": {"stage": 2}}}),
    "zb1p": ("zero", {"accumulate_grad_batches": 2}, {"schedule": "zb1p"}),
    "accumulated": ("zero", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, {}),
    "by value": (
        "value",
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"deepspeed_config": {"zero_optimization": {"stage": 0}}},
    ),
    "groups": ("groups", {}, {}),
    "plateau": ("plateau", {"max_epochs": 3}, {}),
    "one cycle": ("one cycle", {}, {}),
    "dict": ("dict", {}, {}),
    "tied": ("tied", {}, {}),
    "phases": ("phases", {}, {}),
    "skips": ("skips", {}, {}),
    "ema": ("ema", {}, {}),
    "clips": ("clips", {}, {}),
    "reclips": ("reclips", {"gradient_clip_val": 1.0}, {}),
    "bf16-mixed": ("zero", {"precision": "bf16-mixed"}, {}),
}


def make_trainer(piped, folder, options, strategy, devices, **more):
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DualPipeStrategy(**strategy) if piped else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 1, "num_sanity_val_steps": 0} | options | more,
    )
    trainer.losses, trainer.squares = [], []
    return trainer


def run(piped, folder, case):
    """Train for an epoch, evaluate, predict, and save."""
    kind, options, strategy = CASES[case]
    world = torch.distributed.get_world_size()
    more = {"callbacks": [EMAWeightAveraging(decay=0.5)]} if case == "ema" else {}
    trainer = make_trainer(piped, folder, options, strategy, world, **more)
    module = Piped(kind) if piped else Stock(kind)
    loader = data(kind)
    trainer.fit(module, loader, data(kind, 16))
    path = Path(folder) / f"{case}.ckpt"
    trainer.save_checkpoint(path)
    found = {"losses": trainer.losses, "steps": trainer.global_step, "squares": trainer.squares}
    found["val"] = float(trainer.callback_metrics["val_loss"])
    found["predicted"] = torch.cat(trainer.predict(module, loader)).float()
    found["weights"] = {name: value.float().clone() for name, value in module.whole().items()}
    if piped:
        engine = module.dualpipe_wrapper.engine
        found["phases"] = {type(chunk).__name__ for chunk in engine._chunks.values()}
        found["bytes"] = state_bytes(engine)
    return found


def state_bytes(engine):
    """Of the optimizer of this rank."""
    return sum(v.nbytes for state in engine.optimizer.state.values() for v in state.values() if v.dim())


def of_the_engine_alone():
    """The optimizer's bytes of the same layers under the same configuration, without Lightning."""
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine

    module = PipelineModule(
        layers("zero"), num_stages=torch.distributed.get_world_size(), loss_fn=nn.functional.cross_entropy,
        partition_method="parameters",
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True, "pipeline": {"schedule": "dualpipe"},
    }  # fmt: skip
    engine, *_ = dualpipe_engine.initialize(
        model=module, config=settings, optimizer=lambda params: torch.optim.Adam(params, lr=0.02)
    )
    x, labels = next(iter(data("zero")))
    engine.train_batch(iter(list(zip(x.split(2), labels.split(2), strict=True))))
    found = state_bytes(engine)
    engine.destroy()
    return found


class Scaled(Piped):
    """Returns another loss than the one whose gradients there are."""

    def training_step(self, batch, batch_idx):
        return 0.5 * self.pipeline_step(batch)


def scaled(folder):
    make_trainer(True, folder, {}, {}, 2).fit(Scaled("zero"), data("zero"))


def all_cases(piped, folder, cases):
    return {case: run(piped, folder, case) for case in cases}


class Stops(Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.at


def half(folder, strategy, devices=2):
    """The first steps, saved."""
    trainer = make_trainer(True, folder, {"callbacks": [Stops(2)]}, strategy, devices)
    module = Piped("zero")
    trainer.fit(module, data("zero"))
    trainer.save_checkpoint(Path(folder) / "half.ckpt")
    return trainer.losses


def rest(folder, strategy, devices):
    trainer = make_trainer(True, folder, {"max_epochs": 2}, strategy, devices)
    trainer.fit(Piped("zero"), data("zero"), ckpt_path=str(Path(folder) / "half.ckpt"))
    return trainer.losses


def again(folder):
    """Fit, evaluate by another Trainer, load in one process, fit again, and without the engine's folder."""
    world = torch.distributed.get_world_size()
    trainer = make_trainer(True, folder, {}, {}, world)
    module = Piped("zero")
    evaluated = make_trainer(True, folder, {}, {}, world).validate(module, data("zero"), verbose=False)
    trainer.fit(module, data("zero"))
    second = make_trainer(True, folder, {}, {"schedule": "zb1p"}, world)
    second.fit(module, data("zero"))
    path = Path(folder) / "again.ckpt"
    second.save_checkpoint(path)
    torch.distributed.barrier()
    loaded = Piped.load_from_checkpoint(path, kind="zero", weights_only=False)
    one = loaded(next(iter(data("zero")))[0]).detach()
    predicted = second.predict(module, data("zero"))[0]
    third = make_trainer(True, folder, {}, {}, world)
    third.fit(loaded, data("zero"))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(f"{path}.engine")
    torch.distributed.barrier()
    try:
        make_trainer(True, folder, {"max_epochs": 2}, {}, world).fit(Piped("zero"), data("zero"), ckpt_path=str(path))
        said = ""
    except Exception as error:
        said = str(error)
    losses = [trainer.losses, second.losses, third.losses]
    return evaluated, losses, one, predicted, said


def again_in_one(folder):
    """The three fits of `again`."""
    module, losses = Stock("zero"), []
    evaluated = make_trainer(False, folder, {}, {}, 1).validate(module, data("zero"), verbose=False)
    for _ in range(3):
        trainer = make_trainer(False, folder, {}, {}, 1)
        trainer.fit(module, data("zero"))
        losses.append(trainer.losses)
    return evaluated, losses


def of_the_same_layers(folder):
    """What is said of two modules of layers that a third one has been fitted with: made before it was, and after it."""
    given = nn.Sequential(*layers("zero"))
    before, module, said = Piped("zero", given), Piped("zero", given), []
    make_trainer(True, folder, {}, {}, 2).fit(module, data("zero"))
    for use in (
        lambda: make_trainer(True, folder, {}, {}, 2).fit(before, data("zero")),
        lambda: Piped("zero", given),
    ):
        try:
            use()
        except ConfigError as error:
            said.append(str(error))
    return said


def with_batch_norm(folder, schedule):
    layers = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), Block(), nn.Linear(WIDTH, 3))
    module = Piped("zero", layers)
    trainer = make_trainer(True, folder, {}, {"schedule": schedule}, 2)
    trainer.fit(module, data("zero"))
    return int(module.state_dict().get("1.num_batches_tracked", -1))
