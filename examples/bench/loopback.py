"""F&B of one MoE block in bf16 on one GPU, with all-to-alls that go through pinned host memory and back.

The size of a block's rows is stretched until communication takes as long as computation, so that the pair, at best,
takes half as long as its halves one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dualpipe_engine.models.block import MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.dispatch import AllToAll, State
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.weight_grad import WeightGradStore, install

CONFIG = MoEConfig(
    hidden=2048, heads=16, head=128, rotary=64, kv_rank=512, experts=16, top_k=4, expert_inner=1024, blocks=1
)
TOKENS = (4, 2048)


class _Event:
    """A loop-back under way on its own stream."""

    def __init__(self, event: torch.cuda.Event, kept: tuple[Tensor, ...]) -> None:
        self._event, self._kept = event, kept

    def wait(self, timeout_s: float) -> None:
        self._event.wait()

    def done(self) -> bool:
        return True  # waiting costs the host nothing

    def finished_at(self) -> float | None:
        return None


class Loop:
    """Sends rows to the host and back, `passes` times."""

    def __init__(self) -> None:
        self.passes = 0
        self._stream = torch.cuda.Stream(priority=-1)
        self._host: Tensor | None = None

    def post(self, rows: Tensor, tickets: Any) -> Tensor:
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        if self._host is None or self._host.shape != rows.shape:
            self._host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self.passes):
                self._host.copy_(rows, non_blocking=True)
                out.copy_(self._host, non_blocking=True)
            if not self.passes:
                out.copy_(rows)
            event = torch.cuda.Event()
            event.record()
        ticket = _Event(event, (rows, out))
        if tickets is None:
            ticket.wait(0.0)
        else:
            tickets.add(ticket, rows.nbytes)
        return out


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, loop: Loop, tickets: Any) -> Tensor:
        ctx.loop, ctx.tickets = loop, tickets
        return loop.post(rows, tickets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.loop.post(grads[0], ctx.tickets), None, None


class LoopBack(AllToAll):
    """The dispatcher of one rank, whose rows travel all the same."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(None, CONFIG.experts)
        self._loop = loop

    def dispatch(self, state: State, tickets: Any) -> State:
        state = super().dispatch(state, None)
        return state | {"rows": _Travel.apply(state["rows"], self._loop, tickets)}

    def combine(self, state: State, tickets: Any) -> State:
        return state | {"rows": _Travel.apply(state["rows"], self._loop, tickets)}


def _timed(run: Callable[[], None], repeats: int = 10) -> float:
    """Median seconds."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[2:])


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--cuda needs a GPU, and there is none here")
    torch.manual_seed(0)
    loop = Loop()
    block = MoEBlock(CONFIG).to("cuda", torch.bfloat16)
    block.dispatcher = LoopBack(loop)
    store = WeightGradStore()
    install(block, store)
    chunk = PhasedChunk(block, 0, phases_of([block]), 60.0, is_last=False, store=store)
    inputs = torch.randn(*TOKENS, CONFIG.hidden, device="cuda", dtype=torch.bfloat16)
    grads = [torch.randn_like(inputs)]
    micro = 0

    def halves() -> None:
        chunk.forward(0, inputs.detach().requires_grad_())
        chunk.backward(0, grads)

    def pair() -> None:
        nonlocal micro
        fresh = inputs.detach().requires_grad_()
        chunk.overlapped(micro + 1, fresh, None, chunk, micro, grads, 1.0)
        micro += 1

    compute = _timed(halves)
    loop.passes = 1
    once = _timed(halves) - compute
    loop.passes = max(1, round(compute / once))
    sequential = _timed(halves)
    chunk.forward(0, inputs.detach().requires_grad_())
    together = _timed(pair)
    longest = max(compute, sequential - compute)
    print(f"{torch.cuda.get_device_name()}, {TOKENS[0] * TOKENS[1]} tokens, {CONFIG}")
    print(f"computation {compute * 1e3:.2f} ms, all-to-all {(sequential - compute) * 1e3:.2f} ms")
    print(f"one after the other {sequential * 1e3:.2f} ms, F&B pair {together * 1e3:.2f} ms")
    print(f"pair / longest of the two: {together / longest:.3f}")
