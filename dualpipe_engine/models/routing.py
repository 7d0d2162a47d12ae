"""Routing: which experts a token goes to, and what keeps their loads even."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .config import MoEConfig


class Routing(NamedTuple):
    """Where tokens go.

    Args:
        experts: [tokens, top_k] int64.
        weights: [tokens, top_k], factors on the outputs of the experts.
        loss: [1], the weighted auxiliary loss; zero in evaluation and with bias-based balancing.
        counts: [experts] int64, how often each expert was chosen.
    """

    experts: Tensor
    weights: Tensor
    loss: Tensor
    counts: Tensor


def count(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, `[num_experts]` int64. Unlike `bincount` it never makes the host wait."""
    flat = experts.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


class Router(nn.Module):
    """Top-k gate.

    "bias": sigmoid scores; a bias that only the choice sees falls where an expert has had more tokens than the mean,
    and rises where it has had fewer (DeepSeek-V3 report, section 2.1.2). "loss": softmax scores, and the auxiliary
    loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6) over the tokens of one micro-batch. The weights
    of the chosen experts add up to `routed_scale`, except with one expert, where that would leave the gate without a
    gradient.

    Attributes:
        counts: [experts], tokens that this rank has sent to each expert since the last `rebalance`.
        load: [experts], the same over all copies, of the last batch.
    """

    bias: Tensor
    counts: Tensor
    load: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("counts", torch.zeros(config.experts), persistent=False)
        self.register_buffer("load", torch.zeros(config.experts), persistent=False)

    def forward(self, x: Tensor) -> Routing:
        """Route `x [tokens, hidden]`; gates are computed in fp32 at least."""
        config = self.config
        precise = torch.promote_types(x.dtype, torch.float32)
        logits = functional.linear(x.to(precise), self.weight.to(precise))
        if config.balancing == "bias":
            scores = logits.sigmoid()
            experts = (scores + self.bias).topk(config.top_k, dim=-1).indices
        else:
            scores = logits.softmax(dim=-1)
            experts = scores.topk(config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if config.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = count(experts, config.experts)
        # Recomputation, which is part of a backward, must not count again.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.counts += counts
        loss = scores.new_zeros(1)
        if config.balancing == "loss" and self.training:
            share = counts.to(precise) / experts.numel()
            loss = (config.loss_weight * config.experts * (share * scores.mean(dim=0)).sum()).view(1)
        return Routing(experts, weights * config.routed_scale, loss, counts)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Move the biases after a step by what all copies have counted, `load [experts]`."""
        self.load.copy_(load)
        self.counts.zero_()
        if self.config.balancing == "bias":
            self.bias += self.config.bias_rate * torch.sign(load.mean() - load).to(self.bias.dtype)


def rebalance(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Rebalance all routers of a rank by the tokens of one batch.

    Args:
        module: holds the routers.
        group: the ranks that hold copies of them, the mirror included; collective over it. None: this rank alone.
    """
    routers = [part for part in module.modules() if isinstance(part, Router)]
    if not routers:
        return
    counts = torch.cat([router.counts for router in routers])
    if group is not None:
        dist.all_reduce(counts, group=group)
    for router, load in zip(routers, counts.split([len(router.counts) for router in routers]), strict=True):
        router.rebalance(load)
