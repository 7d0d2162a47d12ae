"""Parts of sequences: blocks of a model of transformers, of which each of S ranks has its part of the tokens.

The model's own forward makes masks, positions and rotary angles of whole sequences around the blocks. A block is given
the hidden state of the rank's part, and of the angles what belongs to it; its attention is transformers' own function,
on some heads of whole sequences and the whole mask. So windows, padding and packed sequences are those of the model.

DeepSpeed's `UlyssesSPAttentionHF` does the same for models on one rank each: it makes its groups of neighbouring ranks
of the world, takes one size of micro-batches, drops masks (so that `sdpa` knows neither windows nor packed sequences)
and exchanges queries, keys, values and positions one by one.

Within a forward the exchanges are waited for; `phased_attention` runs a block in pieces around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..comm.all_to_all import exchange
from ..comm.nest import Nest
from ..comm.tickets import Tickets
from ..engine.checks.token_mixing import SHARED_HEADS, mixing_modules, refusal
from ..errors import ConfigError, PipelineRuntimeError
from ..models.head_exchange import HeadExchange, Parcel
from ..models.trial import having
from .losses import PretrainedModel

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # the name under which modules of transformers look up attention functions
_GROUPS = "num_key_value_groups"  # the attribute that tells such a function how many queries share keys


class Part:
    """The part of each sequence that a rank has.

    Args:
        group: the S ranks that share each sequence, in the order of its parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def of(self, whole: Tensor) -> Tensor:
        """[batch, length, ...] -> [batch, length / S, ...]."""
        return whole.chunk(self.size, dim=1)[self.rank].contiguous()

    def cut(self, given: Nest, length: int) -> Nest:
        """Of all that belongs to single tokens, floating-point `[batch or 1, length, width]`, the part of this rank;
        positions and masks stay whole."""

        def own(leaf: Nest) -> Nest:
            if not isinstance(leaf, Tensor) or leaf.dim() != 3 or leaf.shape[1] != length:
                return leaf
            return self.of(leaf) if leaf.is_floating_point() or leaf.is_complex() else leaf

        return pytree.tree_map(own, given)

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the ranks of the group, whose gradient is the sum of theirs. Collective."""
        each = [1] * self.size
        return exchange(mine.expand(self.size, *mine.shape).contiguous(), each, each, self.group).sum(dim=0)


class PartViews(TorchFunctionMode):
    """Behind the blocks: a model that gives their output the shape of its inputs (GPT-2) gives a part that of a part.

    Args:
        length: of a part.
        whole: of whole sequences.
    """

    def __init__(self, length: int, whole: int) -> None:
        super().__init__()
        self._length, self._whole = length, whole

    def __torch_function__(
        self,
        func: Callable[..., Nest],
        types: object,
        args: tuple[Nest, ...] = (),
        kwargs: dict[str, Nest] | None = None,
    ) -> Nest:
        if func in (Tensor.view, Tensor.reshape) and isinstance(args[0], Tensor) and args[0].dim() == 3:
            hidden, *shape = args
            shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
            if hidden.shape[1] == self._length and len(shape) == 3 and shape[1] == self._whole:
                args = hidden, (shape[0], self._length, shape[2])
        return func(*args, **(kwargs or {}))


def share_attention(block: nn.Module, model: PretrainedModel, group: dist.ProcessGroup) -> list[nn.Module]:
    """Let the attention of a block work on parts of sequences.

    Args:
        block: of the model.
        model: of transformers.
        group: the ranks that share each sequence.

    Returns:
        Its modules of attention.

    Raises:
        ConfigError: it mixes tokens elsewhere than in transformers' attention functions, or its heads cannot be
            divided.
    """
    exchange, found = HeadExchange(group), []
    for part in block.modules():
        registry = _registry_of(part)
        if registry is None:
            continue
        config = getattr(part, "config", model.config)
        heads, name = config.num_attention_heads, config._attn_implementation
        exchange.check(heads, heads // getattr(part, _GROUPS, 1))
        if name not in registry:  # "eager", which is a function of each model's own
            raise ConfigError(
                f'{type(part).__name__} with attn_implementation="{name}" does not know parts of sequences '
                '("sequence_parallel_size"): build the model with "sdpa", "flex_attention" or "flash_attention_2"'
            )
        if not isinstance(registry[name], _OfSharedHeads):
            registry[name] = _OfSharedHeads(registry[name])
        setattr(part, SHARED_HEADS, SharedHeads(exchange))
        found.append(part)
    others = mixing_modules(block)
    if others or not found:
        raise ConfigError(refusal(others[0] if others else type(block).__name__))
    return found


def unshare_attention(module: nn.Module) -> None:
    """Let attention see whole sequences again."""
    for part in module.modules():
        vars(part).pop(SHARED_HEADS, None)


def check_shared(attention: Iterable[nn.Module]) -> None:
    """Refuse to run modules of attention as those of parts that have been unshared since.

    Raises:
        PipelineRuntimeError: there is one.
    """
    if any(SHARED_HEADS not in vars(part) for part in attention):
        raise PipelineRuntimeError(
            "other pieces have been made of this model since its blocks share sequences: end the engine before, or "
            "give get_model_adapter a model of its own"
        )


def _registry_of(module: nn.Module) -> Any:  # noqa: ANN401
    """transformers' `AttentionInterface`, in which a module looks up its attention function; None: it does not."""
    for kind in type(module).__mro__:
        for method in vars(kind).values():
            if inspect.isfunction(method):
                plain = inspect.unwrap(method)
                if _REGISTRY in plain.__code__.co_names:
                    return plain.__globals__[_REGISTRY]
    return None


