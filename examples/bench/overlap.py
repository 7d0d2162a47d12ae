"""How much of the all-to-all an F&B pair hides, beside the same forward and backward one after the other.

    python examples/bench/overlap.py [--exchange experts heads] [--ratios 0.5 1 2] [--compute sleep|real] [--out F.png]
    python examples/bench/overlap.py --model qwen3-moe
    python examples/bench/overlap.py --model llama --exchange heads
    python examples/bench/overlap.py --model qwen3-moe --exchange heads experts
    python examples/bench/overlap.py --cuda

Two ranks share the experts of a stage of some layers, over a link that is made slow (`link.py`; needs root). A layer
has attention, counts, dispatch, experts and combine as the model of `dualpipe_engine.models` has them, with its
dispatcher; its computation takes `ratio` times as long as one of its all-to-alls, forward and backward alike.

With --exchange heads the ranks share sequences: a layer is an attention of `dualpipe_engine.models` with eight heads of
queries for one of keys and of values. Before the mixing of tokens it exchanges those, 1.25 times as much as afterwards;
the computation before, within and after it is as above, with the mean of the two all-to-alls. With `--exchange heads
experts` each layer has both.

Times are medians over pairs. "computation" is what the computation of a pair took, "hidden" the part of the all-to-all
time of the sequential run that an overlapped pair does not wait for: 1 - (pair - computation) / (sequential -
computation).

With --model qwen3-moe a layer is a decoder layer of transformers under DeepSpeed's AutoEP (`decoder.py`). Its own
computation counts too, as what the sequential run does not wait for transfers; work is added to it up to `ratio`.
With --exchange heads, or of qwen3-moe with both, its ranks share sequences (`sharing.py`), by 16 heads of queries
for two of keys and of values.

--cuda runs a stage of MoE blocks in bf16 on one GPU with a loop-back all-to-all through pinned memory (`loopback.py`);
`--cuda --device cpu` runs the same on the CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from dualpipe_engine.comm.tickets import Transfer
from dualpipe_engine.models.attention import Attention
from dualpipe_engine.models.dispatch import AllToAll
from dualpipe_engine.models.routing import Routing, count
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.phases import COMM, COMPUTE, Phase

WIDTH, EXPERTS = 256, 4
HEADS, GROUP = 16, 8
PLAIN, QWEN3_MOE, LLAMA = "plain", "qwen3-moe", "llama"
OF_EXPERTS, OF_HEADS = "experts", "heads"


class Work:
    """Computation of a given length, slept or multiplied; counts the seconds that it took."""

    def __init__(self, real: bool) -> None:
        self.seconds, self.spent, self._real = 0.0, 0.0, real
        self._matrix = torch.rand(128, 128)

    def __call__(self) -> None:
        start = time.perf_counter()
        if self._real:
            while time.perf_counter() - start < self.seconds:
                self._matrix = torch.softmax(self._matrix @ self._matrix, dim=1)
        else:
            time.sleep(self.seconds)
        self.spent += time.perf_counter() - start


class _Busy(torch.autograd.Function):
    """Identity that works, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, work: Work) -> torch.Tensor:
        ctx.work = work
        work()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.work()
        return grads[0], None


class Layer:
    """A layer whose computation is `Work`, and whose communication is that of a MoE block."""

    def __init__(self, work: Work, routing: Routing) -> None:
        self._work, self._routing = work, routing
        self._dispatcher = AllToAll(dist.group.WORLD, EXPERTS)

    def phases(self) -> list[Phase]:
        return [
            Phase("attention", COMPUTE, self._attend),
            Phase("counts", COMM, self._dispatcher.count),
            Phase("dispatch", COMM, self._dispatcher.dispatch),
            Phase("experts", COMPUTE, self._experts),
            Phase("combine", COMM, self._dispatcher.combine),
            Phase("sum", COMPUTE, self._finish),
        ]

    def _attend(self, x: torch.Tensor) -> Any:
        x = _Busy.apply(x, self._work)
        return self._dispatcher.prepare(x, self._routing) | {"residual": x}

    def _experts(self, state: Any) -> Any:
        state = dict(state)
        rows, _ = self._dispatcher.arrange(state)
        return self._dispatcher.restore(state, _Busy.apply(rows, self._work))

    def _finish(self, state: Any) -> Any:
        return state["residual"] + self._dispatcher.finish(state)


