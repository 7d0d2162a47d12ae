"""Models on the meta device: built from a configuration, and each stage's weights made or read on its own."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, MissingExtraError
from ..models.safetensors_folder import files_of
from .conversion import sources_of
from .losses import ModelConfig
from .stage import Stage


def empty_model(config: ModelConfig, folder: str | None) -> nn.Module:
    """The model of a transformers configuration on the meta device.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: neither a configuration nor a folder is given, the model's class is not known, or the folder's
            weights are quantized.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "building from a configuration needs transformers: pip install 'dualpipe_engine[hf]'"
        ) from error
    if config is None:
        if folder is None:
            raise ConfigError("get_model_adapter needs a model, a config or a folder")
        config = transformers.AutoConfig.from_pretrained(folder)
    if folder is not None and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the weights in {folder} are quantized, and stages read plain ones: load the model with "
            "from_pretrained(dtype=...) and its own dequantization, and save that"
        )
    names = config.architectures or []
    kind: Any = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
    if kind is None:
        raise ConfigError(f"transformers has no class {names[0]}, which the configuration names in architectures")
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        if names:
            return kind._from_config(config, dtype=dtype)
        return kind.from_config(config, dtype=dtype)


class Weights:
    """Fills stages of a model on the meta device.

    Args:
        model: the model, on the meta device.
        folder: of safetensors files; None makes fresh weights, as the model's own initialization does. Those of a
            module depend on `torch.initial_seed()` and the module's name alone, so every cut starts with the same
            model.
    """

    def __init__(self, model: nn.Module, folder: str | None) -> None:
        self._model = model
        self._files: dict[str, Path] | None = None if folder is None else files_of(Path(folder))
        self._sources = sources_of(model, self._files or ())

    def fill(self, stage: Stage) -> None:
        """Give storage and values to the parameters and buffers of `stage`, on the CPU.

        Raises:
            ConfigError: the folder lacks a weight.
        """
        materialize(stage, torch.device("cpu"))
        seed = torch.initial_seed()
        with torch.random.fork_rng(devices=[]):
            for name, module in reversed(list(stage.named_modules())):  # children first, as transformers does
                torch.manual_seed((seed + _number(name)) % 2**63)
                self._model._init_weights(module)  # type: ignore[operator]
        if self._files is not None:
            self._read(stage, self._files)

    def _read(self, stage: Stage, files: dict[str, Path]) -> None:
        from safetensors import safe_open

        held: dict[str, torch.Tensor] = stage.state_dict(keep_vars=True)
        wanted: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in sorted(held.items(), key=lambda each: each[0] not in self._sources):
            if id(tensor) in wanted:  # tied to one that has a source
                continue
            known = name if name in self._sources else self._tie_of(name)
            if known not in self._sources:
                raise ConfigError(
                    f"the safetensors files have nothing that becomes {name}: load the model whole with "
                    "from_pretrained and pass it, or save it in its own names with save_pretrained(..., "
                    "save_original_format=False)"
                )
            wanted[id(tensor)] = known, tensor
        with ExitStack() as stack, torch.no_grad():
            opened: dict[Path, Any] = {}

            def read(entry: str) -> torch.Tensor:
                path = files[entry]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                found: torch.Tensor = opened[path].get_tensor(entry)
                return found

            made: dict[str, torch.Tensor] = {}
            for known, tensor in wanted.values():
                if known not in made:
                    made |= self._sources[known].weights(self._model, read)
                tensor.copy_(made.pop(known))

    def _tie_of(self, name: str) -> str | None:
        """Another name of the same parameter in the model."""
        names = dict(self._model.named_parameters(remove_duplicate=False))
        return next((other for other, param in names.items() if param is names.get(name) and other != name), None)


def _number(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give storage to everything of `module` that is on the meta device, keeping ties between its parts."""
    seen: dict[int, torch.Tensor] = {}
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]  # type: ignore[list-item]
        for held in tables:
            for key, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in seen:
                    made: torch.Tensor = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    seen[id(tensor)] = made
                held[key] = seen[id(tensor)]
