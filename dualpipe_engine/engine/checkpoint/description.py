"""Description of a checkpoint: what `dualpipe export` must know to put its files together, as JSON beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from ...errors import CheckpointError
from ...models.config import MoEConfig
from ...schedule.plain_json import parse
from .files import DESCRIPTION


class LayerFile(TypedDict):
    """Of one layer.

    Attributes:
        file: whether it has a file.
        tied: the key of its tie; None where it is not tied.
    """

    file: bool
    tied: str | None


class WholeModel(TypedDict):
    """What the layers say of the model that they are cut from (`whole_model`).

    Attributes:
        config: of a model of transformers; None for another.
        published: of our own transformer, which has the published format; None for another.
    """

    config: dict[str, object] | None
    published: MoEConfig | None


class Description(TypedDict):
    """Attributes:
    layers: in the order of the model.
    model: None where they say nothing.
    """

    layers: list[LayerFile]
    model: WholeModel | None


def description(module: PipelineModule) -> dict[str, object]:
    """The description of what `module` saves, as JSON has it."""
    layers: list[LayerFile] = []
    for spec in module._layer_specs:
        tied = isinstance(spec, TiedLayerSpec)
        has_file = spec.forward_fn is None if tied else isinstance(spec, (LayerSpec, nn.Module))
        layers.append({"file": has_file, "tied": spec.key if tied else None})
    model = next((part.whole_model for part in module.modules() if hasattr(part, "whole_model")), None)
    return {"layers": layers, "model": model}


def read_description(folder: Path) -> Description:
    """The description of the checkpoint in `folder`, looked at.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / DESCRIPTION
    try:
        found = parse(path.read_text())
        layers: list[LayerFile] = [{"file": bool(each["file"]), "tied": each["tied"]} for each in found["layers"]]
        model = found["model"] or {}
        config, fields = model.get("config"), model.get("published")
        ours = None if fields is None else MoEConfig.from_fields(fields)
        if not (config is None or isinstance(config, dict)):
            raise TypeError("its configuration is no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    return {"layers": layers, "model": {"config": config, "published": ours} if model else None}
