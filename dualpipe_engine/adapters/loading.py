"""Models on the meta device: built from a configuration, and each stage's weights made or read on its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, MissingExtraError
from .stage import Stage, materialize

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def empty_model(config: Any, folder: str | None) -> nn.Module:
    """The model of a transformers configuration on the meta device.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: neither a configuration nor a folder is given, or the model's class is not known.
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
        self._files: dict[str, Path] | None = None if folder is None else _files(Path(folder))

    def fill(self, stage: Stage) -> None:
        """Give storage and values to the parameters and buffers of `stage`, on the CPU.

        Raises:
            ConfigError: the folder lacks a weight.
        """
        materialize(stage, torch.device("cpu"))
        seed = torch.initial_seed()
        with torch.random.fork_rng(devices=[]):
            for name, module in stage.named_modules():
                torch.manual_seed((seed + _number(name)) % 2**63)
                self._model._init_weights(module)  # type: ignore[operator]
        if self._files is not None:
            self._read(stage, self._files)

    def _read(self, stage: Stage, files: dict[str, Path]) -> None:
        from safetensors import safe_open

        wanted: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        tied: set[int] = set()
        missing: dict[int, str] = {}
        held = list(stage.state_dict(keep_vars=True).items())
        for name, tensor in held:
            key = _key(name, files, getattr(self._model, "base_model_prefix", ""))
            if key is None:
                missing[id(tensor)] = name
            elif id(tensor) not in tied:
                tied.add(id(tensor))
                wanted.setdefault(files[key], []).append((key, tensor))
        for name in (name for tensor, name in missing.items() if tensor not in tied):
            source = self._tie_of(name)
            key = None if source is None else _key(source, files, getattr(self._model, "base_model_prefix", ""))
            if key is None:
                raise ConfigError(
                    f"the safetensors files have no {name}: save the model with save_pretrained(..., "
                    "save_original_format=False), or load it whole with from_pretrained and pass the model"
                )
            wanted.setdefault(files[key], []).append((key, dict(held)[name]))
        for path, entries in wanted.items():
            with safe_open(path, framework="pt") as opened, torch.no_grad():
                for key, tensor in entries:
                    tensor.copy_(opened.get_tensor(key))

    def _tie_of(self, name: str) -> str | None:
        """Another name of the same parameter in the model."""
        names = dict(self._model.named_parameters(remove_duplicate=False))
        return next((other for other, param in names.items() if param is names.get(name) and other != name), None)


def _number(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def _files(folder: Path) -> dict[str, Path]:
    """Weight -> file."""
    if (folder / INDEX).exists():
        weights = json.loads((folder / INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weights.items()}
    if not (folder / SINGLE).exists():
        raise ConfigError(f"{folder} has neither {INDEX} nor {SINGLE}: save the model there with save_pretrained")
    from safetensors import safe_open

    with safe_open(folder / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)


def _key(name: str, files: dict[str, Path], prefix: str) -> str | None:
    """The weight's name in the files, which may be those of the model without its head."""
    for key in (name, name.removeprefix(prefix + "."), f"{prefix}.{name}"):
        if key in files:
            return key
    return None
