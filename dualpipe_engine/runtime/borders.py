"""Borders: which stage, in which direction and for which micro-batch, first made a NaN or an inf.

A reduction over each tensor that passes the border of a stage leaves one number on the device; nothing is read back
before the batch is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FORWARD, BACKWARD = "forward", "backward"
_DATA, _OUTPUT, _LOSS, _BORDER, _WEIGHTS = range(5)  # in the order in which a micro-batch meets them
_TEXTS = {
    _DATA: "{} in the data",
    _OUTPUT: "{} in the output of the stage",
    _LOSS: "the loss is {}",
    _BORDER: "{} in the gradient of the stage's input",
    _WEIGHTS: "{} in a weight gradient of the stage",
}


class Finding(NamedTuple):
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
        self._notes: list[tuple[int, int, int]] = []
        self._largest: list[Tensor] = []

    def data(self, micro: int, inputs: Any) -> None:
        """What stage 0 takes."""
        self._note_values(_DATA, 0, micro, inputs)

    def output(self, stage: int, micro: int, output: Any) -> None:
        """What a stage passes on."""
        self._note_values(_OUTPUT, stage, micro, output)

    def loss(self, stage: int, micro: int, loss: Tensor) -> None:
        """The loss, before any scaling."""
        self._note(_LOSS, stage, micro, _largest(loss))

    def back(self, stage: int, micro: int, grads: Iterable[Tensor]) -> None:
        """The gradients of a stage's inputs."""
        if self._gradients:
            for grad in grads:
                self._note_norm(_BORDER, stage, micro, grad)

    def weights(self, stage: int, micro: int) -> None:
        """A backward has added to the weight gradients of a stage."""
        grads = [param.grad for param in self._params.get(stage, ()) if param.grad is not None]
        for grad in grads:
            self._note_norm(_WEIGHTS, stage, micro, grad.coalesce().values() if grad.is_sparse else grad)

    def _note_values(self, what: int, stage: int, micro: int, nest: Any) -> None:
        for tensor in (nest,) if isinstance(nest, Tensor) else pytree.tree_leaves(nest):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() and tensor.itemsize > 1:
                # The maximum, because -inf is what masks hold; one that a stage makes is a NaN soon after.
                self._note(what, stage, micro, tensor.detach().amax())

    def _note_norm(self, what: int, stage: int, micro: int, grad: Tensor) -> None:
        if grad.numel():
            self._note(what, stage, micro, _largest(grad))

    def _note(self, what: int, stage: int, micro: int, largest: Tensor) -> None:
        self._notes.append((what, stage, micro))
        self._largest.append(largest)

    def bad(self, device: torch.device) -> Tensor:
        """How many notes are NaN or inf (scalar on `device`); not read back."""
        of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for largest in self._largest:
            of_dtype.setdefault(largest.dtype, []).append(largest)
        count = torch.zeros((), device=device)
        for values in of_dtype.values():
            stacked = torch.stack(values)
            count += (stacked.isnan() | stacked.isposinf()).sum()
        return count

    def findings(self, rank: int = 0) -> list[Finding]:
        """What is NaN or inf here.

        Args:
            rank: this global rank.
        """
        found: list[Finding] = []
        passed: set[int] = set()  # stages whose weight gradients add up and stay so: the first is meant
        for (what, stage, micro), largest in zip(self._notes, self._largest, strict=True):
            value = float(largest)
            if not (math.isnan(value) or value == math.inf) or (what == _WEIGHTS and stage in passed):
                continue
            if what == _WEIGHTS:
                passed.add(stage)
            backward = what in (_BORDER, _WEIGHTS)
            step = (1, -stage) if backward else (0, 0 if what == _DATA else 1 + stage)
            text = _TEXTS[what].format("NaN" if math.isnan(value) else "inf")
            found.append(Finding(micro, step, stage, BACKWARD if backward else FORWARD, text, rank))
        return found


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude (scalar), or NaN. A norm is many times slower on CPUs."""
    tensor = tensor.detach()
    low, high = torch.aminmax(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    return torch.maximum(high, -low)


def origins(findings: Iterable[Finding]) -> list[Finding]:
    """Of the findings of all ranks of a pipeline the first on each micro-batch's way, by micro-batch."""
    first: dict[int, Finding] = {}
    for each in findings:
        if each.micro not in first or each.step < first[each.micro].step:
            first[each.micro] = each
    return [first[micro] for micro in sorted(first)]
