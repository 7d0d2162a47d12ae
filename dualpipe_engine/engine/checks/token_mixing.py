"""Token mixing: attention that does not know that it sees a part of a sequence, which would give other numbers.

A module that knows has a method `share_sequences`. Known kinds of others are found by their class, before the first
batch; calls of torch's attention outside of a module that knows are found in the first forwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...comm.from_all import from_all
from ...errors import ConfigError

SHARED_HEADS = "shared_heads"  #: attribute of modules of others whose attention has been given parts of sequences

_MIXING = (nn.MultiheadAttention, nn.RNNBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MIXING_NAMES = ("Attention", "Mixer", "DeltaNet", "Recurrent", "Mamba", "Rwkv")  # in names of classes of transformers
_ATTENTION = (functional.scaled_dot_product_attention, functional.multi_head_attention_forward)


def mixing_modules(module: nn.Module) -> list[str]:
    """Classes of the modules that mix tokens and are in none that knows parts of sequences."""
    if knows_parts(module):
        return []
    kind = type(module)
    wide = isinstance(module, _CONVOLUTIONS) and any(size > 1 for size in module.kernel_size)
    if isinstance(module, _MIXING) or wide or (_named_so(kind) and not any(map(knows_parts, module.modules()))):
        return [kind.__name__]
    return [name for child in module.children() for name in mixing_modules(child)]


def _named_so(kind: type[nn.Module]) -> bool:
    return kind.__module__.partition(".")[0] == "transformers" and any(name in kind.__name__ for name in _MIXING_NAMES)


def knows_parts(module: object) -> bool:
    """Whether a module takes the ranks that share its sequences, or has taken them."""
    return hasattr(module, "share_sequences") or hasattr(module, SHARED_HEADS)


def refusal(name: str) -> str:
    """What to say of a class that mixes tokens."""
    return (
        f'{name} mixes tokens and does not know parts of sequences, which "sequence_parallel_size" gives it: take the '
        "attention of dualpipe_engine.models, or give the module a method share_sequences(group)"
    )


class TokenMixing:
    """Looks at the first forwards of an engine.

    Args:
        shared: whether ranks have parts of sequences; else nothing is done.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._seen: set[bool] = set()
        self._found: list[str] = []

    @contextmanager
    def watched(self, train: bool) -> Iterator[None]:
        """The body is a batch; the first one of training and of evaluation are watched."""
        if not self._shared or train in self._seen:
            yield
            return
        with _AttentionCalls(self._found):
            yield

    def check(self, train: bool) -> None:
        """After the forwards, before a step. Collective over all ranks.

        Raises:
            ConfigError: a module has called attention that does not know parts; on all ranks.
        """
        if not self._shared or train in self._seen:
            return
        self._seen.add(train)
        if names := sorted({name for each in from_all(self._found) for name in each}):
            raise ConfigError(refusal(names[0]), everywhere=True)


class _AttentionCalls(TorchFunctionMode):
    """Notes who calls attention outside of a module that knows parts."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _ATTENTION:
            callers = list(_modules_of(sys._getframe(1)))
            if not any(knows_parts(each) for each in callers):
                self._found.append(type(callers[0]).__name__ if callers else "a function of the model")
        return func(*args, **(kwargs or {}))


def _modules_of(frame: FrameType | None) -> Iterator[nn.Module]:
    """Modules whose methods are being called, the innermost first."""
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if isinstance(caller, torch.nn.Module):
            yield caller
        frame = frame.f_back
