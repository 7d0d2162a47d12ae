"""A checkpoint's weights as one state dict in safetensors, with config.json for a model of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from deepspeed.utils import logger
from torch import Tensor

from ...errors import CheckpointError, MissingExtraError
from ...models.hf_weights import published
from ...schedule.aside import write_whole
from ..placing.own_files import LOSS, file_of_layer
from .description import Description, read_description
from .files import DESCRIPTION, damages, peek

WEIGHTS = "model.safetensors"

Held: TypeAlias = dict[int, tuple[dict[str, Tensor], str]]
"""Number of a layer -> its tensors, and what to put before their names."""


def export(checkpoint: Path, out: Path) -> list[Path]:
    """Write the weights of a checkpoint into a folder.

    Names are those of the whole model where an adapter cut it, and then the folder loads with `from_pretrained` if the
    model came from transformers; those of published DeepSeek-V3 where `models` has the layers and transformers the same
    model; else those of the whole PipelineModule on one rank, tied weights once.

    Args:
        checkpoint: folder of one checkpoint, or of several, whose latest is taken.
        out: made if missing.

    Returns:
        The files written.

    Raises:
        CheckpointError: the checkpoint is not of this engine, not whole or tensor parallel, or `out` cannot be written.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtraError('export needs safetensors: pip install "dualpipe_engine[hf]"') from None
    folder = _one(checkpoint)
    about = read_description(folder)
    held = {
        number: (peek(path, weights_only=True), prefix) for number, (path, prefix) in _layers(folder, about).items()
    }
    config, weights = _config(about), _published(held, about)
    if weights is None:
        config = config if _is_whole(about) else None
        weights = {prefix + name: tensor for layer, prefix in reversed(held.values()) for name, tensor in layer.items()}
        weights |= {} if _is_whole(about) else _own(folder, about)
    written = [out / WEIGHTS]
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if others := sorted(weights.keys() - tensors):
        logger.warning(f"{', '.join(others)} cannot be in {WEIGHTS}, which holds tensors alone, and left out")
    # Tensors that share memory are refused, and so is memory with gaps.
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(whole, written[0], metadata={"format": "pt"})
        if config is not None:
            written.append(out / "config.json")
            write_whole(written[1], json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{written[-1]} cannot be written ({error})") from None
    return written


def _one(checkpoint: Path) -> Path:
    """The folder of one checkpoint."""
    latest = checkpoint / "latest"
    folder = checkpoint / latest.read_text().strip() if latest.is_file() else checkpoint
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(
            f"{folder / DESCRIPTION} is missing: --checkpoint takes what save_checkpoint of dualpipe_engine wrote (one "
            'of stock DeepSpeed: load it with "schedule": "1f1b" and load_optimizer_states=False, and save it)'
        )
    return folder


def _config(about: Description) -> dict[str, object] | None:
    return None if about["model"] is None else about["model"]["config"]


def _is_whole(about: Description) -> bool:
    """Whether an adapter has cut the model, so that names in the files are those of the whole one."""
    return about["model"] is not None and about["model"]["published"] is None


def _published(held: Held, about: Description) -> dict[str, Tensor] | None:
    """The entries of published DeepSeek-V3; None where the model is no other, or has other layers too."""
    config = None if about["model"] is None else about["model"]["published"]
    if config is None or _config(about) is None:
        return None
    found: dict[str, Tensor] = {}
    try:
        for number, (layer, _) in held.items():
            found |= published(layer, number, config)
    except (KeyError, IndexError):
        return None
    return found


def _own(folder: Path, about: Description) -> dict[str, Tensor]:
    """What is in files of this package."""
    files = {f"{number}.": file_of_layer(number) for number, layer in enumerate(about["layers"]) if layer["tied"]}
    found: dict[str, Tensor] = {}
    for prefix, name in (files | {"loss_fn.": LOSS}).items():
        if (folder / name).is_file():
            found |= {prefix + key: tensor for key, tensor in peek(folder / name, weights_only=True).items()}
    return found


def _layers(folder: Path, about: Description) -> dict[int, tuple[Path, str]]:
    """Number of a layer -> its file, and what to put before the names in it."""
    if cut := sorted(folder.glob("layer_*-model_[0-9]*-model_states.pt")):
        raise CheckpointError(f"{cut[0]} holds a part of a layer: export does not join tensor-parallel weights")
    found = {}
    for number, layer in enumerate(about["layers"]):
        if layer["file"]:
            prefix = f"{number}." if layer["tied"] is None else f"tied_modules.{layer['tied']}."
            found[number] = folder / f"layer_{number:02d}-model_states.pt", "" if _is_whole(about) else prefix
    if wrong := damages(path for path, _ in found.values()):
        raise CheckpointError(f"the checkpoint is not whole: {', '.join(wrong)}")
    return found