class SharedAttention(Attention):
    """An attention whose computation is `Work`, and whose ranks share sequences; takes `[tokens, WIDTH]`."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work, self.heads, self.kv_heads = work, HEADS, HEADS // GROUP
        self.share_sequences(dist.group.WORLD)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = _Busy.apply(x, self._work).view(1, len(x), HEADS, -1)
        key = query[:, :, : self.kv_heads]
        return query, key, key

    def _mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, /) -> torch.Tensor:
        return _Busy.apply(query, self._work) + (key + value).repeat_interleave(GROUP, dim=2)

    def _output(self, mixed: torch.Tensor) -> torch.Tensor:
        return mixed.reshape(-1, WIDTH)


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """On each rank: for every ratio the seconds of pairs, of halves one after the other, and of their computation."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = Work(args.compute == "real")
    log: list[Transfer] = []
    layers, like = _stage(args, work)
    chunk = PhasedChunk(torch.nn.Identity(), 0, phases_of(layers), 120.0, log, is_last=False)
    grads = [torch.ones_like(like)]

    def inputs() -> torch.Tensor:
        return like.clone().requires_grad_()

    def sequential(micro: int) -> None:
        chunk.forward(micro + 1, inputs())
        chunk.backward(micro, grads)

    def paired(micro: int) -> None:
        chunk.overlapped(micro + 1, inputs(), None, chunk, micro, grads, 1.0)

    def timed(run: Any, repeats: int) -> tuple[float, float, float]:
        """Median seconds, and of these added work, and the layers' own computation where nothing overlaps."""
        chunk.forward(0, inputs())
        found = []
        for micro in range(repeats + 1):
            dist.barrier()
            log.clear()
            work.spent, start = 0.0, time.perf_counter()
            run(micro)
            seconds = time.perf_counter() - start
            found.append((seconds, work.spent, seconds - work.spent - sum(each.waited for each in log)))
        chunk.clear()
        times, spent, own = zip(*found[1:], strict=True)  # the first warms up
        return median(times), median(spent), median(own) if args.model != PLAIN else 0.0

    transfers = 4 * len(layers) * (len(args.exchange) if args.model == QWEN3_MOE else 1)
    rows = []
    for ratio in args.ratios:
        for _ in range(3):  # a link that rested passes a burst: the exchange that counts is that between computations
            alone, busy, own = timed(sequential, args.pairs if work.seconds else 3)
            work.seconds = max(0.0, _agreed(ratio * (alone - busy - own) - own) / transfers)
        alone, busy, own = timed(sequential, args.pairs)
        pair, spent, _ = timed(paired, args.pairs)
        exchange, compute = alone - busy - own, spent + own
        rows.append({"ratio": ratio, "exchange": exchange, "compute": compute, "sequential": alone, "pair": pair})
        rows[-1]["hidden"] = 1 - (pair - compute) / exchange
    dist.barrier()
    dist.destroy_process_group()
    return rows


