"""What a LightningModule logs, by the stock Trainer in one process and over pipelines."""

from __future__ import annotations

import torch
from dualpipe_engine.integrations.lightning import DualPipeStrategy
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

from dualpipe_engine.compat import DualPipeLightningModule
from dualpipe_engine.errors import ConfigError


def layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def data():
    generator = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(torch.randn(32, 4, generator=generator), torch.arange(32) % 3), batch_size=8)


class Counts:
    """Counts rows and hits, in sums over devices and in a metric of torchmetrics."""

    def validation_step(self, batch, batch_idx):
        hits = (self.predict_step(batch, batch_idx).argmax(-1) == batch[1]).sum()
        self.hits.update(hits)
        self.log("metric", self.hits, on_epoch=True)
        for name, value in {"hits": hits.float(), "rows": float(len(batch[0]))}.items():
            self.log(name, value, reduce_fx="sum", sync_dist=True)
        self.log("share", hits / len(batch[0]), sync_dist=True)


class Stock(Counts, LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.hits = layers(), SumMetric()

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


class Piped(Counts, DualPipeLightningModule):
    def __init__(self):
        super().__init__(layers(), num_chunks=4)
        self.hits = SumMetric()

    def criterion(self, outputs, targets):
        self.log("within", outputs.mean())
        return nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder, strategy, devices):
    return Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def counted(folder, stock=False):
    """What validation logs, where all devices but a pair are replicas."""
    world = torch.distributed.get_world_size()
    trainer = make_trainer(folder, "auto" if stock else DualPipeStrategy(num_stages=2), world)
    [found] = trainer.validate(Stock() if stock else Piped(), data(), verbose=False)
    return found


def within(folder):
    """The answer to a criterion that logs."""
    trainer = make_trainer(folder, DualPipeStrategy(schedule="zb1p"), 2)
    try:
        trainer.fit(Piped(), data())
    except ConfigError as error:
        return str(error)
