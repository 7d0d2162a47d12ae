"""The operations whose backward is split: each gives the gradient of its input and of its weight on its own.

Every formula, down to the order of a product's operands, is the one that autograd uses, so that gradients stay equal
bit for bit. `x` is the activation, `like` a meta tensor with the weight's shape and strides: a weight gradient needs
no more of the weight, so that none is held from I to W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FusedWgrad = Callable[[Tensor, Tensor, Tensor], None]
_HALF = (torch.bfloat16, torch.float16)


class SplitOp:
    """`out = op(x, weight, bias)`, linear in `x` and in `weight`."""

    kernel = "aten::linear"  #: whose autocast rule holds
    deferrable = True  #: False: belongs to I, unless an earlier gradient of the same parameter waits for W
    joint_bias = False  #: whether autograd computes the gradients of weight and bias in one kernel

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        raise NotImplementedError

    def bias_grad(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad.sum_to_size(shape)

    def joint_grads(self, grad: Tensor, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias, where `joint_bias`."""
        raise NotImplementedError

    def add_weight_grad(self, total: Tensor, grad: Tensor, x: Tensor, like: Tensor, fused: FusedWgrad | None) -> None:
        """Add the weight gradient, computed in fp32, to `total` (fp32, the weight's shape)."""
        x = x.float() if x.is_floating_point() else x
        total.add_(self.weight_grad(grad.float(), x, like))


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _by_columns(matrix: Tensor) -> bool:
    """Whether the last two dimensions lie in memory column by column, as those of a transposed weight."""
    return matrix.stride(-2) == 1 and matrix.stride(-1) == matrix.shape[-2]


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload, no-any-return]
    return torch.mm(a.float(), b.float())


def _left_grad(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Gradient of `left` in `left @ right`, in the layout of `left`."""
    return right.mm(grad.t()).t() if _by_columns(left) else grad.mm(right.t())


def _right_grad(grad: Tensor, left: Tensor, like: Tensor, mm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Gradient of the right factor, shaped and laid out as `like`."""
    return mm(grad.t(), left).t() if _by_columns(like) else mm(left.t(), grad)


class MatMul(SplitOp):
    """`x [..., in] @ weight [in, out]`, or `addmm` with a bias where `x` has two dimensions."""

    kernel = "aten::mm"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.matmul(x, weight) if bias is None else torch.addmm(bias, x, weight)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return _left_grad(_rows(grad), _rows(x), weight).reshape(x.shape)

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return _right_grad(_rows(grad), _rows(x), like, torch.mm)

    def add_weight_grad(self, total: Tensor, grad: Tensor, x: Tensor, like: Tensor, fused: FusedWgrad | None) -> None:
        total.add_(_right_grad(_rows(grad), _rows(x), like, _mm_fp32))


class Linear(SplitOp):
    """`x [..., in] @ weight [out, in].T + bias [out]`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return _left_grad(_rows(grad), _rows(x), weight.t()).reshape(x.shape)

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return _right_grad(_rows(grad), _rows(x), like.t(), torch.mm).t()

    def add_weight_grad(self, total: Tensor, grad: Tensor, x: Tensor, like: Tensor, fused: FusedWgrad | None) -> None:
        grad, x = _rows(grad), _rows(x)
        if fused is not None and x.dtype == grad.dtype and x.dtype in _HALF and total.is_contiguous():
            fused(x.contiguous(), grad.contiguous(), total)
        else:
            total.add_(_right_grad(grad, x, like.t(), _mm_fp32).t())


class BatchMatMul(SplitOp):
    """`x [e, rows, in] @ weight [e, in, out]`."""

    kernel = "aten::bmm"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(x, weight)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.bmm(weight.transpose(1, 2))

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return x.transpose(1, 2).bmm(grad)


@dataclass(frozen=True, eq=False)
class GroupedMatMul(SplitOp):
    """`x [rows, in]`, whose rows up to `offs[e]` belong to experts 0..e, times `weight [e, in, out]`."""

    offs: Tensor
    kernel = "aten::_grouped_mm"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch._grouped_mm(x, weight, offs=self.offs)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if _by_columns(x):
            return torch._grouped_mm(weight, grad.t(), offs=self.offs).t()
        return torch._grouped_mm(grad, weight.transpose(1, 2), offs=self.offs)

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        if _by_columns(like):
            return torch._grouped_mm(grad.t(), x, offs=self.offs).transpose(1, 2)
        return torch._grouped_mm(x.t(), grad, offs=self.offs)

    def add_weight_grad(self, total: Tensor, grad: Tensor, x: Tensor, like: Tensor, fused: FusedWgrad | None) -> None:
        # The grouped kernel of CUDA has a result of the operands' type only.
        total.add_(self.weight_grad(grad, x, like) if grad.is_cuda else self.weight_grad(grad.float(), x.float(), like))


@dataclass(frozen=True, eq=False)
class Einsum(SplitOp):
    """`einsum("x,weight->out")` where each letter of one factor is in the other or in the result."""

    x: str
    weight: str
    out: str
    kernel = "aten::bmm"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.einsum(f"{self.x},{self.weight}->{self.out}", x, weight)

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum(f"{self.out},{self.weight}->{self.x}", grad, weight)

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return torch.einsum(f"{self.x},{self.out}->{self.weight}", x, grad)


@dataclass(frozen=True, eq=False)
class Conv(SplitOp):
    """Convolution over `x [batch, channels, ...]` in one to three dimensions."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    kernel = "aten::conv2d"
    joint_bias = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self._geometry())

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, None, [True, False, False])[0]

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return self._backward(grad, x, self._weight(grad, like), None, [False, True, False])[1]

    def bias_grad(self, grad: Tensor, shape: torch.Size) -> Tensor:
        return grad.sum([dim for dim in range(grad.dim()) if dim != 1])

    def joint_grads(self, grad: Tensor, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._backward(grad, x, self._weight(grad, like), [grad.shape[1]], [False, True, True])[1:]

    @staticmethod
    def _weight(grad: Tensor, like: Tensor) -> Tensor:
        """A weight of arbitrary content; the gradient depends on its shape and layout alone."""
        return torch.empty_like(like, device=grad.device, dtype=grad.dtype)

    def _geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], bool, list[int], int]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias_shape: list[int] | None, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(grad, x, weight, bias_shape, *self._geometry(), mask)


@dataclass(frozen=True, eq=False)
class Embedding(SplitOp):
    """Rows `x` (integers, any shape) of `weight [rows, hidden]`."""

    padding_idx: int
    scale_by_frequency: bool
    kernel = "aten::embedding"
    deferrable = False

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.embedding(weight, x, self.padding_idx, self.scale_by_frequency, False)

    def weight_grad(self, grad: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return torch.ops.aten.embedding_dense_backward(
            grad, x, like.shape[0], self.padding_idx, self.scale_by_frequency
        )
