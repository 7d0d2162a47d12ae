"""Train a small model with Lightning under DualPipe.

    python examples/lightning_example.py --num-gpus 2       # CPU processes where there are not so many GPUs
    dualpipe report runs/lightning --out report.html        # after a run with --profile

Needs the extra: pip install "dualpipe_engine[lightning]"
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dualpipe_engine.compat import DualPipeLightningModule
from dualpipe_engine.utils import enable_profiling, get_profiler

WIDTH, CLASSES = 64, 4


class Block(nn.Module):
    """x `[batch, WIDTH]` -> the same shape."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Classifier(DualPipeLightningModule):
    def __init__(self, model, lr):
        super().__init__(model=model, num_chunks=8)
        self.lr = lr

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def samples(count: int, seed: int) -> TensorDataset:
    """Points in a plane; the class is the quadrant."""
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(points, (points[:, 0] > 0).long() * 2 + (points[:, 1] > 0).long())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=2, help="devices of the pipeline, an even number")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="runs/lightning", help="logs and checkpoints")
    parser.add_argument("--profile", action="store_true", help="leave a profile in the folder")
    args = parser.parse_args()

    if args.profile:
        enable_profiling(log_dir=args.folder)
    seed_everything(1, verbose=False)
    layers = [nn.Linear(2, WIDTH), *(Block() for _ in range(6)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)]
    trainer = Trainer(
        strategy="dualpipe",
        accelerator="gpu" if torch.cuda.device_count() >= args.num_gpus else "cpu",
        devices=args.num_gpus,
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.folder, name=None),
        callbacks=[LearningRateMonitor()],
        log_every_n_steps=10,
    )
    module = Classifier(layers, lr=3e-3)
    train = DataLoader(samples(3200, 1), batch_size=64, shuffle=True)
    held_out = DataLoader(samples(640, 2), batch_size=64)
    trainer.fit(module, train, held_out)
    if args.profile:
        get_profiler().save_to_file("dualpipe_profile.json")
    trainer.validate(module, held_out, verbose=trainer.is_global_zero)


if __name__ == "__main__":
    main()