def _stage(args: argparse.Namespace, work: Work) -> tuple[list[Any], torch.Tensor]:
    """The layers, and what they take."""
    rows = args.kilobytes * 1024 // (4 * WIDTH) * 2  # half of them travel
    if args.model != PLAIN and OF_HEADS in args.exchange:
        from sharing import LENGTH, TOP_K, sharing_layers

        experts = EXPERTS if args.model == QWEN3_MOE else 0
        layers = sharing_layers(args.layers, WIDTH, experts, lambda x: _Busy.apply(x, work))
        return layers, torch.randn(max(1, rows // TOP_K // LENGTH), LENGTH, WIDTH)
    if args.model == QWEN3_MOE:
        from decoder import LENGTH, TOP_K, decoder_layers

        layers = decoder_layers(args.layers, WIDTH, EXPERTS, lambda x: _Busy.apply(x, work))
        return layers, torch.randn(max(1, rows // TOP_K // LENGTH), LENGTH, WIDTH)
    experts = (torch.arange(rows) % EXPERTS).view(-1, 1)
    routing = Routing(experts, torch.ones(rows, 1), None, count(experts, EXPERTS))
    kinds = {OF_EXPERTS: lambda: Layer(work, routing), OF_HEADS: lambda: SharedAttention(work)}
    return [kinds[name]() for _ in range(args.layers) for name in args.exchange], torch.ones(rows, WIDTH)


def _agreed(seconds: float) -> float:
    """The mean over the ranks."""
    mean = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def show(rows: list[dict[str, float]], out: str | None) -> None:
    print("| computation / all-to-all | computation | all-to-all | one after the other | F&B pair | hidden |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        seconds = [f"{row[name] * 1e3:.0f} ms" for name in ("compute", "exchange", "sequential", "pair")]
        print("| " + " | ".join([f"{row['ratio']:g}", *seconds, f"{row['hidden']:.1%}"]) + " |")
    if out is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for name, label, shift in (("sequential", "one after the other", -0.2), ("pair", "F&B pair", 0.2)):
        axes.bar([place + shift for place in places], [row[name] for row in rows], 0.4, label=label)
    for place, row in zip(places, rows, strict=True):
        axes.plot([place - 0.4, place + 0.4], [row["compute"]] * 2, "k--", label="computation" if place == 0 else None)
        axes.annotate(f"{row['hidden']:.0%} hidden", (place + 0.2, row["pair"]), ha="center", va="bottom")
    axes.set_xticks(list(places), [f"{row['ratio']:g}" for row in rows])
    axes.set_xlabel("computation / all-to-all")
    axes.set_ylabel("seconds")
    axes.legend()
    figure.savefig(out, dpi=150)
    print(f"\n{out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="computation / all-to-all")
    parser.add_argument("--compute", choices=["sleep", "real"], default="sleep")
    parser.add_argument("--model", choices=[PLAIN, QWEN3_MOE, LLAMA], default=PLAIN, help="whose layers")
    exchanged = "what a layer exchanges (default: rows of experts; of llama, which has none, heads)"
    parser.add_argument("--exchange", choices=[OF_EXPERTS, OF_HEADS], nargs="+", help=exchanged)
    parser.add_argument("--layers", type=int, default=4, help="of the stage")
    parser.add_argument("--pairs", type=int, default=5, help="timed for each ratio")
    parser.add_argument("--kilobytes", type=int, default=2048, help="that a rank sends in one all-to-all")
    link = "a second, of the link, each way (default: 400; of models 150, beside which their own computation is small)"
    parser.add_argument("--megabit", type=float, help=link)
    parser.add_argument("--out", help="PNG file")
    parser.add_argument("--cuda", action="store_true", help="a stage on one GPU instead")
    parser.add_argument("--device", default="cuda", help="for --cuda: where the stage is")
    args = parser.parse_args()
    args.exchange = args.exchange or ([OF_HEADS] if args.model == LLAMA else [OF_EXPERTS])
    if args.cuda and args.exchange != [OF_EXPERTS]:
        parser.error("--exchange is for layers over a link: leave out --cuda")
    known = {LLAMA: [{OF_HEADS}], QWEN3_MOE: [{OF_EXPERTS}, {OF_HEADS, OF_EXPERTS}]}
    if set(args.exchange) not in known.get(args.model, [set(args.exchange)]):
        parser.error(f"{args.model} exchanges {' or '.join(' '.join(sorted(each)) for each in known[args.model])}")
    if args.cuda:
        from loopback import main as on_one_gpu

        on_one_gpu(args.device)
    elif "RANK" in os.environ:
        print(json.dumps(measure(args)))
    else:
        from link import run_linked, usable

        if not usable():
            sys.exit("the slow link needs root, network namespaces, and the programs ip and tc (package iproute2)")
        megabit = args.megabit or (400.0 if args.model == PLAIN else 150.0)
        show(run_linked(str(Path(__file__).resolve()), sys.argv[1:], megabit), args.out)


if __name__ == "__main__":
    main()
