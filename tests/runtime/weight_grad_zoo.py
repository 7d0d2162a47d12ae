"""Small modules of every kind that weight gradients are deferred in."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HIDDEN = 8


class Conv1D(nn.Module):
    """A linear layer with its weight as [in, out], as in GPT-2."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.a, self.b = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class Experts(nn.Module):
    """A router by a bare `F.linear` and experts as one 3-D parameter."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, HIDDEN))
        self.up = nn.Parameter(torch.randn(experts, 2 * HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, 2 * HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        score, expert = F.linear(rows, self.router).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        offs = torch.bincount(expert, minlength=self.router.shape[0]).cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(rows[order], self.up.transpose(1, 2), offs=offs))
        out = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=offs)
        return (score[:, None] * torch.empty_like(out).index_copy(0, order, out)).view(x.shape)


class Block(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = Conv1D(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = mlp() if mlp else nn.Sequential(nn.Linear(HIDDEN, 12), nn.ReLU(inplace=True), nn.Linear(12, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


BLOCK = {"qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight"}


class Tied(nn.Module):
    """Embedding and head share a weight, by a module or by a bare function."""

    def __init__(self, functional: bool, body: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, HIDDEN, padding_idx=3)
        self.body = body or nn.Linear(HIDDEN, HIDDEN)
        self.head = None if functional else nn.Linear(HIDDEN, 11, bias=False)
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embed(tokens)).tanh()
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class TwoTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.third.weight = self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Checkpointed(nn.Module):
    """`wrap(function, x)` recomputes `inner`."""

    def __init__(self, wrap: Callable[..., Tensor], inner: Callable[[], nn.Module] = Block, call: bool = False) -> None:
        super().__init__()
        self.inner = inner()
        self.wrap = wrap
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap((lambda x: self.inner(self.inner(x))) if self.call else self.inner, x)


class BareInCheckpoint(nn.Module):
    """Checkpoints a function of its own parameter, with no module in it; square, so that a mix-up would fit."""

    def __init__(self, wrap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(lambda x: F.linear(F.linear(x, self.weight).sin(), self.weight), x)


def deepspeed_checkpoint(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    checkpointing = pytest.importorskip("deepspeed.runtime.activation_checkpointing.checkpointing")
    return checkpointing.checkpoint(function, x)


CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "deepspeed": deepspeed_checkpoint,
}


def data(*shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def tokens(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 11, (2, 5), generator=generator) for _ in range(count)]


ZOO: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear": (lambda: nn.Linear(HIDDEN, 5), {"weight"}),
    "block": (Block, BLOCK),
    "shared module": (Twice, {f"layer.{name}" for name in BLOCK}),
    "two tied linears": (TwoTied, {"first.weight"}),
    "lora": (Lora, {"a.weight", "b.weight"}),
    "experts": (Experts, {"router", "up", "down"}),
    "block of experts": (lambda: Block(Experts), {"qkv.weight", "mlp.up", "mlp.down", "mlp.router"}),
    "attention of torch": (
        lambda: nn.TransformerEncoderLayer(HIDDEN, 2, 12, dropout=0.0, batch_first=True),
        {"linear1.weight", "linear2.weight"},
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, 5)), nn.Linear(5, 4)),
        {"1.weight"},
    ),
    "spectral norm": (  # each look at its weight is a power iteration
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(HIDDEN, 5)), nn.Linear(5, 4)),
        {"1.weight"},
    ),
}
