"""F&B of a stage of MoE blocks on one device, with all-to-alls that go through pinned host memory and back.

The real communication stream posts them to a process group of one rank (`Loop`), which copies as a network would:
beside the computation, on the copy engines. How much it copies is chosen so that communication takes as long as
computation, a little less and a little more: the pair, at best, takes as long as the longer of the two. Communication
is what the exchanges of a pair take alone, computation what its halves take one after the other, less the exchanges.

On the CPU (`--device cpu`, in fp32) the same runs with gloo; it shows that the benchmark works, and hides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe_engine.comm.all_to_all import Counts, _Exchange
from dualpipe_engine.comm.stream import SharedStream
from dualpipe_engine.models.block import MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.dispatch import AllToAll, State
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

LARGE = MoEConfig(
    hidden=4096, heads=32, head=128, rotary=64, kv_rank=512, experts=8, top_k=4, expert_inner=2048, blocks=4
)
SMALL = MoEConfig(hidden=64, heads=2, head=32, rotary=8, kv_rank=16, experts=4, expert_inner=64, blocks=2)
BALANCES = (0.9, 1.0, 1.1)  #: communication / computation
IN_A_ROW = 4  #: pairs, as in training; the host does not stop in between


class _Copied(dist._Work):
    """Copies that streams can wait for."""

    def __init__(self, event: torch.Event) -> None:
        super().__init__()
        self._event = event

    def wait(self, timeout: Any = None) -> bool:
        torch.accelerator.current_stream().wait_event(self._event)
        return True


class Loop(dist.ProcessGroup):
    """A process group of one rank that works on the streams of a device.

    Args:
        device: of the tensors.

    Attributes:
        amount: the part of the rows that travels to the host and back; the others stay, as counts do.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(0, 1)
        kind = dist.ProcessGroup.BackendType.CUSTOM
        self._register_backend(device, kind, torch._C._distributed_c10d.FakeProcessGroup._create_internal(0, 1))
        self.amount = 0.0
        self._host: Tensor | None = None
        self._under_way: list[_Copied] = []

    def alltoall_base(self, out: Tensor, rows: Tensor, receive: Any, send: Any, options: Any = None) -> _Copied:
        far = round(self.amount * len(rows)) if rows.is_floating_point() else 0
        out[far:].copy_(rows[far:])
        if far:
            self._there_and_back(out[:far], rows[:far])
        event = torch.Event(out.device)
        event.record()
        self._under_way = [*self._under_way[-7:], _Copied(event)]
        return self._under_way[-1]

    all_to_all_single = alltoall_base  # since torch 2.13

    def _there_and_back(self, out: Tensor, rows: Tensor) -> None:
        if self._host is None or len(self._host) < len(rows):
            self._host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        host = self._host[: len(rows)]
        host.copy_(rows, non_blocking=True)
        out.copy_(host, non_blocking=True)


class LoopBack(AllToAll):
    """The dispatcher of one rank, whose counts and rows travel all the same.

    Args:
        config: of the block.
        group: of one rank.
        posts: the stream that the exchanges of all blocks go through.
    """

    def __init__(self, config: MoEConfig, group: dist.ProcessGroup, posts: SharedStream) -> None:
        super().__init__(None, config.experts)
        self._loop, self._posts = group, posts

    def count(self, state: State, tickets: Any) -> State:
        return state | {"posted": Counts(state["counts"], self._loop, tickets, self._posts)}

    def dispatch(self, state: State, tickets: Any) -> State:
        counts = state["posted"]
        return state | {"rows": self._travel(state["rows"], counts.send, counts.receive, True, tickets)}

    def combine(self, state: State, tickets: Any) -> State:
        counts = state.pop("posted")
        return state | {"rows": self._travel(state["rows"], counts.receive, counts.send, False, tickets)}

    def _travel(self, rows: Tensor, send: list[int], receive: list[int], ready: bool, tickets: Any) -> Any:
        """As `exchange`, which sends nothing where there is one rank."""
        return _Exchange.apply(rows, tuple(send), tuple(receive), ready, self._loop, tickets, self._posts)


