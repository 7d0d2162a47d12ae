"""The memory ladder: peak bytes of activations and step time of one GPT under each rung.

    python examples/bench/ladder.py

Four processes, one pipeline of four ranks on the CPU. A rung is a schedule, with or without recomputation by name, with
or without activations in host memory. The bytes are those of the fullest rank: computed from what one micro-batch keeps
on each stage and the plan, beside the most that is held behind any op. The bits are compared too: losses of two steps.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dualpipe_engine.schedule.op import Op
    from dualpipe_engine.schedule.timing.costs import CostModel

HIDDEN, LENGTH, LAYERS, MICROS, RANKS = 128, 128, 16, 8, 4
TIMED = 3  #: steps, of which the fastest counts
VOCABULARY = 256
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "zbv", "interleaved")


class Block(torch.nn.Module):
    """A block of a GPT; `recomputed` is what DeepSeek-V3 computes again: norms and activation functions."""

    recomputed = ("norm", "activation")

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(HIDDEN), torch.nn.LayerNorm(HIDDEN)
        self.qkv = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, 4 * HIDDEN)
        self.activation = torch.nn.GELU()
        self.down = torch.nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norm2(x))))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rungs(
    schedules: tuple[str, ...] = SCHEDULES, offloads: tuple[bool | int, ...] = (False, 1, True)
) -> list[tuple[str, bool, bool | int]]:
    """(schedule, recompute, offload_activations)"""
    return [(name, again, away) for name in schedules for again in (False, True) for away in offloads]


def measure(rank: int, cases: list[tuple[str, bool, bool | int]]) -> list[dict[str, Any]]:
    """Of each rung the bytes computed and measured on the fullest rank, the seconds of a step, and the losses."""
    from dualpipe_engine.comm.from_all import from_all

    kept: dict[tuple[str, bool], CostModel] = {}
    rows = []
    for name, again, away in cases:
        row = _measure(name, again, away, kept)
        found = from_all((row["computed"], row["measured"]))
        row["computed"], row["measured"] = max(found, key=lambda each: each[1])
        rows.append(row)
    return rows


def _measure(name: str, again: bool, away: bool | int, kept: dict[tuple[str, bool], CostModel]) -> dict[str, Any]:
    from deepspeed.pipe import LayerSpec, PipelineModule

    import dualpipe_engine
    from dualpipe_engine.comm.from_all import from_all
    from dualpipe_engine.schedule.timing.simulate import peak_bytes
    from dualpipe_engine.testing.held_activations import activation_watch

    torch.manual_seed(1)
    specs = [LayerSpec(torch.nn.Embedding, VOCABULARY, HIDDEN), *[LayerSpec(Block) for _ in range(LAYERS)]]
    module = PipelineModule(
        [*specs, LayerSpec(torch.nn.Linear, HIDDEN, VOCABULARY)],
        num_stages=RANKS,
        loss_fn=cross_entropy,
        partition_method="type:Block",
    )
    section = {"schedule": name, "recompute": again, "offload_activations": away, "overlap": False}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "steps_per_print": None,
        "pipeline": section,
    }
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    generator = torch.Generator().manual_seed(2)
    data = [torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator) for _ in range(MICROS)]
    batch = [(tokens, tokens) for tokens in data]
    losses = [float(engine.train_batch(iter(batch)))]
    with activation_watch(engine) as held:
        losses.append(float(engine.train_batch(iter(batch))))
    seconds = []
    for _ in range(TIMED):
        start = time.monotonic()
        engine.train_batch(iter(batch))
        seconds.append(time.monotonic() - start)
    if (name, again) not in kept:  # the first rung of the two has nothing in host memory
        kept[name, again] = _costs(from_all(_added(held)), engine.plan.placement.num_stages)
    computed = peak_bytes(engine.plan, kept[name, again])
    rank = engine.place.rank
    engine.destroy()
    return {
        "computed": computed[rank],
        "measured": max(size for _, size in held),
        "seconds": min(seconds, default=0.0),
        "losses": losses,
    }


def _added(held: list[tuple[Op, int]]) -> dict[tuple[str, int], int]:
    """("F" or "I", stage) -> bytes that the first of these ops in the batch adds."""
    found: dict[tuple[str, int], int] = {}
    before = 0
    for op, size in held:
        if op.kind in ("F", "I"):
            found.setdefault((op.kind, op.stage), size - before)
        before = size
    return found


def _costs(of_ranks: list[dict[tuple[str, int], int]], stages: int) -> CostModel:
    """What one micro-batch keeps on each stage, from F to I and from I to W."""
    from dualpipe_engine.schedule.timing.costs import CostModel

    added = {key: size for found in of_ranks for key, size in found.items()}
    kept = [added["F", stage] for stage in range(stages)]
    pending = [size + added.get(("I", stage), 0) for stage, size in enumerate(kept)]
    return CostModel(activation_bytes=tuple(kept), pending_bytes=tuple(pending))


def main() -> None:
    from ranks import run_ranks

    cases = rungs()
    rows = run_ranks(measure, RANKS, cases)
    print("| schedule | recompute | offload | computed | measured | step, s |")
    print("|---|---|---|---|---|---|")
    for (name, again, away), row in zip(cases, rows, strict=True):
        assert row["losses"] == rows[cases.index((name, False, False))]["losses"]
        said = "all" if away is True else away or "-"
        sizes = " | ".join(f"{row[key] / 2**20:.2f} MiB" for key in ("computed", "measured"))
        print(f"| {name} | {'true' if again else '-'} | {said} | {sizes} | {row['seconds']:.2f} |")


if __name__ == "__main__":
    main()
