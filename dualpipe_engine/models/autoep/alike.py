"""Whether DeepSpeed's layer does what the block does whose place it takes.

DeepSpeed's presets tell blocks by the names of their parts, which many models share that route otherwise or have more
parts. So both are tried on one hidden state, as copies with drawn weights, in fp32, whose experts multiply by numbers;
the experts of both are tried apart from them, with small weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ...runtime.phases import hooks_of
from ...runtime.weight_grad_split import has_hooks
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
    """What of a block gets lost. Lets `made` return what the block returns, where that shows.

    Args:
        source: the block.
        made: what takes its place; its ranks need not be connected.
        given: the "expert_parallel" section as the user has it.

    Returns:
        What `made` does not do, as the end of a sentence; None: it does what the block does, or what the section says
        in other words, or the block does not show how it calls its experts.
    """
    kind = type(source).__name__
    if lost := sorted(source.state_dict().keys() - made.names_in_source()):
        return f"has no place for the weights {', '.join(lost)} of {kind}"
    if _has_hooks(source, but=made):
        return f"has no place for the hooks of {kind}"
    usual = AutoEPConfig()
    chosen = any(getattr(given, key) != getattr(usual, key) for key in ROUTING)
    with torch.random.fork_rng(), torch.no_grad():
        if given.expert_activation is None and _experts_differ(source, made):
            return f"has experts that compute otherwise than those of {kind}"
        for mode in (False, True):
            if (why := _tried(source, made, mode, chosen)) is not None:
                return why
    return None


def _has_hooks(source: nn.Module, but: nn.Module) -> bool:
    """Whether the user has put hooks on a part or weight of a block that does not become one of `but`."""
    kept = {id(each) for each in (*but.modules(), *but.parameters())}
    lost = [part for part in source.modules() if id(part) not in kept]
    hooks = [hook for part in lost for kind in hooks_of(part) for hook in kind.values()]
    recording = [hook for hook in hooks if str(hook.__module__).startswith("transformers.")]
    return len(hooks) > len(recording) or any(has_hooks(each) for each in source.parameters() if id(each) not in kept)


def _tried(source: nn.Module, made: SharedMoE, training: bool, chosen: bool) -> str | None:
    """How results differ in evaluation, or in training, other than in numbers that the user has `chosen`."""
    factors = torch.randn(made.num_experts, generator=torch.Generator().manual_seed(3))
    pretended = _Pretended(factors.to(next(source.parameters()).device))
    theirs = pretended.within(source, made.form.spec.experts_name).train(training)
    _draw(theirs)
    hidden = hidden_state(theirs, made.hidden_size)
    try:
        torch.manual_seed(0)
        expected = theirs(hidden.clone())  # some write into it
    except Exception:  # a block of the user's own may ask for more than a hidden state
        return None
    if not pretended.called:
        return None
    kind = type(source).__name__
    if not made.return_as(expected):
        return f"does not return what {kind} returns, which is more than a hidden state and logits of its router"
    ours = _without_experts(made, "experts").train(training)
    try:
        ours.load_state_dict(theirs.state_dict(), strict=False)
        torch.manual_seed(0)
        found = ours.with_experts(hidden, lambda rows, experts: rows * pretended.factors[experts, None])
    except Exception as error:  # a weight of another shape, such as that of a bias
        said = (str(error).splitlines() or [""])[0]
        return f"does not run with the weights of {kind} ({type(error).__name__}: {said})"
    results = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    if chosen or all(one.shape == other.shape and torch.allclose(one, other, 1e-3, 1e-4) for one, other in results):
        return None
    if training:
        return f"does not draw the random numbers that {kind} draws in training: set its router_jitter_noise to 0"
    return f"routes otherwise than {kind}, so that results differ"


def _experts_differ(source: nn.Module, made: SharedMoE) -> bool:
    """Whether experts of drawn weights, whose widths are in the proportion of the block's, show another result."""
    spec, rows_each = made.form.spec, 64
    unit = math.gcd(spec.hidden_size, spec.ffn_hidden_size)
    generator = torch.Generator().manual_seed(5)
    theirs = source.get_submodule(spec.experts_name)
    stacked = not isinstance(theirs, nn.ModuleList)
    drawn: dict[str, Tensor] = {}
    for name, param in theirs.named_parameters():
        *experts, outward, inward = param.shape
        shape = (*experts, outward // unit * 4, inward // unit * 4)
        drawn[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    own = {f"{spec.experts_name}.{name}": value for name, value in drawn.items()}
    made.form.from_source(own, "")
    tried = min(2, made.num_local_experts)
    rows = torch.randn(tried * rows_each, spec.hidden_size // unit * 4, generator=generator) * 4  # beyond limits too
    chosen = torch.arange(tried).repeat_interleave(rows_each)
    try:
        if stacked:
            expected = functional_call(theirs, drawn, (rows, chosen[:, None], torch.ones(len(rows), 1)))
        else:
            outputs = [
                functional_call(expert, _of(drawn, number), (rows[chosen == number],))
                for number, expert in enumerate(theirs.children())
                if number < tried
            ]
            expected = torch.cat(outputs)
    except Exception:  # experts of the user's own may ask for more than rows
        return False
    with having(made.experts, "use_grouped_mm", False), having(made.experts, "use_triton_grouped_mm", False):
        values = {name.removeprefix("experts."): value for name, value in own.items()}
        found = functional_call(made.experts, values, (rows, chosen.bincount()))
    return not (isinstance(expected, Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-4))


def _of(drawn: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """The weights of one expert of a list."""
    return {name.removeprefix(f"{number}."): value for name, value in drawn.items() if name.startswith(f"{number}.")}


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
