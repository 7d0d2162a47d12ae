"""Any test's ranks on the strict twin of NCCL: `pytest --twin`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import strict_backend
import strict_runs
from ranks import Ranks, free_port
from strict_hub import Hub

IN_FLIGHT = 8  #: what CUDA allows by default


class TwinRanks(Ranks):
    """As `Ranks`, on groups that keep NCCL's rules."""

    def run(self, world: int, function: Callable[..., Any], timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        if world == 1 or function in (os.getpid, strict_runs.on_twin):
            return super().run(world, function, timeout, **kwargs)
        hub = Hub(world)
        rules = {"port": free_port(), "eager": True, "in_flight": IN_FLIGHT, "timeouts": False}
        given = {"address": hub.address, "rules": rules, "call": function, "given": kwargs}
        try:
            found = super().run(world, _on_twin, timeout, **given)
            assert not hub.faults, hub.faults
            return found
        finally:
            hub.close()


def _on_twin(address: str, rules: dict[str, Any], call: Callable[..., Any], given: dict[str, Any]) -> Any:
    with strict_backend.installed(address, **rules):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().set_device(0)  # a test's own calls come before the engine's
        return call(**given)
