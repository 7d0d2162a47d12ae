"""A torch function mode that turns the functions that a module calls on its parameters into split operations.

It costs a few microseconds for each torch call of the code under it; `weight_grad.install` therefore enters it only in
modules that need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..comm.nest import Nest
from .weight_grad_ops import BatchMatMul, Conv, Einsum, Embedding, GroupedMatMul, Linear, MatMul, SplitOp
from .weight_grad_split import Sink, split

Call = tuple[SplitOp, Tensor, Tensor, Tensor | None]


class SplitMode(TorchFunctionMode):
    """Splits what the parsers of this module recognise and hands everything else on.

    Args:
        sink: takes the deferred weight gradients.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._local = threading.local()

    def run(self, forward: Callable[..., Nest], args: tuple[Nest, ...], kwargs: dict[str, Nest]) -> tuple[Nest, bool]:
        """Call `forward` in the mode, which is entered unless it is active on this thread already.

        Returns:
            The result, and whether anything was split on behalf of this very call (inner calls of `run` excepted).
        """
        outer = getattr(self._local, "frame", None)
        frame = self._local.frame = _Frame()
        try:
            if outer is not None:
                return forward(*args, **kwargs), frame.caught
            with self:
                return forward(*args, **kwargs), frame.caught
        finally:
            self._local.frame = outer

    def __torch_function__(
        self,
        func: Callable[..., Nest],
        types: Collection[type],
        args: tuple[Nest, ...] = (),
        kwargs: dict[str, Nest] | None = None,
    ) -> Nest:
        kwargs = kwargs or {}
        parse = _PARSERS.get(func)
        if parse is not None and not torch.compiler.is_compiling():
            call = parse(*args, **kwargs)
            # Autograd's device threads are given the mode without a frame: nothing there is a module's forward.
            frame: _Frame | None = getattr(self._local, "frame", None)
            if call is not None and frame is not None and frame.recomputed_in_mode():
                out = split(self._sink, *call)
                if out is not None:
                    frame.caught = True
                    return out
        return func(*args, **kwargs)


class _Frame:
    """One module's forward: its saved-tensor hooks at entry, and whether it split something."""

    __slots__ = ("_hooks", "caught")

    def __init__(self) -> None:
        self.caught = False
        self._hooks = _top_hooks()

    def recomputed_in_mode(self) -> bool:
        """False inside a checkpoint that the module opened itself: nothing would enter the mode for its recompute."""
        return _top_hooks() is self._hooks or _top_hooks() == self._hooks


def _top_hooks() -> object:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Linear(), input, weight, bias


def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Call | None:
    if out is not None or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    if other.dim() == 2 and input.dim() >= 2:
        return MatMul(), input, other, None
    if other.dim() == 3 and input.dim() == 3 and input.shape[0] == other.shape[0]:
        return BatchMatMul(), input, other, None
    return None


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Call | None:
    return (MatMul(), mat1, mat2, input) if beta == alpha == 1 and out is None else None


def _grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Call | None:
    if offs is None or bias is not None or out_dtype is not None or (input.dim(), mat2.dim()) != (2, 3):
        return None
    return GroupedMatMul(offs), input, mat2, None


def _einsum(equation: object, *operands: Tensor) -> Call | None:
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    x, _, weight = terms.partition(",")
    if any(len(set(term)) != len(term) or "." in term for term in (x, weight, out)):
        return None
    if not set(x) <= set(weight + out) or not set(weight) <= set(x + out):
        return None
    return Einsum(x, weight, out), operands[0], operands[1], None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or sparse:
        return None
    row = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return Embedding(row, scale_grad_by_freq), input, weight, None


def _conv(spatial: int) -> Callable[..., Call | None]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Call | None:
        def spread(value: int | Sequence[int]) -> list[int]:
            values = [value] if isinstance(value, int) else list(value)
            return values * spatial if len(values) == 1 else values

        if input.dim() != spatial + 2:
            return None
        dilation = spread(dilation)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(each % 2 for each in total):
                return None
            padding = [each // 2 for each in total]
        return Conv(spread(stride), spread(padding), dilation, groups), input, weight, bias

    return parse


_PARSERS: dict[object, Callable[..., Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.einsum: _einsum,
    torch._grouped_mm: _grouped_mm,
    F.embedding: _embedding,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), _matmul
    ),
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
}
