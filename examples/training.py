"""What the training examples share: arguments, data, progress bar, the table at the end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.utils import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from text import Windows, read_folder
from torch.utils.data import DataLoader

import dualpipe_engine
from dualpipe_engine.page.html import save_page
from dualpipe_engine.page.run import PROFILE, read_run
from dualpipe_engine.schedule.op import COMPUTE
from dualpipe_engine.schedule.plain_json import read_settings
from dualpipe_engine.schedule.timeline import Timeline
from dualpipe_engine.schedule.timing.costs import UNIT
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.utils import enable_profiling, get_profiler
from dualpipe_engine.viz.chrome import write_chrome
from dualpipe_engine.viz.figure import save_figure
from dualpipe_engine.viz.overlap import hidden, notes

LENGTH = 128
Rows = Callable[[Any], list[tuple[str, str]]]


def parse_arguments(description: str | None, blocks: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of text files (default: Python's standard library)")
    parser.add_argument(
        "--schedule",
        help="overrides the configuration; auto measures and chooses, 1f1b-deepspeed is DeepSpeed's engine",
    )
    parser.add_argument("--steps", type=int, default=120, help="training steps")
    parser.add_argument("--stages", type=int, help="pipeline ranks of a replica (default: all, or half with experts)")
    parser.add_argument("--blocks", type=int, default=blocks, help="transformer blocks")
    parser.add_argument("--name", help="results go to runs/NAME (default: the schedule)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of runs/NAME")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON")
    return parser.parse_args()


def batches(data: Any, micro_batch: int, replica: int, seed: int) -> Any:
    """Endless micro-batches; every rank of a pipeline must read the same ones."""
    windows = Windows(data, LENGTH, 100_000, seed * 1000 + replica)
    return iter(RepeatingLoader(DataLoader(windows, batch_size=micro_batch)))


def resume(engine: Any, data: Any, folder: Path) -> None:
    """Load the last checkpoint, and leave out the data that was read before it."""
    if engine.load_checkpoint(str(folder))[0] is None:
        raise SystemExit(f"--resume: there is no checkpoint in {folder}; start without it")
    for _ in range(engine.global_steps * engine.gradient_accumulation_steps()):
        next(data)


def train(engine: Any, data: Any, folder: Path, steps: int, console: Console | None) -> list[float]:
    """Train with a progress bar on rank 0; returns the losses and writes metrics.jsonl."""
    tokens = engine.train_batch_size() * LENGTH
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s · {task.fields[step]:.2f} s/step"
        ),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console, disable=console is None) as progress,
        open(folder / "metrics.jsonl", "a") as log,
    ):
        task = progress.add_task("training", total=steps, loss=float("nan"), speed=0.0, step=0.0)
        for step in range(engine.global_steps, engine.global_steps + steps):
            start = time.perf_counter()
            losses.append(float(engine.train_batch(data)))
            seconds = time.perf_counter() - start
            progress.update(task, advance=1, loss=losses[-1], speed=tokens / seconds, step=seconds)
            if console is not None:
                row = {"step": step, "loss": losses[-1], "lr": engine.get_lr()[0], "seconds": seconds}
                row["tokens_per_second"] = tokens / seconds
                load = getattr(engine, "expert_load", None)
                if load is not None and load.step == step + 1:
                    row |= load.values()
                log.write(json.dumps(row) + "\n")
    return losses


def expert_loads(engine: Any) -> list[tuple[str, str]]:
    """How evenly the experts of each layer were used, for the table at the end."""
    load = engine.expert_load
    if load is None:
        return []
    text = ", ".join(f"{each.uneven:.2f}" for each in load.layers)
    return [(f"busiest expert over the mean, each layer, step {load.step}", text)]


def report(
    engine: Any, folder: Path, losses: list[float], evaluated: float, console: Console | None, name: str, rows: Rows
) -> None:
    """The table at the end, the trace, the picture of the schedule and the page of the run."""
    table = Table(title=f"{name}: results in {folder}", show_header=False)
    table.add_row("schedule", engine.plan.schedule if hasattr(engine, "plan") else name)
    table.add_row("micro-batches a step", str(engine.gradient_accumulation_steps()))
    table.add_row("loss at start", f"{losses[0]:.3f} nats/byte")
    table.add_row("loss at end (mean of 5 steps)", f"{sum(losses[-5:]) / len(losses[-5:]):.3f} nats/byte")
    table.add_row("loss on held-out text", f"{evaluated:.3f} nats/byte")
    extra = rows(engine)
    if hasattr(engine, "timeline"):
        measured, transfers = engine.timeline(), engine.transfers()
        get_profiler().save_to_file(PROFILE)
        simulated = engine.simulated(measured)
        if console is None:
            return
        compute = Timeline(measured.num_ranks, [span for span in measured.spans if span.op.kind in COMPUTE])
        for what, timeline in (("measured", compute), ("simulated from measured op times", simulated)):
            bubble = max(timeline.bubble())
            table.add_row(f"bubble, {what}", f"{bubble * 1e3:.0f} ms of {timeline.makespan * 1e3:.0f} ms")
        for each in hidden(transfers):
            table.add_row(f"communication, {each.name}", str(each))
        if hasattr(engine, "weight_split"):
            table.add_row("weights with deferred gradients", f"{engine.weight_split.share:.0%}")
        write_chrome(folder / "trace.json", measured, title=name, notes=notes(transfers))
        save_figure(folder / "schedule.svg", simulate(engine.plan.compute_only(), UNIT), title=name)
        save_page(folder / "report.html", read_run(folder))
        table.add_row("a page to look at", str(folder / "report.html"))
    if console is not None:
        for row in extra:
            table.add_row(*row)
        console.print(table)


def run(
    args: argparse.Namespace,
    make_layers: Callable[[int], list[Any]],
    loss: Callable[..., torch.Tensor],
    replicas: int = 1,
    prefix: str = "",
    rows: Rows = lambda engine: [],
) -> None:
    """Train, evaluate, report and save.

    Args:
        args: of `parse_arguments`.
        make_layers: gives the layers for a replica of the pipeline.
        loss: of the last layer's output and the labels.
        replicas: of the pipeline, unless `--stages` says otherwise.
        prefix: of the name of the results.
        rows: more rows for the table; called on every rank.
    """
    logger.setLevel("ERROR")
    settings = read_settings(args.deepspeed_config)
    if args.schedule:
        settings.setdefault("pipeline", {})["schedule"] = args.schedule
        if args.schedule == "1f1b-deepspeed":
            settings["pipeline"].pop("load_report_steps", None)  # DeepSpeed's engine has no such report
    settings["steps_per_print"] = None
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(1)
    stages = args.stages or torch.distributed.get_world_size() // replicas
    replica = torch.distributed.get_rank() % (torch.distributed.get_world_size() // stages)
    module = PipelineModule(make_layers(replica), num_stages=stages, loss_fn=loss)
    text = read_folder(args.data)
    cut = len(text) * 9 // 10
    name = prefix + settings.get("pipeline", {}).get("schedule", "1f1b-deepspeed")
    sample = Windows(text[:cut], LENGTH, 1000, 0) if name.endswith("auto") else None  # what "auto" measures on
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings, training_data=sample)
    folder = Path("runs") / (args.name or name)
    folder.mkdir(parents=True, exist_ok=True)
    enable_profiling(log_dir=folder)
    console = Console() if torch.distributed.get_rank() == 0 else None
    if console is not None:
        (folder / "ds_config.json").write_text(json.dumps(settings, indent=2))
    data = batches(text[:cut], engine.train_micro_batch_size_per_gpu(), replica, seed=1)
    if args.resume:
        resume(engine, data, folder / "checkpoint")
    losses = train(engine, data, folder, args.steps, console)
    held_out = batches(text[cut:], engine.train_micro_batch_size_per_gpu(), replica, seed=2)
    evaluated = float(engine.eval_batch(held_out))
    report(engine, folder, losses, evaluated, console, name, rows)
    engine.save_checkpoint(str(folder / "checkpoint"))
