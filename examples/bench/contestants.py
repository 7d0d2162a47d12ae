"""The pipelines that the benchmarks compare, all on the same stages: each builder returns a step to be timed.

A builder is called on every rank. `stages` is the model cut into one stage a rank; vee placements run halves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from bare import Bare
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule
from sleeping import WIDTH, OverlappingStage, SleepingStage, Times, mean, stage_class
from torch.distributed import pipelining

import dualpipe_engine
from dualpipe_engine.schedule.orders.registry import placement_of
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.progress import Position
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

ROWS = 2  #: of a micro-batch
TORCH = {
    "1f1b": pipelining.Schedule1F1B,
    "interleaved 1f1b": pipelining.ScheduleInterleaved1F1B,
    "zbv": pipelining.ScheduleZBVZeroBubble,
    "dualpipev": pipelining.ScheduleDualPipeV,
}
HAS_DEEPSEEK = importlib.util.find_spec("dualpipe") is not None  #: https://github.com/deepseek-ai/DualPipe


@dataclass
class Job:
    """What is run: `micros` micro-batches through `ranks` stages that take `times` each."""

    ranks: int
    micros: int
    times: Times

    @property
    def costs(self) -> CostModel:
        return CostModel(self.times.f, self.times.i, self.times.w, self.times.fb)


def micro_batches() -> Iterator[Any]:
    while True:
        yield torch.ones(ROWS, WIDTH, requires_grad=True), torch.zeros(ROWS, WIDTH)


def deepspeed_engine(
    job: Job, initialize: Callable[..., Any], layers: int, kind: type[PipelineModule] = PipelineModule, **pipeline: Any
) -> Any:
    """An engine on `layers` sleeping layers in a module of `kind`, made by `initialize`."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": job.micros,
        "steps_per_print": None,
        "pipeline": pipeline,
    }
    part = job.times.part(job.ranks / layers)
    with contextlib.redirect_stdout(io.StringIO()):
        module = kind(
            [LayerSpec(stage_class(part), part) for _ in range(layers)],
            num_stages=job.ranks,
            loss_fn=mean,
            partition_method="uniform",
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        data = _Samples() if pipeline.get("schedule") == "auto" else None
        engine, *_ = initialize(model=module, optimizer=optimizer, config=config, training_data=data)
    engine.training_dataloader = None
    return engine


class _Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> Any:
        return torch.ones(WIDTH), torch.zeros(WIDTH)


def stock(job: Job, schedule: str) -> Callable[[], Any]:
    """DeepSpeed's own "1f1b" or "dualpipev"."""
    if schedule == "1f1b":
        engine = deepspeed_engine(job, deepspeed.initialize, job.ranks)
    else:
        engine = deepspeed_engine(job, deepspeed.initialize, 2 * job.ranks, DualPipeVModule)
    data = micro_batches()
    return lambda: engine.train_batch(data)


def best_plan(job: Job, schedule: str) -> tuple[Plan, float]:
    """The best candidate of a schedule under the job's costs, and its simulated makespan."""
    costs = job.costs.for_placement(placement_of(schedule, job.ranks))
    plan = make_plan(schedule, job.ranks, job.micros, costs, optimize=True)
    return plan, simulate(plan, costs).makespan


class Started(NamedTuple):
    """A pipeline that is ready.

    Args:
        step: runs a batch.
        runs: the schedule.
        simulated: makespan in seconds; None: it has no plan.
        position: in its program; None: it has none.
    """

    step: Callable[[], Any]
    runs: str
    simulated: float | None = None
    position: Position | None = None


def started(name: str, job: Job) -> Started:
    """A contestant by its name."""
    who, _, schedule = name.partition(" ")
    if who == "ours":
        return ours(job, schedule)
    if who == "bare":
        plan, makespan = best_plan(job, schedule)
        times = job.times.part(1 / plan.placement.parts)
        return Started(Bare(plan, times, (ROWS, WIDTH)).step, schedule, makespan)
    kinds = {"stock": stock, "torch": torch_pipelining, "DeepSeek": deepseek}
    return Started(kinds[who](job, schedule), schedule)


def ours(job: Job, schedule: str) -> Started:
    """This engine with a named schedule or "auto"."""
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box, src=0)  # one folder for all ranks
        folder = Path(box[0])
        if schedule == "auto":
            layers = job.ranks if job.times.fb is not None else 2 * job.ranks
            keys = {"schedule": "auto", "costs": str(folder / "costs.json")}
        else:
            plan, _ = best_plan(job, schedule)
            path = folder / "plan.json"
            if dist.get_rank() == 0:
                path.write_text(plan.to_json())
            dist.barrier()
            layers, keys = plan.placement.num_stages, {"schedule": str(path)}
        engine = deepspeed_engine(job, dualpipe_engine.initialize, layers, **keys)
        dist.barrier()
    costs = job.costs.for_placement(engine.plan.placement)
    makespan = simulate(engine.plan.compute_only(), costs).makespan
    data = micro_batches()
    return Started(lambda: engine.train_batch(data), engine.plan.schedule, makespan, engine.watch.position)


