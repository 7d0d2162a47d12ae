"""Estimates of whole jobs: memory and speed of a model on a cluster, for each schedule, before anything is run.

The simulator gives the step from the times of stages; nothing is computed again or in host memory, which is what
`ladder` looks at.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import PlanError
from ..orders.registry import with_stages
from ..search.make_plan import make_plan
from ..timing.simulate import peak_bytes, simulate
from .checkpointed import Keeping
from .hardware import Hardware
from .job import Job
from .model_memory import TRAINING, fullest, with_bytes
from .model_shape import ModelShape
from .stage_times import in_fp8, job_bounds, reduction_seconds, stage_costs


@dataclass(frozen=True)
class Estimate:
    """What one schedule makes of a job; None for everything where it is impossible, with the reason.

    Args:
        schedule: its name.
        reason: why it is impossible, or "".
        step: seconds, reduction of gradients and optimizer included.
        bubble: part of the makespan that the idlest rank is idle.
        memory: bytes of the fullest rank.
        tokens_per_second: of one GPU.
    """

    schedule: str
    reason: str = ""
    step: float | None = None
    bubble: float | None = None
    memory: int | None = None
    tokens_per_second: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """For 10^12 tokens."""
        return None if self.tokens_per_second is None else 1e12 / self.tokens_per_second / 3600


def estimate(model: ModelShape, job: Job, hardware: Hardware, stages_per_rank: int | None = None) -> list[Estimate]:
    """Every schedule on the same job; `stages_per_rank` of those that take any number."""
    found = []
    for schedule, known in with_stages(stages_per_rank).items():
        try:
            placement, stages = known.on(job.ranks), known.stages_per_rank
            bounds = job_bounds(model, placement, job, hardware)
            seconds = stage_costs(model, bounds, job, hardware)
            fp8 = in_fp8(job, hardware)
            costs = with_bytes(seconds, model, bounds, job.tokens, Keeping(TRAINING.weights, fp8=fp8))
            plan = make_plan(schedule, job.ranks, job.micro_batches, costs, optimize=True, stages_per_rank=stages)
        except PlanError as error:
            found.append(Estimate(schedule, str(error)))
            continue
        timeline = simulate(plan, costs)
        step = timeline.makespan + reduction_seconds(model, bounds, placement, job, hardware)
        memory = fullest(model, bounds, placement, job, peak_bytes(plan, costs))
        speed = job.step_tokens / step / job.gpus
        found.append(Estimate(schedule, "", step, max(timeline.bubble()) / timeline.makespan, memory, speed))
    return found
