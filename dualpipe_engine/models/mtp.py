"""Multi-token prediction: blocks that each predict one token further (DeepSeek-V3 report, section 2.2).

Depth k works on the positions whose token k further on is still within the sequence. It predicts the token after that,
from the stream of depth k - 1 and the embedding of that token:

    h(k) = norm(block(project([norm(embedding of token i + k), norm(h(k-1) at i)])))

These layers train the model and are passed by in evaluation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..comm.nest import Nest
from ..errors import ConfigError
from .block import MoEBlock, Passed, initialise, joined, split
from .config import MoEConfig
from .dispatch import State
from .routing import Counted


class FirstLayer(Protocol):
    """What the first layer of the model has.

    Attributes:
        table: of all tokens.
        depth: of multi-token prediction.
        ranks: that share each sequence.
    """

    table: nn.Embedding
    depth: int
    ranks: int


def look_ahead(embedding: FirstLayer, state: Nest) -> Nest:
    """The embedding's second use: add the embeddings of later tokens.

    Raises:
        ConfigError: sequences have no token that far ahead.
    """
    passed = split(state)
    if passed.tokens is None:
        return state
    length = passed.x.shape[1]
    if length * embedding.ranks <= embedding.depth:
        raise ConfigError(
            f"sequences of {length * embedding.ranks} tokens are too short for mtp_depth {embedding.depth}: take "
            "longer ones, or a smaller depth"
        )
    ahead = tuple(embedding.table(passed.tokens[:, k : k + length]) for k in range(1, embedding.depth + 1))
    return joined(passed._replace(tokens=None, ahead=ahead))


class MTPBlock(MoEBlock):
    """One depth of multi-token prediction; a block that is entered from two streams and left by a norm of its own."""

    def __init__(self, config: MoEConfig, rank: int = 0) -> None:
        super().__init__(config, rank)
        self.embedding_norm, self.hidden_norm, self.out_norm = (
            nn.RMSNorm(config.hidden, config.norm_eps) for _ in range(3)
        )
        self.project = nn.Linear(2 * config.hidden, config.hidden, bias=False)
        initialise(self.project, config)

    def forward(self, state: Nest) -> Nest:
        return super().forward(state) if split(state).ahead else state

    def _enter(self, state: Nest) -> tuple[Tensor, Passed]:
        passed = split(state)
        embedding, *ahead = passed.ahead
        both = [self.embedding_norm(embedding), self.hidden_norm(passed.x[:, : embedding.shape[1]])]
        x = self.project(torch.cat(both, dim=-1))
        return super()._enter(joined(passed._replace(x=x, ahead=tuple(ahead), done=(*passed.done, passed.x))))

    def _counted(self, passed: Passed, length: int) -> Counted | None:
        """Of a part of sequences, the positions whose token ahead is there."""
        if self._sharing is None:
            return None
        whole = length * self._sharing.size() - len(passed.done)
        first = min(max(whole - length * self._sharing.rank(), 0), length)
        return Counted(first, whole / self._sharing.size())

    def _finish(self, state: State) -> Nest:
        passed = split(super()._finish(state))
        return joined(passed._replace(x=self.out_norm(passed.x)))