def torch_pipelining(job: Job, name: str) -> Callable[[], Any]:
    """A schedule of torch.distributed.pipelining; those with two stages a rank run halves."""
    rank, ranks = dist.get_rank(), job.ranks
    count = ranks if name == "1f1b" else 2 * ranks
    held = {"1f1b": [rank], "interleaved 1f1b": [rank, rank + ranks]}.get(name, [rank, 2 * ranks - 1 - rank])
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    part = job.times.part(ranks / count)
    stages = [
        pipelining.PipelineStage(
            stage_class(part)(part), index, count, torch.device("cpu"), input_args=x, output_args=x
        )
        for index in held
    ]
    kind: Any = TORCH[name]
    schedule = kind(stages[0] if name == "1f1b" else stages, n_microbatches=job.micros, loss_fn=mean)
    batch, target = x.detach().repeat(job.micros, 1), torch.zeros(ROWS * job.micros, WIDTH)

    def step() -> None:
        for stage in stages:
            for param in stage.submod.parameters():
                param.grad = None
        inputs = (batch,) if 0 in held else ()
        schedule.step(*inputs, **({"target": target} if count - 1 in held else {}))

    return step


class _DeepSeekStore:
    """DeepSeek's store of weight gradients, as `SleepingStage` uses ours."""

    def __init__(self) -> None:
        from dualpipe.utils import WeightGradStore

        self._store = WeightGradStore

    @property
    def deferring(self) -> bool:
        return bool(self._store.enabled)

    def put(self, weight_gradient: Callable[[], None]) -> None:
        self._store.put(weight_gradient)


class _Listing(OverlappingStage):
    """A pair of DeepSeek's pipeline returns a list of outputs."""

    @classmethod
    def overlapped_forward_backward(cls, *args: Any) -> tuple[Any, torch.Tensor | None]:
        output, loss = super().overlapped_forward_backward(*args)
        return [output], loss


def deepseek(job: Job, schedule: str) -> Callable[[], Any]:
    """DeepSeek's own DualPipe, its only `schedule`. It is written for CUDA; on CPU it is told where to allocate."""
    import dualpipe
    import dualpipe.comm

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    dualpipe.comm.build_from_tensor_shapes = lambda: [torch.empty(ROWS, WIDTH, requires_grad=True)]
    dualpipe.set_p2p_tensor_shapes([(ROWS, WIDTH)])
    dualpipe.set_p2p_tensor_dtype(torch.float32)
    stages = [(SleepingStage if job.times.fb is None else _Listing)(job.times) for _ in range(2)]
    for stage in stages:
        stage.weight_grad_store = _DeepSeekStore()
    pipeline = dualpipe.DualPipe(tuple(stages))
    rows = ROWS * job.micros // 2
    ends = dist.get_rank() in (0, job.ranks - 1)
    given = (torch.ones(rows, WIDTH),) if ends else ()
    labels = [torch.zeros(rows, WIDTH)] if ends else []

    def step() -> None:
        for stage in stages:
            stage.weight.grad = None
        pipeline.step(*given, num_chunks=job.micros, criterion=mean if ends else None, labels=labels)

    return step
