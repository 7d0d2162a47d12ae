"""What whole jobs are estimated to need: a table of schedules, and the assumptions behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..schedule.jobs.estimate import Estimate
from ..schedule.jobs.hardware import Hardware
from ..schedule.jobs.job import Job, published_hours
from ..schedule.jobs.model_shape import ModelShape
from ..schedule.jobs.stage_times import in_fp8

if TYPE_CHECKING:
    from rich.table import Table


def _fastest(rows: Sequence[Estimate], hardware: Hardware) -> Estimate | None:
    fitting = [row for row in rows if row.memory is not None and row.memory <= hardware.memory]
    return min(fitting, key=lambda row: row.step or 0.0, default=None)


def estimate_table(rows: Sequence[Estimate], model: ModelShape, job: Job, hardware: Hardware) -> Table:
    """Schedules side by side; `>` marks the fastest of those that fit into memory."""
    from rich.table import Table

    best = _fastest(rows, hardware)
    title = (
        f"{model.name}: {model.parameters / 1e9:.4g} billion parameters, {model.active / 1e9:.4g} active, "
        f"on {job.gpus} {hardware.name}"
    )
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("schedule", no_wrap=True)
    for name in ("step (s)", "bubble", "memory (GB)", "tokens/s", "tokens/s a GPU", "GPU-hours for 10^12 tokens"):
        table.add_column(name, justify="right")
    notes = [
        f"bubble: of the idlest rank; memory: of the fullest, {hardware.memory / 1e9:g} GB there are; "
        f"what makes a schedule fit: --memory {hardware.memory / 1e9:g}e9"
    ]
    for row in rows:
        if row.step is None or row.memory is None or row.tokens_per_second is None:
            table.add_row(f"  {row.schedule}", *["-"] * 6, style="dim")
            notes.append(row.reason)
            continue
        fits = row.memory <= hardware.memory
        table.add_row(
            f"{'>' if row is best else ' '} {row.schedule}",
            f"{row.step:.2f}",
            f"{row.bubble:.1%}",
            f"{row.memory / 1e9:.1f}" + ("" if fits else " (too much)"),
            f"{row.tokens_per_second * job.gpus:,.0f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.gpu_hours:,.0f}",
            style="bold green" if row is best else "" if fits else "dim",
        )
    if (hours := published_hours(model, job, hardware.name)) is not None:
        found = next((row.gpu_hours for row in rows if row.schedule == "dualpipe"), None)
        if found is not None:
            notes.append(f"published, with DualPipe: {hours:,.0f} GPU-hours; estimate {found / hours - 1:+.1%}")
    table.caption = "\n".join(notes)
    return table


def assumption_table(job: Job, hardware: Hardware, own: bool) -> Table:
    """Everything that figures of a job stand on; a .json file for --hardware changes any of the hardware's lines.

    Args:
        job: ranks and batch.
        hardware: of the cluster.
        own: the layers are those of `dualpipe_engine.models`, not those of transformers.
    """
    from rich.table import Table

    table = Table(title="assumptions", title_justify="left", show_header=False)
    for what in (job, hardware):
        for name, value in asdict(what).items():
            table.add_row(name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
    fp8 = ", inputs of matrix products in FP8" if in_fp8(job, hardware) else ""
    layers = f"those of the layers of {'dualpipe_engine.models' if own else 'transformers'}{fp8}"
    table.add_row("all-to-all", "dispatch and bf16 combine; hidden in F&B pairs, paid in full elsewhere")
    if job.sequence_parallel > 1:
        where = "elsewhere" if own else "elsewhere and where whole layers are computed again"
        heads = f"heads are exchanged in bf16, hidden in F&B pairs, paid in full {where}"
        table.add_row("attention", f"{heads}; no layers of multi-token prediction")
    table.add_row("activations", f"{layers}; loads of experts are even")
    table.add_row("optimizer", "ZeRO-1: bf16 weights, fp32 gradients, Adam with fp32 weights and moments")
    table.add_row("not counted", "buffers of transfers, what lives for one op, what the allocator wastes")
    return table


def estimate_data(rows: Sequence[Estimate], model: ModelShape, job: Job, hardware: Hardware) -> dict[str, Any]:
    """The same as JSON."""
    best = _fastest(rows, hardware)
    return {
        "model": {"name": model.name, "parameters": model.parameters, "active": model.active},
        "job": asdict(job),
        "hardware": asdict(hardware),
        "published_gpu_hours": published_hours(model, job, hardware.name),
        "schedules": [
            asdict(row)
            | {"gpu_hours": row.gpu_hours, "fits": (row.memory or 0) <= hardware.memory, "best": row is best}
            for row in rows
        ],
    }
