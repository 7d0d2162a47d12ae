"""How losses of the user's own add up: those of micro-batches have to make the loss of the batch.

A loss is a sum divided by the number of items, or a mean over labels or over rows, which a row of padding shows. Any
other, such as one with weights of classes or a contrast between rows, is another number when the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.batches.shards import IGNORED
from dualpipe_engine.errors import ConfigError

from .batches import is_column

CHECKED = 8  #: micro-batches on each rank

Piece = tuple[Nest, Mapping[str, Any]]
"""Output and inputs of some rows."""


def counted(inputs: Mapping[str, Any], shifted: bool) -> int:
    """What a mean over a micro-batch is taken over: labels of tokens or rows that count, else rows."""
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() and not labels.is_floating_point():
        return int((labels[..., 1:] if shifted and labels.dim() > 1 else labels).ne(IGNORED).sum())
    return rows_of_inputs(inputs)


def every_label(inputs: Mapping[str, Any]) -> int:
    """Of a micro-batch, those that do not count among them."""
    labels = inputs.get("labels")
    return labels.numel() if isinstance(labels, torch.Tensor) and not labels.is_floating_point() else 0


def rows_of_inputs(inputs: Mapping[str, Any]) -> int:
    """Of the first tensor that has any."""
    return next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim())


def ignores_padding(loss: Callable[[Piece], float], output: Nest, inputs: Mapping[str, Any]) -> bool:
    """Whether a mean is one over labels of tokens: rows without any, and without attention, do not change it."""
    blank = dict(inputs) | {"labels": torch.full_like(inputs["labels"], IGNORED)}
    if "attention_mask" in blank:
        blank["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    return _near(loss(_joined((output, inputs), (output, blank))), loss((output, inputs)))


class SumOfParts:
    """Compares the loss of rows with what those of two parts of them make, on the first micro-batches.

    Args:
        name: of the loss, for the error.
        blocks: in which the rows of a batch come, as chosen ones and then rejected ones; what is one row of each is
            never parted.
    """

    def __init__(self, name: str, blocks: int = 1) -> None:
        self._name, self._blocks, self._left = name, blocks, CHECKED
        self._before: Piece | None = None

    @property
    def goes_on(self) -> bool:
        """Whether more are compared."""
        return bool(self._left)

    def __call__(
        self, loss: Callable[[Piece], float], weigh: Callable[[Mapping[str, Any]], float] | None, this: Piece
    ) -> None:
        """
        Args:
            loss: of rows, without a graph.
            weigh: what a mean over some rows counts for; None: the loss is a sum.
            this: output and inputs of a micro-batch. One of a single row (a block) is joined with the one before.

        Raises:
            ConfigError: the loss is neither sum nor mean.
        """
        if not self._left:
            return
        rows = rows_of_inputs(this[1]) // self._blocks
        if rows > 1:
            parts = [_rows(this, which, self._blocks) for which in (slice(rows // 2), slice(rows // 2, None))]
        elif self._before is None or _shapes(self._before) != _shapes(this):
            self._before = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, this)
            return
        else:
            parts, this, self._before = [self._before, this], _joined(self._before, this, self._blocks), None
        weights = [1.0 if weigh is None else weigh(inputs) for _, inputs in parts]
        total = 1.0 if weigh is None else sum(weights)
        if not all(weights):
            return
        whole = loss(this)
        if not _near(whole, loss(this)):  # it draws random numbers
            return
        self._left -= 1
        made = sum(weight * loss(part) for weight, part in zip(weights, parts, strict=True)) / total
        if not _near(made, whole):
            raise ConfigError(
                f"{self._name} gives {whole:.6g} for some rows and {made:.6g} from two parts of them, so micro-batches "
                "do not add up to the batch: return a sum divided by num_items_in_batch or a mean over rows or labels, "
                "without weights of classes, or use num_chunks=1"
            )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-3 * abs(other) + 1e-7


def _rows(piece: Piece, which: slice, blocks: int = 1) -> Piece:
    rows = rows_of_inputs(piece[1])

    def cut(leaf: Any) -> Any:  # noqa: ANN401
        found = _in_blocks(leaf, rows, blocks)
        return _cat([block[which] for block in found]) if found else leaf

    return tree_map(cut, piece, is_leaf=is_column)


def _joined(first: Piece, second: Piece, blocks: int = 1) -> Piece:
    rows, more = rows_of_inputs(first[1]), rows_of_inputs(second[1])

    def join(one: Any, other: Any) -> Any:  # noqa: ANN401
        pairs = zip(_in_blocks(one, rows, blocks), _in_blocks(other, more, blocks), strict=True)
        found = [block for pair in pairs for block in pair]
        return _cat(found) if found else one

    return tree_map(join, first, second, is_leaf=is_column)


def _cat(blocks: Sequence[Any]) -> Any:  # noqa: ANN401
    return (
        torch.cat(list(blocks)) if isinstance(blocks[0], torch.Tensor) else [each for block in blocks for each in block]
    )


def _in_blocks(leaf: Any, rows: int, blocks: int) -> tuple[Any, ...]:  # noqa: ANN401
    """A tensor or a list of all rows, or of those of one block; none: it has nothing to do with rows."""
    has_rows = leaf.dim() > 0 if isinstance(leaf, torch.Tensor) else is_column(leaf)
    if not has_rows or len(leaf) * blocks not in (rows, rows * blocks):
        return ()
    size = rows // blocks
    return tuple(leaf[at : at + size] for at in range(0, len(leaf), size))


def _shapes(piece: Piece) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    tree_map(lambda leaf: found.append(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else None, piece)
    return found
