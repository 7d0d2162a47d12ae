"""Ranks on the strict twin of NCCL: of its own tests, and with `pytest --twin` of any test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import strict_runs
from ranks import Ranks, free_port
from strict_hub import Hub

IN_FLIGHT = 8  #: what CUDA allows by default


def run_on_twin(
    run: Callable[..., list[Any]],
    hub: Hub,
    world: int,
    function: Callable[..., Any],
    eager: bool = True,
    in_flight: int = IN_FLIGHT,
    timeouts: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """What `function(**kwargs)` returns on each rank, which breaks no rule; closes the hub.

    Args:
        run: of `Ranks`.
        hub: for as many ranks, eager or not.
        world: ranks.
        function: to be called.
        eager, in_flight, timeouts: see `strict_backend.installed`.
        kwargs: of the function.
    """
    rules = {"port": free_port(), "eager": eager, "in_flight": in_flight, "timeouts": timeouts}
    try:
        given = {"address": hub.address, "rules": rules, "call": function, "kwargs": kwargs}
        found = run(world, strict_runs.on_twin, **given)
        assert not hub.faults
        return found
    finally:
        hub.close()


class TwinRanks(Ranks):
    """As `Ranks`, on groups that keep NCCL's rules."""

    def run(self, world: int, function: Callable[..., Any], timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        run = super().run
        if world == 1 or function in (os.getpid, strict_runs.on_twin):
            return run(world, function, timeout, **kwargs)

        def limited(*args: Any, **given: Any) -> list[Any]:
            return run(*args, timeout=timeout, **given)

        return run_on_twin(limited, Hub(world), world, strict_runs.on_device, call=function, given=kwargs)
