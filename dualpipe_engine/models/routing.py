"""Routing: which experts a token goes to, and what keeps their loads even."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .config import MoEConfig
from .counting import Counting, counters


class Balance(NamedTuple):
    """What the auxiliary loss is made from.

    Args:
        loads: [sequences or 1, experts] int64, how often each expert was chosen; where ranks have parts of sequences,
            `[parts, sequences or 1, experts]`.
        shares: [sequences or 1, experts], mean scores.
        factor: of the products of both.
    """

    loads: Tensor
    shares: Tensor
    factor: float

    def loss(self) -> Tensor:
        """The weighted auxiliary loss, the mean over sequences, `[1]`; of parts it is that of whole sequences with the
        `shares` of one part, so that the mean over the parts is theirs."""
        parts = self.loads.view(-1, *self.shares.shape)
        loads = parts.sum(dim=0).to(self.shares.dtype) * (self.factor / len(parts))
        return (loads * self.shares).sum(dim=-1).mean().view(1)


class Counted(NamedTuple):
    """Which tokens count of a part of sequences.

    Args:
        first: of each sequence here, so many.
        mean: over the parts.
    """

    first: int
    mean: float


class Routing(NamedTuple):
    """Where tokens go.

    Args:
        experts: [tokens, top_k] int64.
        weights: [tokens, top_k], factors on the outputs of the experts.
        balance: of the auxiliary loss; None in evaluation and where there is none.
        counts: [experts] int64, how often each expert was chosen.
    """

    experts: Tensor
    weights: Tensor
    balance: Balance | None
    counts: Tensor

    @property
    def loss(self) -> Tensor:
        """The weighted auxiliary loss, `[1]`."""
        return self.weights.new_zeros(1) if self.balance is None else self.balance.loss()


def count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, `[num_experts]` int64. Unlike `bincount` it never makes the host wait."""
    flat = experts.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


class Router(Counting, nn.Module):
    """Top-k gate.

    "bias": sigmoid scores; a bias that only the choice sees falls where an expert has had more tokens than the mean,
    and rises where it has had fewer (DeepSeek-V3 report, section 2.1.2), with `groups` among the experts of a token's
    best groups, and with `sequence_loss` beside the balance loss of each sequence (its equations 17 to 20). "loss":
    softmax scores, and the auxiliary loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6) over the
    tokens of one micro-batch. The weights of the chosen experts add up to `routed_scale`, except with one expert, where
    that would leave the gate without a gradient, unless `normalised` says otherwise.

    """

    bias: Tensor
    follows = True
    _keep_in_fp32_modules_strict = ("bias", "counts", "load")

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        nn.init.normal_(self.weight, std=0.02 if config.init_std is None else config.init_std)
        self.register_buffer("bias", torch.zeros(config.experts))
        for name, zeros in counters(config.experts):
            self.register_buffer(name, zeros, persistent=False)

    def forward(self, x: Tensor, sequences: int = 1, counted: Counted | None = None) -> Routing:
        """Route `x [tokens, hidden]`, one after another those of `sequences` of one length; gates are computed in fp32
        at least.

        Args:
            x: tokens.
            sequences: how many.
            counted: the tokens that loads and the auxiliary loss know; None: all.
        """
        config = self.config
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = functional.linear(x.to(precise), self.weight.to(precise))
        if config.balancing == "bias":
            scores = logits.sigmoid()
            experts = self._within_groups(scores + self.bias).topk(config.top_k, dim=-1).indices
        else:
            scores = logits.softmax(dim=-1)
            experts = scores.topk(config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.top_k > 1 if config.normalised is None else config.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = known = count(experts, config.experts)
        each = scores.unflatten(0, (sequences, -1))
        if counted is not None:
            known = count(experts.unflatten(0, (sequences, -1))[:, : counted.first], config.experts)
            each = each[:, : counted.first]
        self.note(known)
        balance, length = None, each.shape[1] if counted is None else counted.mean
        if config.balancing == "loss" and self.training:
            tokens = sequences * length
            factor = config.loss_weight * config.experts / (tokens * config.top_k)
            balance = Balance(known.unsqueeze(0), each.sum(dim=(0, 1)).unsqueeze(0) / tokens, factor)
        if config.sequence_loss and self.training:
            balance = self._balance_of_sequences(each, length)
        return Routing(experts, weights * config.routed_scale, balance, counts)

    def _within_groups(self, biased: Tensor) -> Tensor:
        """Biased scores `[tokens, experts]`, minus infinity outside of the groups that are kept."""
        config = self.config
        if config.kept_groups == config.groups:
            return biased
        grouped = biased.unflatten(-1, (config.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(config.kept_groups, dim=-1).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(-2)

    def _balance_of_sequences(self, scores: Tensor, length: float) -> Balance:
        """Equations 17 to 20 for scores `[sequences, tokens, experts]`, divided by `length`.

        An expert counts where its score is among the `top_k` highest, whatever biases and groups have chosen."""
        config = self.config
        chosen = scores.topk(config.top_k, dim=-1).indices
        often = torch.zeros_like(scores, dtype=torch.int64).scatter(-1, chosen, 1).sum(dim=1)
        shares = (scores / scores.sum(dim=-1, keepdim=True)).sum(dim=1) / length
        return Balance(often, shares, config.sequence_loss * config.experts / (config.top_k * length))

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Move the biases after a step by what all copies have counted, `load [experts]`."""
        super().rebalance(load)
        if self.config.balancing == "bias":
            self.bias += self.config.bias_rate * torch.sign(load.mean() - load).to(self.bias.dtype)


def rebalance(module: nn.Module, group: dist.ProcessGroup | None, due: bool = False) -> None:
    """Tell those who count on a rank what all copies have counted in one batch, and start anew.

    Args:
        module: holds routers, and blocks of others that count.
        group: the ranks that hold copies of them, the mirror included; collective over it. None: this rank alone.
        due: whether all of them are told, not only those that follow.
    """
    counting = [part for part in module.modules() if isinstance(part, Counting)]
    told = [part for part in counting if due or part.follows]
    if told:
        counts = torch.cat([part.counts for part in told])
        if group is not None:
            dist.all_reduce(counts, group=group)
        for part, load in zip(told, counts.split([len(part.counts) for part in told]), strict=True):
            part.rebalance(load)
    for part in counting:
        part.counts.zero_()