class Bench:
    """A stage, its forward and backward one after the other and as a pair."""

    def __init__(self, device: torch.device, config: MoEConfig, tokens: tuple[int, int], repeats: int) -> None:
        torch.manual_seed(0)
        on_cpu = device.type == "cpu"
        self._device, self._repeats = device, repeats
        self.loop: Any = SimpleNamespace(amount=0.0) if on_cpu else Loop(device)
        dtype = torch.float32 if on_cpu else torch.bfloat16
        group, self._posts = _gloo_of_one() if on_cpu else self.loop, SharedStream(device)
        self._group, self._exchanges, self._top_k = group, 4 * config.blocks, config.top_k
        blocks = torch.nn.Sequential()
        for _ in range(config.blocks):
            block = MoEBlock(config).to(device, dtype)
            block.dispatcher = LoopBack(config, group, self._posts)
            blocks.append(block)
        store = DeferredWeightGrads()
        install(blocks, store)
        self._chunk = PhasedChunk(blocks, 0, phases_of(list(blocks)), 60.0, is_last=False, store=store)
        self._inputs = torch.randn(*tokens, config.hidden, device=device, dtype=dtype)
        self._grads = [torch.randn_like(self._inputs)]
        self._micro, self._host = 0, 0.0

    def _fresh(self) -> Tensor:
        return self._inputs.detach().requires_grad_()

    def halves(self) -> float:
        """Seconds of F, I and W, one after the other: nothing is computed while rows travel."""

        def run() -> None:
            self._chunk.forward(0, self._fresh())
            self._chunk.input_backward(0, self._grads)
            self._chunk.weight_backward(0)

        return self._timed(run)

    def exchanges(self) -> float:
        """Seconds of the exchanges of rows of a pair, and of nothing else."""
        rows = self._inputs.flatten(0, 1).repeat(self._top_k, 1)
        out = torch.empty_like(rows)

        def run() -> None:
            for _ in range(self._exchanges):
                self._posts.posts.all_to_all(self._group, out, rows, [len(rows)], [len(rows)], "exchange").wait(60.0)

        return self._timed(run)

    def pair(self) -> float:
        """Seconds of a pair."""
        chunk = self._chunk
        chunk.forward(self._micro, self._fresh())

        def run() -> None:
            chunk.overlapped(self._micro + 1, self._fresh(), None, chunk, self._micro, self._grads, 1.0)
            self._micro += 1

        seconds = self._timed(run)
        chunk.clear()
        return seconds

    def _timed(self, run: Callable[[], None]) -> float:
        """Seconds of one of `IN_A_ROW`, the median over the later half: earlier pairs learn which waits to fill."""
        found = []
        for _ in range(2 * self._repeats):
            self._synchronize()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                run()
            self._host = (time.perf_counter() - start) / IN_A_ROW
            self._synchronize()
            found.append((time.perf_counter() - start) / IN_A_ROW)
        return median(found[self._repeats :])

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()


def _gloo_of_one() -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def measure(device: torch.device, repeats: int = 3) -> list[dict[str, float]]:
    """For each of `BALANCES` the seconds of computation, of communication, of both one after the other, of a pair, and
    of the host that queued it; "ratio" is the pair over the longer of the first two."""
    on_cpu = device.type == "cpu"
    bench = Bench(device, SMALL if on_cpu else LARGE, (2, 32) if on_cpu else (4, 2048), repeats)
    stays = bench.exchanges()
    compute = bench.halves() - stays
    bench.loop.amount = 1.0
    travels = bench.exchanges()
    rows = []
    for balance in BALANCES:
        bench.loop.amount = (balance * compute - stays) / (travels - stays)
        communication, alone, pair = bench.exchanges(), bench.halves(), bench.pair()
        ratio = pair / max(compute, communication)
        rows.append({"balance": balance, "compute": compute, "communication": communication})
        rows[-1] |= {"sequential": alone, "pair": pair, "host": bench._host, "ratio": ratio}
    return rows


def main(device: str) -> None:
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--cuda needs a GPU, and there is none here; --cuda --device cpu only shows that it runs")
    rows = measure(where, repeats=1 if where.type == "cpu" else 3)
    print(torch.cuda.get_device_name() if where.type == "cuda" else where.type)
    print("| computation | all-to-all | one after the other | F&B pair | host of a pair | pair / longer of the two |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        seconds = [f"{row[name] * 1e3:.2f} ms" for name in ("compute", "communication", "sequential", "pair", "host")]
        print("| " + " | ".join([*seconds, f"{row['ratio']:.3f}"]) + " |")
