"""Profiler: keeps the last steps of this rank, and brings those of all ranks together when asked."""

from __future__ import annotations

import os
import resource
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PipelineRuntimeError, ProfileError
from ..runtime.observer import Batch
from ..schedule.plan import Plan
from ..schedule.records import RankRecord
from .build import build_profile, write_profile
from .clocks import clock_offset
from .profile import Profile
from .report import print_summary

_ENVIRONMENT = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class ProfiledJob:
    """Who runs the steps.

    Args:
        plan: what the pipeline runs.
        rank: position in the pipeline.
        replica: which pipeline.
        device: where the stages run.
        facts: see `Profile`.
    """

    plan: Plan
    rank: int
    replica: int
    device: torch.device
    facts: Callable[[], Mapping[str, object]]


class Profiler:
    """What `enable_profiling` returns. `collect`, `print_summary` and `save_to_file` are collective: every rank calls
    them.

    Args:
        log_dir: folder of relative file names; None: the working directory.
        steps: number of steps that are kept.
        timeout_s: seconds to wait for the other ranks.
    """

    def __init__(self, log_dir: str | Path | None, steps: int, timeout_s: float) -> None:
        self._log_dir = Path(log_dir) if log_dir else Path()
        self._batches: deque[Batch] = deque(maxlen=steps)
        self._timeout = timedelta(seconds=timeout_s)
        self._job: ProfiledJob | None = None
        self._group: dist.ProcessGroup | None = None

    def add(self, batch: Batch, job: ProfiledJob) -> None:
        """Keep a step; those of another job or plan are dropped."""
        before = self._job
        if before is None or before.plan is not job.plan or before.facts != job.facts:
            self._batches.clear()
        self._job = job
        self._batches.append(batch)

    def collect(self) -> Profile | None:
        """The profile of all ranks; None on all but the first.

        Raises:
            ProfileError: no step has been recorded.
            PipelineRuntimeError: not every rank called it.
        """
        records = self._gather()
        return None if records is None else build_profile(records, self._known_job().plan)

    def print_summary(self) -> None:
        """Print on the first rank where the time went; raises what `collect` does."""
        profile = self.collect()
        if profile is not None:
            print_summary(profile)

    def save_to_file(self, path: str | Path) -> Path:
        """Write the profile on the first rank, with the trace of a typical step; `dualpipe doctor`, `dualpipe draw` and
        ui.perfetto.dev read the file. Returns its path; raises what `collect` does.

        Args:
            path: relative to `log_dir`.
        """
        target = self._log_dir / path
        records = self._gather()
        if records is not None:
            write_profile(target, build_profile(records, self._known_job().plan), records)
        return target

    def _known_job(self) -> ProfiledJob:
        if self._job is None:
            raise ProfileError(
                "no step has been recorded: call enable_profiling() before the steps to look at, and train with an "
                "engine of dualpipe_engine"
            )
        return self._job

    def _gather(self) -> list[RankRecord] | None:
        job = self._known_job()
        group = self._ready_group()
        clock, error = clock_offset(group)
        record = RankRecord(
            job.rank,
            job.replica,
            socket.gethostname(),
            [batch.resolve() for batch in self._batches],
            _peak_bytes(job.device),
            clock,
            error,
            {**job.facts(), "environment": {name: os.environ.get(name) for name in _ENVIRONMENT}},
        )
        first = dist.get_rank(group) == 0
        found: list[Any] | None = [None] * dist.get_world_size(group) if first else None
        dist.gather_object(record, found, dst=dist.get_global_rank(group, 0), group=group)
        return found

    def _ready_group(self) -> dist.ProcessGroup:
        """A gloo group of all ranks, all of which are here; the job's own group may be busy or know no CPU tensors."""
        try:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise PipelineRuntimeError(
                f"the profile needs every rank, but not all came within {self._timeout.total_seconds():.0f} s: call "
                f"print_summary(), save_to_file() and collect() on all ranks ({error})"
            ) from error
        return self._group


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Switch:
    """The one profiler of the process."""

    profiler: Profiler | None = None


_switch = _Switch()


def enable_profiling(log_dir: str | Path | None = None, steps: int = 10, timeout_s: float = 60.0) -> Profiler:
    """Keep the last steps of whatever engine trains in this process; call it on every rank, before or after
    `initialize`. The steps kept so far are dropped.

    Args:
        log_dir: folder of relative file names of `save_to_file`; None: the working directory.
        steps: number of steps that are kept.
        timeout_s: seconds that `print_summary` and `save_to_file` wait for the other ranks.

    Raises:
        ProfileError: `steps` is below 1.
    """
    if steps < 1:
        raise ProfileError(f"enable_profiling(steps={steps}): at least one step must be kept")
    _switch.profiler = Profiler(log_dir, steps, timeout_s)
    return _switch.profiler


def disable_profiling() -> None:
    """Keep nothing any more."""
    _switch.profiler = None


def current_profiler() -> Profiler | None:
    """The profiler, or None while profiling is off."""
    return _switch.profiler


def get_profiler() -> Profiler:
    """The profiler that `enable_profiling` made.

    Raises:
        ProfileError: profiling is off.
    """
    if _switch.profiler is None:
        raise ProfileError("profiling is off: call dualpipe_engine.utils.enable_profiling() first")
    return _switch.profiler
