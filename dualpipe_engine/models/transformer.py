"""The mixture-of-experts transformer as a list of layers."""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional

from ..comm.nest import Nest
from .block import DenseBlock, MoEBlock, joined, split
from .config import MoEConfig


class TokenEmbedding(nn.Module):
    """Tokens `[batch, length]` to the first state."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocabulary, config.hidden)
        nn.init.normal_(self.table.weight, std=0.02)
        self._with_loss = config.balancing == "loss"

    def forward(self, tokens: Tensor) -> Nest:
        x = self.table(tokens)
        zero = x.new_zeros(1, dtype=torch.promote_types(x.dtype, torch.float32)) if self._with_loss else None
        return joined(x, zero)


class Head(nn.Module):
    """The last state to logits `[batch, length, vocabulary]`."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden)
        self.out = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, state: Nest) -> Nest:
        x, loss = split(state)
        return joined(self.out(self.norm(x)), loss)


def layers(config: MoEConfig, replica: int = 0) -> list[LayerSpec]:
    """The layers of the model, in order: embedding, blocks, head.

    Args:
        config: sizes and choices.
        replica: data-parallel rank of this process in the user's topology, which says which experts it has.
    """
    rank = replica % config.expert_parallel
    dense = config.dense_blocks
    return [
        LayerSpec(TokenEmbedding, config),
        *[LayerSpec(DenseBlock, config) for _ in range(dense)],
        *[LayerSpec(MoEBlock, config, rank) for _ in range(config.blocks - dense)],
        LayerSpec(Head, config),
    ]


def loss(output: Nest, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats a token, and the auxiliary losses of all blocks.

    Args:
        output: of `Head`.
        labels: [batch, length].
    """
    logits, auxiliary = split(output)
    precise = torch.promote_types(logits.dtype, torch.float32)
    total = functional.cross_entropy(logits.to(precise).flatten(0, 1), labels.flatten())
    return total if auxiliary is None else total + auxiliary.squeeze(0)
