"""Runs of Lightning, stock and ours, whose batches or models draw random numbers."""

from __future__ import annotations

import os
import random

import numpy
import torch
from dualpipe_engine.integrations.lightning import DualPipeStrategy
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from dualpipe_engine.compat import DualPipeLightningModule

ROWS = 24


class Noisy(Dataset):
    """Rows with noise of three generators."""

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        noise = torch.tensor([random.random(), numpy.random.rand(), float(torch.rand(())), 0.0])
        return torch.arange(4.0) * index / ROWS + noise, index % 3


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True),
    "weighted": lambda: DataLoader(Noisy(), batch_size=8, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
    "in batches": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 8, False)),
    "workers": lambda: DataLoader(Noisy(), batch_size=8, num_workers=1),
}


def layers(dropout):
    """More dropout on the first stage than on the second."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


class Steps:
    def setup(self, stage):
        if self.seed is None:
            torch.manual_seed(torch.distributed.get_rank())
        else:
            seed_everything(self.seed, workers=True, verbose=False)

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.batches.append(batch[0])

    def on_validation_batch_start(self, batch, batch_idx):
        self.trainer.batches.append(batch[0])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.losses.append(float(outputs["loss"]))


class Stock(Steps, LightningModule):
    def __init__(self, dropout):
        super().__init__()
        self.model = layers(dropout)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.criterion(self.model(batch[0]), batch[1]))


class Piped(Steps, DualPipeLightningModule):
    def __init__(self, dropout):
        super().__init__(layers(dropout), num_chunks=4)


def drawn(folder, stock, case, dropout=0.0, epochs=2, resume=None, seed=5):
    """Batches and losses of a few epochs, validation among them, and what a checkpoint goes on with."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if stock else torch.distributed.get_world_size(),
        strategy="auto" if stock else DualPipeStrategy(schedule="zb1p"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_epochs=epochs,
        num_sanity_val_steps=0,
    )
    trainer.batches, trainer.losses = [], []
    module = Stock(dropout) if stock else Piped(dropout)
    module.seed = seed
    try:
        trainer.fit(module, LOADERS[case](), LOADERS[case](), ckpt_path=resume)
        if not stock:
            trainer.save_checkpoint(f"{folder}/{epochs}.ckpt")
    finally:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
    return {"batches": trainer.batches, "losses": trainer.losses}


def all_cases(**options):
    return {case: drawn(case=case, **options) for case in LOADERS}
