"""Measuring: what the last training batch took, on all ranks of the pipeline."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ..comm.from_all import from_all
from ..comm.stream import transfer_of
from ..profiling.expert_load import LoadReport
from ..profiling.profile import EXPERT_LOAD
from ..profiling.profiler import ProfiledJob, current_profiler
from ..schedule.op import COMPUTE
from ..schedule.timeline import Hop, Span, Timeline
from ..schedule.timing.from_timelines import measured_costs
from ..schedule.timing.simulate import simulate

Measured = TypeVar("Measured", Span, Hop)


class Measuring(PipelineEngine):
    """The part of `DualPipeEngine` that measures."""

    expert_load: LoadReport | None

    def timeline(self) -> Timeline:
        """When each op of the last training batch ran on each rank of this pipeline.

        Collective over the ranks of the pipeline. Ranks on one machine share a clock; across machines clocks are
        aligned at a barrier, to about a tenth of a millisecond.
        """
        spans = [
            Span(s.rank, s.op, s.start - shift, s.end - shift)
            for shift, theirs in self._of_all_ranks(self._observer.spans())
            for s in theirs
        ]
        return Timeline(self.plan.placement.num_ranks, spans)

    def transfers(self) -> list[Hop]:
        """The transfers of the last training batch on all ranks of this pipeline: within phases under the names of
        those, between stages as "send" and "recv". Clocks and collectivity as for `timeline`."""
        rank = self.place.rank
        finished = [*self._transfers, *(t for t in map(transfer_of, self._transported) if t.finished)]
        on_clock = self._observer.on_clock(finished)
        hops = [Hop(rank, t.name, t.posted, t.finished, t.waited, t.size) for t in on_clock]
        return [
            hop._replace(start=hop.start - shift, end=hop.end - shift)
            for shift, theirs in self._of_all_ranks(hops)
            for hop in theirs
        ]

    def _of_all_ranks(self, measured: Sequence[Measured]) -> list[tuple[float, Sequence[Measured]]]:
        """What each rank of the pipeline has measured, with the seconds by which its clock is ahead of the first's."""
        dist.barrier(group=self._pipeline_group)
        of_ranks = from_all((socket.gethostname(), time.monotonic(), measured), self._pipeline_group)
        host, zero, _ = of_ranks[0]
        return [(0.0 if other == host else now - zero, theirs) for other, now, theirs in of_ranks]

    def simulated(self, measured: Timeline) -> Timeline:
        """The plan simulated with the costs that `measured` shows: what is left between the two is communication and
        overhead."""
        compute = Timeline(measured.num_ranks, [span for span in measured.spans if span.op.kind in COMPUTE])
        return simulate(self.plan.compute_only(), measured_costs([compute], self.plan.placement.num_stages))

    def _keep_record(self) -> None:
        """The step ends: the profiler keeps it while profiling is on."""
        batch = self._observer.end_batch(self._transfers)
        profiler = current_profiler()
        self._observer.nvtx = profiler is not None and self.device.type == "cuda"
        if profiler is not None:
            profiler.add(
                batch, ProfiledJob(self.plan, self.place.rank, self.place.replica, self.device, self._profile_facts)
            )

    def _profile_facts(self) -> dict[str, object]:
        """What `Profile.facts` names."""
        config, load = self.dualpipe_config, self.expert_load
        return {
            "schedule": config.schedule,
            "optimize": config.optimize,
            "partition_method": config.partition_method,
            "overlap": any(chunk.brings_overlap for chunk in self._chunks.values()),
            "micro_batch_size": self.train_micro_batch_size_per_gpu(),
            "replicas": self.place.replicas,
            "zero_stage": self.zero_optimization_stage(),
            "weight_split": None if self._store is None else self.weight_split.share,
            "device": self.device.type,
            EXPERT_LOAD: None if load is None else load.to_json(),
        }
