"""Whether DeepSpeed's layer does what the block does whose place it takes.

DeepSpeed's presets tell blocks by the names of their parts, which many models share that route otherwise or have more
parts. So both are tried on one hidden state, as copies with drawn weights, in fp32, whose experts multiply by numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ..trial import having, hidden_state
from .layer import SharedMoE

Block = TypeVar("Block", bound=nn.Module)

#: Keys that let the layer route otherwise than the block, if the user says so.
ROUTING = (
    "top_k",
    "top_k_attr",
    "score_func",
    "route_norm",
    "route_scale",
    "routed_scaling_factor",
    "num_expert_groups",
    "num_limited_groups",
)


def difference(source: nn.Module, made: SharedMoE, given: AutoEPConfig) -> str | None:
    """What of a block gets lost.

    Args:
        source: the block.
        made: what takes its place; its ranks need not be connected.
        given: the "expert_parallel" section as the user has it.

    Returns:
        What `made` does not do, as the end of a sentence; None: it does what the block does, or what the section says
        in other words, or the block does not show how it calls its experts.
    """
    if lost := sorted(source.state_dict().keys() - made.names_in_source()):
        return f"has no place for the weights {', '.join(lost)} of {type(source).__name__}"
    usual = AutoEPConfig()
    if any(getattr(given, key) != getattr(usual, key) for key in ROUTING):
        return None
    with torch.random.fork_rng(), torch.no_grad():
        for mode in (False, True):
            if (why := _tried(source, made, mode)) is not None:
                return why
    return None


def _tried(source: nn.Module, made: SharedMoE, training: bool) -> str | None:
    """How results differ in evaluation, or in training."""
    factors = torch.randn(made.num_experts, generator=torch.Generator().manual_seed(3))
    pretended = _Pretended(factors.to(next(source.parameters()).device))
    theirs = pretended.within(source, made.form.spec.experts_name).train(training)
    ours = _without_experts(made, "experts").train(training)
    _draw(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    hidden = hidden_state(theirs, made.hidden_size)
    try:
        torch.manual_seed(0)
        expected = _first(theirs(hidden.clone()))  # some write into it
    except Exception:  # a block of the user's own may ask for more than a hidden state
        return None
    if not pretended.called:
        return None
    kind = type(source).__name__
    try:
        torch.manual_seed(0)
        found = _first(ours.with_experts(hidden, lambda rows, experts: rows * pretended.factors[experts, None]))
    except Exception as error:  # a weight of another shape, such as that of a bias
        said = (str(error).splitlines() or [""])[0]
        return f"does not run with the weights of {kind} ({type(error).__name__}: {said})"
    if torch.allclose(found, expected.reshape_as(found), rtol=1e-3, atol=1e-4):
        return None
    if training:
        return f"does not draw the random numbers that {kind} draws in training: set its router_jitter_noise to 0"
    return f"routes otherwise than {kind}, so that results differ"


class _Pretended:
    """Experts that multiply by a number each, `factors [experts]`."""

    def __init__(self, factors: Tensor) -> None:
        self.factors, self.called = factors, False

    def within(self, block: nn.Module, name: str) -> nn.Module:
        """A copy of the block, with these in place of its own."""
        experts = block.get_submodule(name)
        made = _without_experts(block, name)
        if isinstance(experts, nn.ModuleList):
            made.add_module(name, nn.ModuleList(_Doing(self._one(number)) for number in range(len(experts))))
        else:
            made.add_module(name, _Doing(self._all))
        return made

    def _one(self, number: int) -> Callable[..., Tensor]:
        def run(rows: Tensor, *_: Nest) -> Tensor:
            self.called = True
            return rows * self.factors[number]

        return run

    def _all(self, *args: Nest, **kwargs: Nest) -> Tensor:
        """As transformers calls them: a hidden state, `[tokens, top_k]` experts and their weights."""
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        hidden, chosen, weights = tensors  # another number of tensors is an error of the block's trial
        if chosen.is_floating_point():
            chosen, weights = weights, chosen
        self.called = True
        return hidden * (weights * self.factors[chosen]).sum(dim=-1).view(*hidden.shape[:-1], 1)


class _Doing(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["forward"] = run


def _without_experts(block: Block, name: str) -> Block:
    """A copy in fp32."""
    with having(block, name, nn.Module()):
        return copy.deepcopy(block).float()


def _draw(block: nn.Module) -> None:
    """Values with which experts are told apart, since routers of some models start at zero."""
    generator = torch.Generator().manual_seed(7)
    for tensor in (*block.parameters(), *block.buffers()):
        if tensor.is_floating_point():
            width = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * width)


def _first(result: Nest) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
