"""DualPipeLightningModule: a LightningModule whose model runs as one DualPipe pipeline over all devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER
from dualpipe_engine.errors import ConfigError

from .batches import inputs_and_targets, rows_of, split
from .layers import Chain, LayerEntry, layers_of
from .pipeline import TIED, Pipeline
from .strategy import DualPipeStrategy

CHAIN, STAGES = "chain.", "dualpipe_wrapper.local_module."  #: where layers are before and after they become stages


class DualPipeLightningModule(LightningModule):
    """Give `criterion(outputs, targets)` and `configure_optimizers`, and train with `Trainer(strategy="dualpipe")`.

        class Model(DualPipeLightningModule):
            def __init__(self, model, lr):
                super().__init__(model=model, num_chunks=8)
                self.lr = lr

            def criterion(self, outputs, targets):
                return torch.nn.functional.cross_entropy(outputs, targets)

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=self.lr)

    A batch is `(inputs, targets)` or a dict, the same on all devices of a pipeline: all devices are one, unless
    `DualPipeStrategy(num_stages=...)` makes several, between which the samples are shared. It is cut along dimension 0
    into `num_chunks` equal micro-batches (into fewer where it does not divide); the loss is the mean of theirs.
    `training_step`, `validation_step` and `test_step` log `train_loss`, `val_loss` and `test_loss`; an override calls
    `pipeline_step(batch)` for the loss, in `training_step` once, and returns it: factors and other terms belong into
    `criterion`. `predict_step` returns the outputs. Hooks on backward do not apply.

    `state_dict` is that of the model, whole on rank 0 and empty on the others, and collective once there are stages;
    `load_state_dict` takes it. So a checkpoint's "state_dict" fits the `nn.Sequential`, and `load_from_checkpoint`
    gives a module that trains on any devices, or runs the whole model in one process when it is called.

    Args:
        model: the layers in order: an `nn.Sequential`, or a list of modules or of `deepspeed.pipe.LayerSpec`s and
            `TiedLayerSpec`s. It is handed over: layers of other devices' stages lose their memory.
        num_chunks: micro-batches of a batch.
        targets: in batches that are dicts, the name of what is for `criterion`, or several, which it gets as a dict;
            the others go to the first layer, as a dict if there are several.

    Attributes:
        dualpipe_wrapper: from `configure_model` on, this device's part of the model; `local_module` holds its stages.

    Raises:
        ConfigError: the model is no chain of layers, or `num_chunks` is below 1.
    """

    dualpipe_wrapper: Pipeline

    def __init__(
        self, model: nn.Sequential | Iterable[LayerEntry], num_chunks: int, targets: str | tuple[str, ...] = "labels"
    ) -> None:
        super().__init__()
        if num_chunks < 1:
            raise ConfigError(f"num_chunks must be at least 1, got {num_chunks}")
        self.num_chunks = num_chunks
        self._targets = (targets,) if isinstance(targets, str) else tuple(targets)
        self._layers = layers_of(model)  # a plain dict: what stages have left is not registered
        self._later: dict[str, Any] = {}  # weights of layers that are not built yet
        self.chain = Chain(self._layers)
        self._register_state_dict_hook(_named_as_in_the_model)
        self._register_load_state_dict_pre_hook(_named_as_here, with_module=True)

    def configure_model(self) -> None:
        """Make the stages, and the engine that runs them. Collective over all ranks."""
        if self._trainer is None:
            return  # a checkpoint is loaded: the layers stay together until there is a Trainer
        if not isinstance(self._trainer.strategy, DualPipeStrategy):
            raise ConfigError(f'{type(self).__name__} needs Trainer(strategy="dualpipe") on two or more devices')
        self._trainer.strategy.make_pipeline(self, self._layers)

    def forward(self, *inputs: Nest) -> Nest:
        """The whole model in this process, before there are stages."""
        if hasattr(self, "dualpipe_wrapper"):
            raise ConfigError(
                "the model is cut into stages: call pipeline_step(batch) for a loss, or Trainer.predict, and leave out "
                "an example_input_array, on which a summary or a logger's graph calls the whole model"
            )
        return self.chain(*inputs)

    def criterion(self, outputs: Nest, targets: Nest) -> torch.Tensor:
        """The loss of one micro-batch, a mean over its samples (scalar)."""
        raise NotImplementedError(f"{type(self).__name__} must define criterion(outputs, targets)")

    def pipeline_step(self, batch: Nest) -> torch.Tensor:
        """Run a batch; with gradients enabled, add its gradients to those that the next step takes.

        Returns:
            The mean loss over the micro-batches of all pipelines (scalar), the same on every device.
        """
        inputs, targets = inputs_and_targets(batch, self._targets)
        micros = split(inputs, targets, self.num_chunks)
        if not torch.is_grad_enabled():
            with torch.inference_mode(False):
                return self.dualpipe_wrapper.evaluate(micros)
        strategy: Any = self.trainer.strategy
        loss = self.dualpipe_wrapper.train_step(micros, self.trainer.accumulate_grad_batches, strategy.ends_step)
        strategy.trained.append(loss)
        return loss

    def training_step(self, batch: Nest, batch_idx: int) -> torch.Tensor:
        loss = self.pipeline_step(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=self._rows(batch))
        return loss

    def validation_step(self, batch: Nest, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.pipeline_step(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=self._rows(batch), sync_dist=True)

    def test_step(self, batch: Nest, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.pipeline_step(batch), batch_size=self._rows(batch), sync_dist=True)

    def predict_step(self, batch: Nest, batch_idx: int, dataloader_idx: int = 0) -> Nest:
        """The outputs of the last stage, on every device of a pipeline. A batch may have targets, or be the inputs."""
        inputs, targets = inputs_and_targets(batch, self._targets, needed=False)
        with torch.inference_mode(False):
            return self.dualpipe_wrapper.predict(split(inputs, targets, self.num_chunks))

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As Lightning's.

        Raises:
            ConfigError: the stages run, so that it is one micro-batch's, on some of the devices.
        """
        if hasattr(self, "dualpipe_wrapper") and self.dualpipe_wrapper.runs:
            raise ConfigError(
                f"{name!r} is logged within the stages, of a micro-batch on some of the devices: log in "
                "training_step what pipeline_step returns, or in validation_step what predict_step returns"
            )
        super().log(name, *args, **kwargs)

    def _rows(self, batch: Nest) -> int:
        return rows_of(inputs_and_targets(batch, self._targets)[0])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: Lightning calls it after `training_step`, which has made the gradients; the step clears them."""

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By value; by the norm over all stages the engine clips in its step."""
        if gradient_clip_val and gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        return super().load_state_dict(dict(state_dict), strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without the layers as they were given, which stages may have left."""
        return super().__getstate__() | {"_layers": {}}


def _named_as_in_the_model(
    module: DualPipeLightningModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """After `state_dict`: the names of the model, and all of it on rank 0."""
    for name in [name for name in state if name.startswith(prefix + CHAIN)]:
        state[prefix + name[len(prefix + CHAIN) :]] = state.pop(name)
    if not hasattr(module, "dualpipe_wrapper"):
        return
    for name in [name for name in state if name.startswith(prefix + STAGES)]:
        del state[name]
    state.update({prefix + name: tensor for name, tensor in module.dualpipe_wrapper.whole_state_dict().items()})


def _named_as_here(module: DualPipeLightningModule, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: the names of this process, and nothing of other ranks."""
    if not hasattr(module, "dualpipe_wrapper"):
        for name in list(state):
            layer = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
            if layer in module.chain._modules:
                state[prefix + CHAIN + name[len(prefix) :]] = state.pop(name)
            elif layer in module.chain.specs or (module.chain.specs and f"{layer}." == TIED):
                module._later[name[len(prefix) :]] = state.pop(name)
        return
    pipeline = module.dualpipe_wrapper
    for name in [name for name in state if pipeline.is_elsewhere(name[len(prefix) :])]:
        del state[name]
    for name, whole in pipeline.whole_names():
        if prefix + whole in state:
            state[prefix + STAGES + name] = state.pop(prefix + whole)
    for name, tensor in pipeline.local_module.state_dict().items():
        if name.startswith(PLACEHOLDER):
            state[prefix + STAGES + name] = tensor
