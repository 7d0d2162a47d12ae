"""The same training by the stock Trainer in one process and by DualPipe on pooled ranks."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dualpipe_engine.compat import DualPipeLightningModule

warnings.filterwarnings("ignore")
WIDTH = 8


def chain(seed=0):
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(4)]
    return nn.Sequential(nn.Linear(4, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))


def schedule(parameters, lr):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
    }


class Recorder:
    """Losses of every step, as the module logs them."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.losses.append(float(self.trainer.callback_metrics["train_loss"]))


class Stock(Recorder, LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

    def configure_optimizers(self):
        return schedule(self.model.parameters(), self.lr)


class Piped(Recorder, DualPipeLightningModule):
    def __init__(self, model, lr):
        super().__init__(model=model, num_chunks=8)
        self.lr = lr

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        return schedule(self.parameters(), self.lr)


def data(rows, seed, batch=16, **sampled):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    rows = TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())
    sampler = DistributedSampler(rows, shuffle=False, **sampled) if sampled else None
    return DataLoader(rows, batch_size=batch, sampler=sampler)


def train(kind, folder, devices, seed=0, steps=8, resume=None, accumulate=1, strategy=None, batch=16):
    """Fit over epochs of 4 batches, the last one of 8 rows, with validation in each."""
    module = {"stock": Stock, "piped": Piped}[kind](chain(seed), 0.02)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="at{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy or ("dualpipe" if kind == "piped" else "auto"),
        max_steps=steps,
        gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate,
        callbacks=[checkpoint, LearningRateMonitor()],
        logger=CSVLogger(folder, name="log"),
        log_every_n_steps=1,
        enable_progress_bar=kind == "piped",
        enable_model_summary=False,
    )
    trainer.losses = []
    # The sampler that Lightning would put in shuffles the training data.
    sampled = strategy.distributed_sampler_kwargs if strategy else {}
    trainer.fit(module, data(56, 1, batch, **sampled), data(40, 2, batch), ckpt_path=resume)
    found = {"losses": trainer.losses, "val": float(trainer.callback_metrics["val_loss"]), "step": trainer.global_step}
    found["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
    found["files"] = sorted(path.name for path in Path(folder).glob("*.ckpt"))
    found["validate"] = float(trainer.validate(module, data(40, 3, batch), verbose=False)[0]["val_loss"])
    return found


def train_replicas(folder, num_stages=2, **kwargs):
    from dualpipe_engine.integrations.lightning import DualPipeStrategy

    world = torch.distributed.get_world_size()
    return train("piped", folder, world, strategy=DualPipeStrategy(num_stages=num_stages), **kwargs)


def uneven_ranks(folder):
    """Each rank starts with weights and a random state of its own; the loader shuffles."""
    rank = torch.distributed.get_rank()
    module = Piped(chain(seed=rank), 0.02)
    seen = []
    module.pipeline_step = lambda batch: seen.append(batch[0].sum().item()) or type(module).pipeline_step(module, batch)
    trainer = Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy="dualpipe",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.losses = []
    trainer.fit(module, DataLoader(data(64, 1).dataset, batch_size=16, shuffle=True))
    pipe = module.dualpipe_wrapper
    whole = pipe.whole_state_dict(everywhere=True)
    state = pipe.local_module.state_dict()
    return {
        "seen": seen,
        "first": trainer.losses[0],
        "copies": all(torch.equal(whole[name], state[here]) for here, name in pipe.whole_names()),
        "names": sorted(whole),
    }