class Call(NamedTuple):
    """A call of an attention function, but for queries, keys and values.

    Args:
        attend: the function.
        mask: of whole sequences.
        args: that follow the mask.
        kwargs: all others.
    """

    attend: Callable[..., tuple[Tensor, Tensor | None]]
    mask: Nest
    args: tuple[Nest, ...]
    kwargs: dict[str, Nest]


class AtAttention(BaseException):
    """Ends a forward at its attention function. No Exception, so that nothing on the way catches it.

    Args:
        parcel: queries, keys and values, which have not travelled.
        call: of the function.
    """

    def __init__(self, parcel: Parcel, call: Call) -> None:
        super().__init__()
        self.parcel, self.call = parcel, call


class SharedHeads:
    """What a module of attention knows of the ranks that share its sequences; its attribute `SHARED_HEADS`.

    Args:
        exchange: of parts of sequences for heads.
    """

    def __init__(self, exchange: HeadExchange) -> None:
        self._exchange = exchange
        self._stops = self._tries = False
        self._known: Tensor | None = None

    def trying(self) -> AbstractContextManager[None]:
        """Let torch's attention without a mask stand for the function, which may not know the precision of weights that
        will be those of bf16, or be compiled for each length."""
        return having(self, "_tries", True)

    def stopping(self) -> AbstractContextManager[None]:
        """Let forwards that come to the attention function raise `AtAttention`."""
        return having(self, "_stops", True)

    def knowing(self, mixed: Tensor) -> AbstractContextManager[None]:
        """Let the attention function return `mixed [batch, length / S, heads, width]`, whatever it is given."""
        return having(self, "_known", mixed)

    def attend(self, module: nn.Module, parts: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        """The mixed tokens of the rank's part.

        Args:
            module: of the attention.
            parts: queries, keys and values, `[batch, heads, length / S, width]` each.
            call: of the function.

        Returns:
            [batch, length / S, heads, width].
        """
        if self._known is not None:
            return self._known
        parcel = self._exchange.by_heads(*(part.transpose(1, 2) for part in parts))
        if self._tries:
            call = call._replace(attend=_unmasked)
        if self._stops:
            raise AtAttention(parcel, call)
        return self.returned(self.travel(self.mixed(module, self.travel(parcel, None), call), None))

    def travel(self, parcel: Parcel, tickets: Tickets | None) -> Parcel:
        """Exchange the blocks; see `HeadExchange.travel`."""
        return self._exchange.travel(parcel, tickets)

    def mixed(self, module: nn.Module, parcel: Parcel, call: Call) -> Parcel:
        """Attention by some heads of whole sequences.

        Args:
            module: of the attention.
            parcel: queries, keys and values, which have travelled.
            call: of the function.

        Returns:
            The mixed tokens, which have not.
        """
        query, key, value = (part.transpose(1, 2) for part in self._exchange.heads_of(parcel))
        grouped = getattr(module, _GROUPS, None) is not None
        with having(module, _GROUPS, query.shape[1] // key.shape[1]) if grouped else nullcontext():
            mixed, _ = call.attend(module, query, key, value, call.mask, *call.args, **call.kwargs)
        return self._exchange.by_tokens(mixed)

    def returned(self, parcel: Parcel) -> Tensor:
        """What has come of `mixed`: `[batch, length / S, heads, width]`."""
        return self._exchange.tokens_of(parcel)


def _unmasked(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Nest, **___: Nest) -> tuple[Tensor, None]:
    return scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2), None


class _OfSharedHeads:
    """An attention function of transformers, for modules that share sequences and for others.

    Args:
        attend: the function.
    """

    def __init__(self, attend: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._attend = attend

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Nest,
        *args: Nest,
        **kwargs: Nest,
    ) -> tuple[Tensor, Tensor | None]:
        shared: SharedHeads | None = getattr(module, SHARED_HEADS, None)
        if shared is None:
            return self._attend(module, query, key, value, attention_mask, *args, **kwargs)
        for name, more in kwargs.items():
            if isinstance(more, Tensor) and more.is_floating_point():
                raise ConfigError(
                    f"{type(module).__name__} gives its attention {name}, of which it is not known what belongs to "
                    'which head: leave out "sequence_parallel_size"'
                )
        return shared.attend(module, (query, key, value), Call(self._attend, attention_mask, args, kwargs)), None
