"""Functions applied to parameters directly: what the mode recognises, and that it changes no bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from weight_grad_cases import check

OFFS = torch.tensor([2, 2, 6], dtype=torch.int32)


class Apply(nn.Module):
    """Calls `function(x, weight, bias)`; `x` is no leaf in it."""

    def __init__(
        self, function: Callable[..., Tensor], shape: tuple[int, ...], bias: int = 0, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(bias, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 2, self.weight, self.bias)


def micros(*shape: int, dtype: torch.dtype = torch.float32, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(count)]


def per_expert(x: Tensor, w: Tensor, _: None) -> Tensor:
    return torch.cat([F.linear(part, w[index]) for index, part in enumerate(x.split([2, 0, 4]))])


def by_unbind(x: Tensor, w: Tensor, _: None) -> Tensor:
    return sum(x @ part for part in w.unbind(0))


CASES = {
    "linear": ((6, 4), (5, 4), 5, lambda x, w, b: F.linear(x, w, b)),
    "linear keywords": ((6, 4), (5, 4), 5, lambda x, w, b: F.linear(input=x, weight=w, bias=b)),
    "linear of a transposed input": ((4, 6), (5, 4), 0, lambda x, w, b: F.linear(x.t(), w)),
    "linear of a long transposed input": ((5, 70), (120, 5), 0, lambda x, w, b: F.linear(x.t(), w)),
    "linear of many rows": ((70, 120), (131, 120), 131, lambda x, w, b: F.linear(x, w, b)),
    "matmul of many rows": ((70, 131), (131, 120), 0, lambda x, w, b: x @ w),
    "linear of a transposed weight": ((6, 4), (4, 5), 5, lambda x, w, b: F.linear(x, w.t(), b)),
    "linear of an expanded input": ((1, 4), (5, 4), 5, lambda x, w, b: F.linear(x.expand(6, 4), w, b)),
    "linear of a fused slice": ((6, 4), (10, 4), 0, lambda x, w, b: F.linear(x, w[:5]) * F.linear(x, w[5:])),
    "linear of a chunk": ((6, 4), (10, 4), 0, lambda x, w, b: F.linear(x, w.chunk(2)[1])),
    "linear of a viewed weight": ((6, 4), (5, 2, 2), 0, lambda x, w, b: F.linear(x, w.view(5, 4))),
    "addmm": ((6, 4), (4, 5), 5, lambda x, w, b: torch.addmm(b, x, w)),
    "addmm method": ((6, 4), (4, 5), 5, lambda x, w, b: b.addmm(x, w)),
    "matmul": ((2, 3, 4), (4, 5), 0, lambda x, w, b: torch.matmul(x, w)),
    "matmul operator": ((2, 2, 3, 4), (4, 5), 0, lambda x, w, b: x @ w),
    "matmul operator, transposed": ((3, 4), (5, 4), 0, lambda x, w, b: x @ w.t()),
    "matmul, transposed input": ((2, 4, 3), (4, 5), 0, lambda x, w, b: x.transpose(1, 2) @ w),
    "mm": ((6, 4), (4, 5), 0, lambda x, w, b: x.mm(w)),
    "bmm": ((3, 6, 4), (3, 4, 5), 0, lambda x, w, b: torch.bmm(x, w)),
    "bmm by matmul": ((3, 6, 4), (3, 5, 4), 0, lambda x, w, b: x @ w.transpose(1, 2)),
    "grouped, an empty group": ((6, 8), (3, 8, 16), 0, lambda x, w, b: F.grouped_mm(x, w, offs=OFFS)),
    "grouped, transposed": ((6, 8), (3, 16, 8), 0, lambda x, w, b: torch._grouped_mm(x, w.transpose(1, 2), offs=OFFS)),
    "einsum of experts": ((6, 4), (3, 4, 5), 0, lambda x, w, b: torch.einsum("ti,eio->teo", x, w)),
    "einsum batched": ((3, 6, 4), (3, 4, 5), 0, lambda x, w, b: torch.einsum("etd,edf->etf", x, w)),
    "einsum of a projection": ((2, 6, 4), (4, 2, 5), 0, lambda x, w, b: torch.einsum("bsd,dhk->bshk", x, w)),
    "experts one by one": ((6, 4), (3, 5, 4), 0, per_expert),
    "unbound experts": ((6, 4), (3, 4, 5), 0, by_unbind),
    "conv1d": ((2, 4, 9), (6, 4, 3), 6, lambda x, w, b: F.conv1d(x, w, b, 2, 1)),
    "conv2d groups": ((2, 4, 7, 7), (6, 2, 3, 3), 6, lambda x, w, b: F.conv2d(x, w, b, (2, 1), 1, 2, groups=2)),
    "conv2d same": ((2, 4, 7, 7), (6, 4, 3, 3), 0, lambda x, w, b: F.conv2d(x, w, padding="same")),
    "conv2d valid": ((2, 4, 7, 7), (6, 4, 2, 2), 6, lambda x, w, b: F.conv2d(x, w, b, padding="valid")),
    "conv3d": ((1, 2, 4, 5, 6), (3, 2, 2, 2, 2), 3, lambda x, w, b: F.conv3d(x, w, b, padding=(1, 0, 1))),
    "depthwise": ((2, 4, 9), (4, 1, 3), 4, lambda x, w, b: F.conv1d(x, w, b, padding=2, groups=4)),
    "changed in place": ((2, 3, 4), (5, 4), 5, lambda x, w, b: F.linear(x, w, b).relu_()),
    "twice": ((6, 4), (4, 4), 4, lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w, b)),
    "three times, both ways": ((6, 4), (4, 4), 0, lambda x, w, b: F.linear((x @ w).tanh() @ w, w)),
    "frozen input": ((6, 4), (5, 4), 5, lambda x, w, b: F.linear(x.detach(), w, b)),
}

#: Plain full backward: correct, computed in I.
UNSPLIT = {
    "addmm scaled": ((6, 4), (4, 5), 5, lambda x, w, b: torch.addmm(b, x, w, alpha=2)),
    "weight on the left": ((4, 6), (5, 4), 0, lambda x, w, b: w @ x),
    "expanded weight": ((6, 4), (1, 4), 0, lambda x, w, b: F.linear(x, w.expand(5, 4))),
    "computed weight": ((6, 4), (5, 4), 0, lambda x, w, b: F.linear(x, w.tanh())),
    "einsum summing a letter": ((6, 4), (3, 4, 5), 0, lambda x, w, b: torch.einsum("ti,eio->to", x, w)),
    "einsum, repeated letter": ((6, 4), (4, 4), 0, lambda x, w, b: torch.einsum("ti,ii->ti", x, w)),
    "conv2d, uneven same": ((2, 4, 7, 7), (6, 4, 2, 2), 0, lambda x, w, b: F.conv2d(x, w, padding="same")),
    "conv1d unbatched": ((4, 9), (6, 4, 3), 0, lambda x, w, b: F.conv1d(x, w)),
    "vector input": ((4,), (4, 5), 0, lambda x, w, b: x @ w),
    "vector weight": ((6, 4), (4,), 0, lambda x, w, b: x @ w),
}

COMPLEX = {
    "linear": ((2, 3, 4), (5, 4), 5, lambda x, w, b: F.linear(x, w, b)),
    "matmul": ((2, 3, 4), (4, 5), 0, lambda x, w, b: x @ w),
    "bmm": ((3, 6, 4), (3, 4, 5), 0, lambda x, w, b: torch.bmm(x, w)),
    "einsum": ((3, 6, 4), (3, 4, 5), 0, lambda x, w, b: torch.einsum("etd,edf->etf", x, w)),
    "conv1d": ((2, 4, 9), (6, 4, 3), 6, lambda x, w, b: F.conv1d(x, w, b, 2, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_deferred_and_bit_identical(case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and case.startswith("grouped"):
        pytest.skip("torch has no grouped matrix product in fp64")
    shape, weight, bias, function = CASES[case]
    check(lambda: Apply(function, weight, bias, dtype), micros(*shape, dtype=dtype), {"weight"})


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("case", UNSPLIT)
def test_what_is_not_recognised_stays_plain(case: str) -> None:
    shape, weight, bias, function = UNSPLIT[case]
    check(lambda: Apply(function, weight, bias), micros(*shape), set())


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_weights_stay_plain(case: str) -> None:
    shape, weight, bias, function = COMPLEX[case]

    def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return function(torch.complex(x, x.flip(0)), w, b).abs()

    check(lambda: Apply(apply, weight, bias, torch.complex64), micros(*shape), set())


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    bias=st.booleans(),
    contiguous=st.booleans(),
)
def test_linear_of_any_shape(lead: list[int], inner: int, outer: int, bias: bool, contiguous: bool) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x if contiguous else x.transpose(0, -1).contiguous().transpose(0, -1), w, b)

    check(lambda: Apply(function, (outer, inner), outer * bias), micros(*lead, inner), {"weight"})


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), inner=st.integers(1, 3), outer=st.integers(1, 3))
def test_groups_of_any_size(sizes: list[int], inner: int, outer: int) -> None:
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    shape = (len(sizes), 4 * inner, 4 * outer)
    check(
        lambda: Apply(lambda x, w, b: F.grouped_mm(x, w, offs=offs), shape),
        micros(max(1, sum(sizes)), 4 * inner)[:2] if sum(sizes) else [],
        {"weight"},
    )


def test_conv_padding_modes() -> None:
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for conv, shape in ((nn.Conv1d, (2, 4, 8)), (nn.Conv2d, (2, 4, 8, 6))):
            check(
                lambda conv=conv, mode=mode: conv(4, 6, 3, 2, 2, groups=2, padding_mode=mode),
                micros(*shape),
                {"weight"},
            )
