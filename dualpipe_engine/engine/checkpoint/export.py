"""A checkpoint's weights as one state dict in safetensors, with config.json for a model of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError, MissingExtraError
from .description import Description, read_description
from .files import DESCRIPTION, damages, peek

WEIGHTS = "model.safetensors"


def export(checkpoint: Path, out: Path) -> list[Path]:
    """Write the weights of a checkpoint into a folder.

    Names are those of the whole model where an adapter cut it, and then the folder loads with `from_pretrained` if the
    model came from transformers; else those of the whole PipelineModule on one rank, tied weights once.

    Args:
        checkpoint: folder of one checkpoint, or of several, whose latest is taken.
        out: made if missing.

    Returns:
        The files written.

    Raises:
        CheckpointError: the checkpoint is not of this engine, not whole, or tensor parallel.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise MissingExtraError('export needs safetensors: pip install "dualpipe_engine[hf]"') from None
    folder = _one(checkpoint)
    about = read_description(folder)
    weights: dict[str, Tensor] = {}
    for path, prefix in _layers(folder, about):
        for name, tensor in peek(path, weights_only=True).items():
            weights.setdefault(prefix + name, tensor)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / WEIGHTS]
    # Tensors that share memory are refused, and so is memory with gaps.
    whole = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(whole, written[0], metadata={"format": "pt"})
    if about["model"] is not None and about["model"]["config"] is not None:
        written.append(out / "config.json")
        written[1].write_text(json.dumps(about["model"]["config"], indent=2) + "\n")
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


def _layers(folder: Path, about: Description) -> list[tuple[Path, str]]:
    """Files of layers in their order, and what to put before the names in each."""
    if cut := sorted(folder.glob("layer_*-model_[0-9]*-model_states.pt")):
        raise CheckpointError(f"{cut[0]} holds a part of a layer: export does not join tensor-parallel weights")
    found = []
    for number, layer in enumerate(about["layers"]):
        if layer["file"]:
            prefix = f"{number}." if layer["tied"] is None else f"tied_modules.{layer['tied']}."
            found.append((folder / f"layer_{number:02d}-model_states.pt", "" if about["model"] else prefix))
    if wrong := damages(path for path, _ in found):
        raise CheckpointError(f"the checkpoint is not whole: {', '.join(wrong)}")
    return found
