"""A folder of safetensors, as transformers writes it: one file, or several with an index."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, MissingExtraError
from ..schedule.plain_json import parse

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def files_of(folder: Path) -> dict[str, Path]:
    """Name of a tensor -> file that holds it.

    Raises:
        ConfigError: the folder has neither an index nor the one file.
        MissingExtraError: safetensors is not installed.
    """
    if (folder / INDEX).exists():
        weights = parse((folder / INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weights.items()}
    if not (folder / SINGLE).exists():
        raise ConfigError(f"{folder} has neither {INDEX} nor {SINGLE}: save the model there with save_pretrained")
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingExtraError("weights in files of safetensors need it: pip install 'dualpipe_engine[hf]'") from error
    with safe_open(folder / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)
