"""DualPipeLightningModule: a LightningModule whose model runs as one DualPipe pipeline over all devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from dualpipe_engine.compat.deepseek import Nest
from dualpipe_engine.errors import ConfigError

from .refusals import refuse_layers
from .stages import LayerEntry, LocalStages
from .strategy import DualPipeStrategy


class DualPipeLightningModule(LightningModule):
    """Give `criterion(outputs, targets)` and `configure_optimizers`, and train with `Trainer(strategy="dualpipe")`.

        class Model(DualPipeLightningModule):
            def __init__(self, model, lr):
                super().__init__(model=model, num_chunks=8)
                self.lr = lr

            def criterion(self, outputs, targets):
                return torch.nn.functional.cross_entropy(outputs, targets)

            def configure_optimizers(self):
                return torch.optim.Adam(self.dualpipe_wrapper.local_module.parameters(), lr=self.lr)

    A batch is `(inputs, targets)`, the same on all devices of a pipeline: all devices are one, unless
    `DualPipeStrategy(num_stages=...)` makes several, between which the samples are shared. It is cut along dimension 0
    into `num_chunks` equal micro-batches (into fewer where it does not divide); the loss is the mean of theirs.
    `training_step`, `validation_step` and `test_step` log `train_loss`, `val_loss` and `test_loss`; an override calls
    `pipeline_step(batch)` for the loss. Hooks on backward do not apply.

    Args:
        model: the layers in order: an `nn.Sequential`, or a list of modules or of `deepspeed.pipe.LayerSpec`s. It is
            handed over: layers of other devices' stages lose their memory. A checkpoint's "state_dict" fits the
            `nn.Sequential`.
        num_chunks: micro-batches of a batch.

    Attributes:
        dualpipe_wrapper: from `configure_model` on, this device's part of the model; `local_module` holds its stages.

    Raises:
        ConfigError: the model is no chain of layers, or `num_chunks` is below 1.
    """

    dualpipe_wrapper: LocalStages

    def __init__(self, model: nn.Sequential | Iterable[LayerEntry], num_chunks: int) -> None:
        super().__init__()
        if num_chunks < 1:
            raise ConfigError(f"num_chunks must be at least 1, got {num_chunks}")
        self.num_chunks = num_chunks
        layers = _layers_of(model)
        refuse_layers(layers)
        self._layers = layers  # a plain dict: registered modules would be moved and counted

    def configure_model(self) -> None:
        if not hasattr(self, "dualpipe_wrapper"):
            strategy = self.trainer.strategy
            if not isinstance(strategy, DualPipeStrategy):
                raise ConfigError(f'{type(self).__name__} needs Trainer(strategy="dualpipe") on two or more devices')
            self.dualpipe_wrapper = LocalStages(self._layers, strategy.root_device, strategy.num_stages)

    def criterion(self, outputs: Nest, targets: Nest) -> torch.Tensor:
        """The loss of one micro-batch, a mean over its samples (scalar)."""
        raise NotImplementedError(f"{type(self).__name__} must define criterion(outputs, targets)")

    def pipeline_step(self, batch: Nest) -> torch.Tensor:
        """Run a batch; with gradients enabled, add its gradients to those of this device's parameters.

        Returns:
            The mean loss over the micro-batches of all pipelines (scalar), the same on every device.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigError(
                f"a batch must be a pair (inputs, targets), got {type(batch).__name__}: let the loader make pairs, or "
                "override training_step and call pipeline_step((inputs, targets))"
            )
        inputs, targets = batch
        inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        one_target = not isinstance(targets, (tuple, list))
        targets = (targets,) if one_target else targets
        pipe, rows = self.dualpipe_wrapper, len(inputs[0])
        chunks = max(n for n in range(1, min(self.num_chunks, rows) + 1) if rows % n == 0)
        parts = chunks * pipe.replicas * (self.trainer.accumulate_grad_batches if torch.is_grad_enabled() else 1)
        first = (chunks + 1) // 2 * (rows // chunks)
        entering, leaving = slice(0, first), slice(first, rows)
        if pipe.is_last_rank:
            entering, leaving = leaving, entering

        def loss_of_chunk(*values: Nest) -> torch.Tensor:
            outputs, labels = values[: -len(targets)], values[-len(targets) :]
            loss = self.criterion(outputs[0] if len(outputs) == 1 else outputs, labels[0] if one_target else labels)
            return loss / parts

        losses, _ = pipe.step(
            *(each[entering] for each in inputs),
            num_chunks=chunks,
            criterion=loss_of_chunk,
            labels=[each[leaving] for each in targets],
        )
        total = torch.zeros((), dtype=torch.float64, device=self.device) if losses is None else losses.double().sum()
        total *= parts / (chunks * pipe.replicas)
        dist.all_reduce(total)
        return total.float()

    def training_step(self, batch: Nest, batch_idx: int) -> torch.Tensor:
        loss = self.pipeline_step(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Nest, batch_idx: int) -> None:
        self.log("val_loss", self.pipeline_step(batch), prog_bar=True, batch_size=_rows(batch), sync_dist=True)

    def test_step(self, batch: Nest, batch_idx: int) -> None:
        self.log("test_loss", self.pipeline_step(batch), batch_size=_rows(batch), sync_dist=True)

    def predict_step(self, *args: object, **kwargs: object) -> NoReturn:
        """
        Raises:
            ConfigError: outputs are on the device of the last stage alone.
        """
        raise ConfigError("predict is not there for a pipeline: load the checkpoint into the nn.Sequential and predict")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: Lightning calls it after `training_step`, which has made the gradients; the strategy clears them."""

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all stages."""
        if gradient_clip_val and gradient_clip_algorithm != "value":
            self.dualpipe_wrapper.clip_gradients(float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


_UNTIED = (
    "no one would add up the gradients of both uses; give each layer its own, or train a PipelineModule with "
    "TiedLayerSpecs by dualpipe_engine.initialize"
)


def _layers_of(model: nn.Module | Iterable[LayerEntry]) -> dict[str, nn.Module]:
    if isinstance(model, nn.Module) and not isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise ConfigError(
            f"model must be an nn.Sequential or a list of layers, so that it can be cut into stages, got "
            f"{type(model).__name__}"
        )
    parts: dict[str, LayerEntry] = (
        model._modules if isinstance(model, nn.Module) else {str(index): each for index, each in enumerate(model)}
    )
    for name, each in parts.items():
        if hasattr(each, "tied_weight_attr"):
            raise ConfigError(f"layer {name} is a TiedLayerSpec: {_UNTIED}")
    layers: dict[str, LayerEntry] = {
        name: each.build() if hasattr(each, "build") else each for name, each in parts.items()
    }
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Module):
            raise ConfigError(f"layer {name} must be an nn.Module or a LayerSpec, got {type(layer).__name__}")
        for param in layer.parameters():
            if owners.setdefault(id(param), name) != name:
                raise ConfigError(f"layers {owners[id(param)]} and {name} share a parameter: {_UNTIED}")
    return layers


def _rows(batch: Nest) -> int:
    inputs = batch[0][0] if isinstance(batch[0], (tuple, list)) else batch[0]
    return len(inputs)
