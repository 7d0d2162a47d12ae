"""LifeCycle: what an engine holds besides memory, and how it gives it back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from ..runtime.weight_grad import uninstall
from .placing.grid import give_back

if TYPE_CHECKING:
    from ..comm.transports import PipelineTransport
    from ..faults.watch import Watch

#: What DeepSpeed's optimizers leave at parameters: ways to fp32 weights and to the group that shares them.
LINKS = (
    "_dp_group",
    "_hp_mapping",
    "_index_in_param_group",
    "get_full_hp_grad",
    "get_full_hp_param",
    "set_full_hp_grad",
    "set_full_hp_param",
)

Engine = TypeVar("Engine", bound="LifeCycle")


class LifeCycle(PipelineEngine):
    """The part of `DualPipeEngine` that ends it."""

    watch: Watch
    own_groups: Sequence[dist.ProcessGroup] = ()  #: process groups that it gives back
    _transport: PipelineTransport | None = None

    def destroy(self) -> None:
        """Give back what the engine holds: threads, sockets, and process groups, those of its PipelineModule included.

        Layers get their own forwards back and may be those of another PipelineModule, but neither engine nor module can
        be used after. Every rank calls it, at the same place of its program; leaving the engine's context,
        `with engine:`, does.

        Raises:
            CheckpointError: a checkpoint could not be written in the background.
        """
        try:
            self._follow_save(wait=True)
        finally:
            if self._transport is not None:
                self._transport.close()
            uninstall(self.module)
            super().destroy()
            _unlink(self.module)
            self.watch.close()
            if self._on_signal is not None:
                self._on_signal.close()
            give_back(self.own_groups)

    def __enter__(self: Engine) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # else other ranks may be elsewhere
            self.destroy()

    def __del__(self) -> None:
        # The collector comes when it likes, but all ends of a communicator have to give it back together.
        with suppress(Exception):
            super().destroy()


def _unlink(module: nn.Module) -> None:
    """Let parameters go without `LINKS`, which lead to what an engine has given back."""
    for param in module.parameters():
        for name in LINKS:
            param.__dict__.pop(name, None)
