"""Lightning with a language model whose sequences two pipelines share; on pooled ranks, or as a script."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from dualpipe_engine.integrations.lightning import DualPipeStrategy
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from dualpipe_engine.compat import DualPipeLightningModule
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.transformer import layers

warnings.filterwarnings("ignore")
VOCABULARY, LENGTH, ROWS, CHUNKS = 31, 8, 8, 4


def model():
    torch.manual_seed(3)
    config = MoEConfig(
        vocabulary=VOCABULARY, hidden=16, heads=2, head=8, rotary=4, kv_rank=8, blocks=3, expert_inner=8, experts=4,
        attention="grouped", dense_blocks=1, bias_rate=0.0,
    )  # fmt: skip
    return nn.Sequential(*[spec.build() for spec in layers(config)])


class Rows(torch.utils.data.Dataset):
    """Tokens and the next ones, of which half of the rows count in their first places alone; or tokens alone."""

    def __init__(self, labels=True):
        self.labels = labels

    def __len__(self):
        return 5 * ROWS

    def __getitem__(self, index):
        tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
        if not self.labels:
            return tokens[:-1]
        labels = tokens[1:].clone()
        labels[2 + index % 2 * LENGTH :] = -100
        return tokens[:-1], labels


class Losses:
    def on_validation_start(self):
        self.rows.reset()

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.rows.update(len(batch[0]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.losses.append(float(outputs["loss"]))

    def criterion(self, outputs, targets):
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-4)  # so that rounding stays small


class Stock(Losses, LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, SumMetric()

    def loss(self, batch):
        """The mean over as many micro-batches."""
        parts = zip(*(each.chunk(CHUNKS) for each in batch), strict=True)
        return torch.stack([self.criterion(self.model(inputs), targets) for inputs, targets in parts]).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0] if isinstance(batch, list) else batch)


class Piped(Losses, DualPipeLightningModule):
    def __init__(self, model):
        super().__init__(model, num_chunks=CHUNKS)
        self.rows = SumMetric()


def train(folder, size=0, steps=5, resume=None):
    """Losses, evaluation and predictions; `size`: so many pipelines of two share each sequence, 0: the stock one."""
    strategy = DualPipeStrategy(num_stages=2, deepspeed_config={"sequence_parallel_size": size}) if size else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=2 * size or 1, strategy=strategy, max_steps=steps, default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.losses = []
    module = (Piped if size else Stock)(model())
    rows = DataLoader(Rows(), batch_size=ROWS)
    trainer.fit(module, rows, rows, ckpt_path=resume)
    evaluated = float(trainer.callback_metrics["val_loss"])
    counted = int(module.rows.compute())
    trainer.save_checkpoint(Path(folder) / f"{steps}.ckpt")
    predicted = [trainer.predict(module, each) for each in (rows, DataLoader(Rows(labels=False), ROWS))]
    return {
        "losses": trainer.losses,
        "val": evaluated,
        "rows": counted,
        "predicted": [torch.cat(each) for each in predicted],
    }


class Shorter(Piped):
    """Its sequences have an odd number of tokens."""

    def pipeline_step(self, batch):
        return super().pipeline_step([each[:, :-1] for each in batch])


def refused(folder):
    strategy = DualPipeStrategy(num_stages=2, deepspeed_config={"sequence_parallel_size": 2})
    trainer = Trainer(accelerator="cpu", devices=4, strategy=strategy, default_root_dir=folder, logger=False)
    try:
        trainer.fit(Shorter(model()), DataLoader(Rows(), batch_size=ROWS))
    except ConfigError as error:
        return str(error)


if __name__ == "__main__":  # FOLDER STEPS: in this process, or on all ranks of a launcher
    folder, rank = sys.argv[1], os.environ.get("RANK")
    found = train(folder, size=0 if rank is None else 2, steps=int(sys.argv[2]))
    torch.save(found, Path(folder) / f"{rank or 0}.pt")
