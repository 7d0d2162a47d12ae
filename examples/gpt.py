"""A byte-level GPT as a list of layers for `deepspeed.pipe.PipelineModule`; embedding and head share one table."""

from __future__ import annotations

from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256  # bytes


class Embedding(nn.Module):
    """Bytes `[batch, length]` to hidden states `[batch, length, hidden]`."""

    def __init__(self, hidden: int, length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, hidden)
        self.place = nn.Embedding(length, hidden)
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) + self.place.weight[: tokens.shape[1]]


class Block(nn.Module):
    """A pre-norm transformer block on `[batch, length, hidden]`."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def head(embedding: Embedding, x: Tensor) -> Tensor:
    """Logits `[batch, length, 256]` with the embedding's own table."""
    return functional.linear(x, embedding.weight)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats a byte."""
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def layers(blocks: int = 8, hidden: int = 128, heads: int = 4, length: int = 128) -> list[Any]:
    """The layers of the model, in order."""
    return [
        TiedLayerSpec("embedding", Embedding, hidden, length, tied_weight_attr="weight"),
        *[LayerSpec(Block, hidden, heads) for _ in range(blocks)],
        LayerSpec(nn.LayerNorm, hidden),
        TiedLayerSpec("embedding", Embedding, hidden, length, forward_fn=head, tied_weight_attr="weight"),
    ]
