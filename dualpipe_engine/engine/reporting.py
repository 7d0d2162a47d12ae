"""Reporting: what a training engine prints and logs after a step."""

from __future__ import annotations

from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from deepspeed.utils import logger

from ..comm.from_all import from_all
from ..profiling.expert_load import LoadReport
from ..schedule.progress import waiting
from .load_report import LoadReporter
from .placing.grid import Place
from .section import DualPipeConfig


class Reporting(PipelineEngine):
    """The part of `DualPipeEngine` that reports."""

    place: Place
    dualpipe_config: DualPipeConfig
    _load_reporter: LoadReporter
    expert_load: LoadReport | None = None  #: of the last step that was reported ("load_report_steps")

    def _load_report_steps(self) -> int | None:
        if not self.module.dualpipe_counts:
            return None
        every: int | None = self.dualpipe_config.load_report_steps or self.steps_per_print()
        return every

    def _report_split(self) -> None:
        """After the first batch, whose forwards show it: which share of the weights runs in W, and what does not; and
        which layers wait for transfers that could be hidden."""
        report = None if self._store is None else str(self.weight_split)
        reports = from_all((report, self.module.dualpipe_unphased, self.module.dualpipe_waits), self._pipeline_group)
        if self.global_rank == 0:
            for rank, (report, *_) in enumerate(reports):
                if report is not None:
                    logger.info(f"pipeline rank {rank}: {report}")
            for number, why in sorted({pair for _, unphased, _ in reports for pair in unphased.items()}):
                logger.warning(f"layer {number} runs without phases, so that its transfers are not hidden: {why}")
            waits = {number: why for *_, waits in reports for number, why in waits.items()}
            for why in sorted(set(waits.values())):
                numbers = sorted(number for number in waits if waits[number] == why)
                some = f"layer {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} layers, such as {numbers[0]},"
                logger.warning(f"the attention of {some} waits for its exchanges, which are not hidden: {why}")

    def _report_batch(self) -> None:
        every, steps = self.steps_per_print(), self.global_steps
        if every is not None and steps % every == 0:
            elapsed = self.timers(TRAIN_BATCH_TIMER).elapsed(reset=True) / 1000.0 / every
            if self.global_rank == 0:
                extra = "".join(f"{name}: {loss:0.4f} " for name, loss in (self.agg_additional_losses or {}).items())
                print(
                    f"steps: {steps} loss: {self.agg_train_loss:0.4f} {extra}iter time (s): {elapsed:0.3f} "
                    f"samples/sec: {self.train_batch_size() / elapsed:0.3f}"
                )
                if self.wall_clock_breakdown():
                    print(self._wall_clock())
        if self.global_rank == 0 and self.monitor.enabled:
            loss = self.agg_train_loss
            assert loss is not None
            self.monitor.write_events([("Train/Samples/train_loss", loss.item(), self.global_samples)])
        self._report_loads()

    def _report_loads(self) -> None:
        """Where it is due. Collective over the ranks of a pipeline."""
        if not self._load_reporter.due():
            return
        with waiting():
            self.expert_load = report = self._load_reporter.report()
        if self.global_rank == 0:
            print(f"steps: {report.step} {report}")
            if self.monitor.enabled:
                seen = self.global_samples
                self.monitor.write_events([(f"Train/Samples/{name}", x, seen) for name, x in report.values().items()])

    def _wall_clock(self) -> str:
        """The milliseconds of each kind of op on this rank in the last training batch."""
        spent: dict[str, float] = {}
        for span in self._observer.spans():
            spent[span.op.kind] = spent.get(span.op.kind, 0.0) + 1000 * (span.end - span.start)
        return "time (ms) | " + " | ".join(f"{kind}: {spent[kind]:.2f}" for kind in spent)
