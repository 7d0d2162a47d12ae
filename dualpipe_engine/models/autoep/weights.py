"""The weights of a block whose experts are shared, under the names and in the shapes of the block that was replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from deepspeed.module_inject.auto_ep_config import MoELayerSpec
from deepspeed.moe.fused_expert_layout import classify_fused_gate_up_layout
from torch import Tensor, nn

Dict = dict[str, Tensor]


@runtime_checkable
class Unread(Protocol):
    """A layer whose experts have no values yet, so that a rank can take a share of them."""

    @property
    def unread(self) -> list[str]:
        """Names of the modules, from the layer."""

    def share(self, path: str, names: Sequence[str], experts: range | None, total: int) -> Dict:
        """Weights of a module.

        Args:
            path: of the module.
            names: of the weights, from the module.
            experts: of stacked ones, `[total, ...]`, those of these experts; None: all of each.
            total: experts in all.
        """

    def fill(self) -> None:
        """Give values to all that has none."""


class SourceForm(NamedTuple):
    """How the block that was replaced kept its weights.

    Args:
        spec: of the block, by DeepSpeed's parser.
        hidden_first: whether its stacked weights have the hidden dimension before the inner one.
        linear: whether each expert has `nn.Linear`s, of a list of experts.
    """

    spec: MoELayerSpec
    hidden_first: bool
    linear: bool

    def to_source(self, own: Dict, prefix: str) -> None:
        """Rename and reshape in place: the weights of all experts, `[experts, ...]`, and of the router."""
        w1, w2, w3 = (own.pop(f"{prefix}experts.{name}") for name in ("w1", "w2", "w3"))
        own.update(self._experts(w1, w2, w3, f"{prefix}{self.spec.experts_name}."))
        for ours, theirs in self._others(prefix):
            for name in [name for name in own if name == ours or name.startswith(f"{ours}.")]:
                own[theirs + name.removeprefix(ours)] = own.pop(name)

    def from_source(self, given: Dict, prefix: str) -> None:
        """The inverse of `to_source`; what has other names stays."""
        for ours, theirs in self._others(prefix):
            for name in [name for name in given if name == theirs or name.startswith(f"{theirs}.")]:
                given.setdefault(ours + name.removeprefix(theirs), given.pop(name))
        experts = f"{prefix}{self.spec.experts_name}."
        names = {name: experts + name for name in self._names()}
        if not all(full in given for full in names.values()):
            return
        parts = self._stacked({name: given.pop(full) for name, full in names.items()})
        given.update({f"{prefix}experts.{name}": part for name, part in zip(("w1", "w2", "w3"), parts, strict=True)})

    def share(self, read: Callable[[list[str], range | None], Dict], experts: range) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2 and w3, `[len(experts), ...]`, of experts that nobody has read.

        Args:
            read: from names within the module of experts to weights; of stacked ones those of some experts, where a
                range is given.
            experts: these.
        """
        names = self._names()
        if self.spec.expert_storage == "fused_3d":
            return self._stacked(read(names, experts))
        return self._stacked(read([name for name in names if int(name.split(".")[0]) in experts], None))

    def _others(self, prefix: str) -> list[tuple[str, str]]:
        """Pairs of names of everything else; ours and those of the block."""
        spec = self.spec
        pairs = [("router.gate", spec.router_name)]
        if (path := spec.e_score_correction_bias_path) is not None:
            pairs.insert(
                0, ("router.e_score_correction_bias", ".".join(filter(None, [path, "e_score_correction_bias"])))
            )
        if spec.has_shared_experts:
            pairs.append(("shared_experts", spec.shared_experts_name))
        if spec.shared_experts_gate_name:
            pairs.append(("shared_experts_gate", spec.shared_experts_gate_name))
        return [(prefix + ours, prefix + theirs) for ours, theirs in pairs if ours != theirs]

    def _names(self) -> list[str]:
        spec = self.spec
        names = [name for name in (spec.expert_w1_name, spec.expert_w2_name, spec.expert_w3_name) if name is not None]
        if spec.expert_storage == "fused_3d":
            return names
        ending = ".weight" if self.linear else ""
        return [f"{number}.{name}{ending}" for name in names for number in range(spec.num_experts)]

    def _experts(self, w1: Tensor, w2: Tensor, w3: Tensor, prefix: str) -> Dict:
        parts = [w1, w2, w3] if self.spec.expert_w3_name is not None else [torch.cat([w1, w3], dim=1), w2]
        if self.spec.expert_storage != "fused_3d":
            values = [each for part in parts for each in part]
            return {prefix + name: value.clone() for name, value in zip(self._names(), values, strict=True)}
        if self.hidden_first:
            parts = [part.transpose(1, 2).contiguous() for part in parts]
        return {prefix + name: part for name, part in zip(self._names(), parts, strict=True)}

    def _stacked(self, given: Dict) -> tuple[Tensor, Tensor, Tensor]:
        values = list(given.values())
        if self.spec.expert_storage != "fused_3d":
            count = len(values) // (2 if self.spec.expert_w3_name is None else 3)
            values = [torch.stack(values[start : start + count]) for start in range(0, len(values), count)]
        return self._parts(values)

    def _parts(self, values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.hidden_first:
            values = [value.transpose(1, 2) for value in values]
        if len(values) == 3:
            return values[0], values[1], values[2]
        gate, up = values[0].chunk(2, dim=1)
        return gate, values[1], up


def form_of(spec: MoELayerSpec, source: nn.Module) -> SourceForm:
    """How a block keeps its weights.

    Args:
        spec: of the block, by DeepSpeed's parser.
        source: the block.
    """
    experts = getattr(source, spec.experts_name)
    if spec.expert_storage != "fused_3d":
        return SourceForm(spec, False, isinstance(getattr(experts[0], spec.expert_w1_name), nn.Module))
    shapes = [tuple(getattr(experts, name).shape) for name in (spec.expert_w1_name, spec.expert_w2_name)]
    layout = classify_fused_gate_up_layout(*shapes) if spec.expert_w3_name is None else None
    return SourceForm(spec, layout is not None and layout.needs_transpose, False)
