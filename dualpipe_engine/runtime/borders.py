"""Borders: which stage, in which direction and for which micro-batch, first made a NaN or an inf.

A reduction over each tensor that passes the border of a stage leaves one number on the device; nothing is read back
before the batch is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..comm.nest import Nest

FORWARD, BACKWARD = "forward", "backward"
_DATA, _OUTPUT, _LOSS, _BORDER, _WEIGHTS = range(5)  # in the order in which a micro-batch meets them
_TEXTS = {
    _DATA: "{} in the data",
    _OUTPUT: "{} in the output of the stage",
    _LOSS: "the loss is {}",
    _BORDER: "{} in the gradient of the stage's input",
    _WEIGHTS: "{} in a weight gradient of the stage",
}
_MASKED = (_DATA, _OUTPUT)  # may hold -inf, as masks do; a stage that makes one by mistake has NaN soon after


class NonFinite(NamedTuple):
    """A NaN or an inf.

    Args:
        micro: micro-batch.
        step: place on the micro-batch's way through the pipeline; the smallest is the origin.
        stage: stage that made it.
        direction: `FORWARD` or `BACKWARD`.
        text: what holds it.
        rank: global rank that has seen it.
    """

    micro: int
    step: tuple[int, int]
    stage: int
    direction: str
    text: str
    rank: int


class Borders:
    """Notes of one rank, of one batch.

    Args:
        gradients: whether to look at gradients; not where a loss scaler looks for their overflow itself.
        params: stage -> its trained parameters, to look at their gradients after each B, I and W as well.
    """

    def __init__(self, gradients: bool = True, params: Mapping[int, Sequence[Tensor]] | None = None) -> None:
        self._gradients = gradients
        self._params = params if params is not None and gradients else {}
        self.clear()

    def clear(self) -> None:
        """A batch begins."""
        self._notes: list[tuple[int, int, int, Tensor]] = []  # kind, stage, micro-batch, sum of the tensor

    def data(self, micro: int, inputs: Nest) -> None:
        """What stage 0 takes."""
        self._note_values(_DATA, 0, micro, inputs)

    def output(self, stage: int, micro: int, output: Nest) -> None:
        """What a stage passes on."""
        self._note_values(_OUTPUT, stage, micro, output)

    def loss(self, stage: int, micro: int, loss: Tensor) -> None:
        """The loss, before any scaling."""
        self._notes.append((_LOSS, stage, micro, _sum(loss)))

    def back(self, stage: int, micro: int, grads: Iterable[Tensor]) -> None:
        """The gradients of a stage's inputs."""
        if self._gradients:
            for grad in grads:
                self._notes.append((_BORDER, stage, micro, _sum(grad)))

    def weights(self, stage: int, micro: int) -> None:
        """A backward has added to the weight gradients of a stage."""
        for param in self._params.get(stage, ()):
            if (grad := param.grad) is None:
                continue
            values = grad.coalesce().values() if grad.is_sparse else grad
            self._notes.append((_WEIGHTS, stage, micro, _sum(values)))

    def _note_values(self, what: int, stage: int, micro: int, nest: Nest) -> None:
        for tensor in (nest,) if isinstance(nest, Tensor) else pytree.tree_leaves(nest):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize > 1:
                self._notes.append((what, stage, micro, _sum(tensor)))

    def bad(self, device: torch.device) -> Tensor:
        """How many notes are NaN or inf (scalar on `device`); not read back."""
        groups: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
        for what, _, _, total in self._notes:
            groups.setdefault((what in _MASKED, total.dtype), []).append(total)
        count = torch.zeros((), device=device)
        for (masked, _), totals in groups.items():
            stacked = torch.stack(totals)
            count += (stacked.isnan() | stacked.isposinf() if masked else ~stacked.isfinite()).sum()
        return count

    def findings(self, rank: int = 0) -> list[NonFinite]:
        """What is NaN or inf here.

        Args:
            rank: this global rank.
        """
        found: list[NonFinite] = []
        passed: set[int] = set()  # stages whose weight gradients add up and stay so: the first is meant
        for what, stage, micro, total in self._notes:
            value = float(total)
            if math.isfinite(value) or (value == -math.inf and what in _MASKED):
                continue
            if what == _WEIGHTS:
                if stage in passed:
                    continue
                passed.add(stage)
            backward = what in (_BORDER, _WEIGHTS)
            step = (1, -stage) if backward else (0, 0 if what == _DATA else 1 + stage)
            text = _TEXTS[what].format("NaN" if math.isnan(value) else "inf")
            found.append(NonFinite(micro, step, stage, BACKWARD if backward else FORWARD, text, rank))
        return found


def _sum(tensor: Tensor) -> Tensor:
    """The sum (scalar): not finite where an element is not. One kernel, where the largest magnitude takes three."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.sum(dtype=torch.float32) if tensor.itemsize < 4 else tensor.sum()


def origins(findings: Iterable[NonFinite]) -> list[NonFinite]:
    """Of the findings of all ranks of a pipeline the first on each micro-batch's way, by micro-batch."""
    first: dict[int, NonFinite] = {}
    for each in findings:
        if each.micro not in first or each.step < first[each.micro].step:
            first[each.micro] = each
    return [first[micro] for micro in sorted(first)]
