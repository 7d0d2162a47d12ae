"""The mixture-of-experts transformer as a list of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional

from ..comm.nest import Nest
from ..runtime.tiles import Tiles
from .block import DenseBlock, MoEBlock, Passed, initialise, joined, split
from .config import MoEConfig
from .hf_config_of import hf_of
from .mtp import MTPBlock, look_ahead

EMBEDDING = "embedding"  #: key of the tie, where later tokens are predicted
_IGNORED = -100  # labels that do not count, as in torch's cross entropy


class TokenEmbedding(nn.Module):
    """Tokens `[batch, length]` to the first state.

    Attributes:
        whole_model: what a checkpoint keeps of the model, for `dualpipe export`.
        depth: of multi-token prediction.
        ranks: that share each sequence.
        cuts_inputs: whether it takes whole sequences, of which a rank has a part.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.ranks, self.cuts_inputs, self._rank = 1, False, 0
        self.whole_model = {"config": hf_of(config), "published": asdict(config)}
        self.table = nn.Embedding(config.vocabulary, config.hidden)
        nn.init.normal_(self.table.weight, std=0.02 if config.init_std is None else config.init_std)
        self._with_loss, self.depth = config.adds_loss, config.mtp_depth

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Return the state of parts of sequences, of which each rank of `group` has one. With multi-token prediction
        it is given whole ones, since the tokens ahead of a part are in the next."""
        self.ranks, self.cuts_inputs, self._rank = group.size(), self.depth > 0, group.rank()

    def forward(self, tokens: Tensor) -> Nest:
        ahead = tokens
        if self.cuts_inputs:
            each = tokens.shape[1] // self.ranks
            padded = functional.pad(tokens, (0, self.depth))  # what is behind the end counts for nothing
            ahead = padded[:, self._rank * each :][:, : each + self.depth].contiguous()
            tokens = ahead[:, :each]
        x = self.table(tokens)
        zero = x.new_zeros(1, dtype=torch.promote_types(x.dtype, torch.float32)) if self._with_loss else None
        return joined(Passed(x, zero, ahead if self.depth and self.training else None))


class FinalNorm(nn.Module):
    """The norm behind the last block, where more than the head needs its result.

    Attributes:
        recomputed: names of modules that `"recompute": true` stands for.
    """

    recomputed = ("norm",)

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)

    def forward(self, state: Nest) -> Nest:
        passed = split(state)
        return joined(passed._replace(x=self.norm(passed.x)))


class Head(nn.Module):
    """The last state to logits `[batch, length, vocabulary]`, and with multi-token prediction those of each depth.

    Attributes:
        multiply_adds: of a token, for estimates.
        recomputed: names of modules that `"recompute": true` stands for.
    """

    recomputed = ("norm",)

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.Identity() if config.mtp_depth else nn.RMSNorm(config.hidden, config.norm_eps)
        self.out = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.multiply_adds = (1 + config.mtp_depth) * config.hidden * config.vocabulary
        initialise(self, config)

    @property
    def projection(self) -> nn.Module:
        """What makes logits, for "tiled_loss"."""
        return self.out

    def forward(self, state: Nest) -> Nest:
        passed = split(state)
        first, *later = [self.out(self.norm(x)) for x in (*passed.done, passed.x)]
        return joined(Passed(first, passed.loss, done=tuple(later)))


def layers(config: MoEConfig, replica: int = 0) -> list[LayerSpec]:
    """The layers of the model, in order: embedding, blocks, head.

    With multi-token prediction there are between the last two the final norm, the embedding once more, for the tokens
    ahead, and a block for each depth. DualPipe, DualPipeV and ZB-V have first and last stage on one rank, and these
    layers in the last stage, so that the rank holds one embedding. Elsewhere two copies are tied.

    Args:
        config: sizes and choices.
        replica: data-parallel rank of this process in the user's topology, which says which experts it has.
    """
    rank = replica % config.expert_parallel
    dense = min(config.dense_blocks, config.blocks)
    blocks = [
        *[LayerSpec(DenseBlock, config) for _ in range(dense)],
        *[LayerSpec(MoEBlock, config, rank) for _ in range(config.blocks - dense)],
    ]
    if not config.mtp_depth:
        return [LayerSpec(TokenEmbedding, config), *blocks, LayerSpec(Head, config)]
    tie = {"tied_weight_attr": "table.weight"}
    again = TiedLayerSpec(EMBEDDING, TokenEmbedding, config, forward_fn=look_ahead, **tie)
    again.multiply_adds = 0  # it looks up; see `engine.placing.balance.estimated_costs`
    further = [
        LayerSpec(FinalNorm, config),
        again,
        *[LayerSpec(MTPBlock, config, rank) for _ in range(config.mtp_depth)],
    ]
    for spec in further:
        spec.with_next = True  # see `engine.placing.partition.kept_together`
    return [TiedLayerSpec(EMBEDDING, TokenEmbedding, config, **tie), *blocks, *further, LayerSpec(Head, config)]


class PartLabels(Protocol):
    """Labels of a part of sequences; see `engine.batches.shards.ShardLabels`."""

    def further(self, places: int) -> Tensor: ...

    def of_mean(self) -> Tensor: ...


class TokenLoss:
    """Mean cross entropy in nats a token, the auxiliary losses of all blocks, and the losses of multi-token prediction.

    Those of depth k are summed over the tokens that it predicts and divided by the number of all labels, as in equation
    24 of the DeepSeek-V3 report.

    Args:
        tiles: makes the logits, where the output holds what the head's projection takes; None: it holds logits.
    """

    def __init__(self, tiles: Tiles | None = None) -> None:
        self._tiles = tiles

    def tiled(self, tiles: Tiles) -> TokenLoss:
        """The same over tiles of the sequence."""
        return TokenLoss(tiles)

    def __call__(self, output: Nest, labels: Tensor, mtp_weight: float = 0.3) -> Tensor:
        """The loss (scalar).

        Args:
            output: of `Head`.
            labels: [batch, length].
            mtp_weight: factor on the mean of the losses of all depths (equation 25).
        """
        passed = split(output)
        total = self._mean(passed.x, labels)
        if passed.done:
            later = [self._sum(logits, labels[:, k:]) for k, logits in enumerate(passed.done, 1)]
            total = total + mtp_weight / len(later) * sum(later) / (labels != _IGNORED).sum()
        return total if passed.loss is None else total + passed.loss.squeeze(0)

    shifts = False  #: labels are those of the next tokens

    def of_parts(self) -> Callable[[Nest, PartLabels], Tensor]:
        """The same of parts of sequences."""
        return self._of_part

    def _of_part(self, output: Nest, shard: PartLabels, mtp_weight: float = 0.3) -> Tensor:
        passed = split(output)
        first, *later = [self._sum(x, shard.further(k)) for k, x in enumerate((passed.x, *passed.done))]
        total = first + (mtp_weight / len(later) * sum(later) if later else 0.0)
        total = total * shard.of_mean().to(total.dtype)
        return total if passed.loss is None else total + passed.loss.squeeze(0)

    def _mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._tiles is None:
            return _cross_entropy(logits, labels, "mean")
        return self._sum(logits, labels) / (labels != _IGNORED).sum()

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        summed = partial(_cross_entropy, reduction="sum")
        return summed(logits, labels) if self._tiles is None else self._tiles.total(summed, logits, labels)


loss = TokenLoss()
"""The loss of the model whose layers `layers` lists."""


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    precise = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(
        logits.to(precise).flatten(0, 1), labels.flatten(), reduction=reduction, ignore_index=_IGNORED
    )
