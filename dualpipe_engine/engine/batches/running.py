"""What the stages of an engine run, and run anew when the user changes it between batches."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine

from ...comm.tickets import Transfer
from ...errors import ConfigError
from ...runtime.chunk import StageChunk
from ...runtime.executor import Executor
from ...runtime.offload import Offload
from ...runtime.recompute import Recompute
from ...runtime.weight_grad import DeferredWeightGrads, install
from ..checks.written_buffers import kept_statistics
from ..placing.module import PlacedModule
from ..placing.sequences import Sharing
from ..placing.stages import has_phases, make_chunk, params_of, reads_micro_offset
from ..placing.views import refuse_own_forward, renew_views
from ..section import DualPipeConfig
from .additional_losses import AdditionalLosses


class RunningStages(PipelineEngine):
    """The part of `DualPipeEngine` that makes the chunks of its stages."""

    module: PlacedModule
    dualpipe_config: DualPipeConfig
    sharing: Sharing
    _store: DeferredWeightGrads | None
    _offload: Offload | None
    _recompute: Recompute | None
    _additional: AdditionalLosses
    _transfers: list[Transfer]
    _executor: Executor
    _eval_executor: Executor

    def _make_chunks(self) -> None:
        self._runs = self._what_runs()
        self._chunks = {stage: self._make_chunk(stage, view) for stage, view in self._context.views.items()}

    def _what_runs(self) -> Sequence[object]:
        """What chunks are made of; all else that the user may change is read when it is needed."""
        module = self.module
        own = (module.loss_fn, module.seed_layers, module.activation_checkpoint_interval)
        return *own, module.activation_checkpoint_func, module.checkpointable_layers, *module.forward_funcs

    def _follow_module(self) -> None:
        """Before a batch: run what the user has put into the module since the last one.

        Raises:
            ConfigError: it cannot run.
        """
        refuse_own_forward(self.module)
        now, before = self._what_runs(), self._runs
        if len(now) == len(before) and all(map(_is, now, before)):
            return
        module, interval = self.module, self.module.activation_checkpoint_interval
        if len(now) != len(before):
            raise ConfigError(
                "engine.module.forward_funcs has another number of layers than at initialize, and which stage they "
                "belong to is not known: replace layers one by one, or give the PipelineModule all of them"
            )
        if now[0] is not before[0] and (self.sharing.group is not None or self.dualpipe_config.tiled_loss is not None):
            raise ConfigError(
                'engine.module.loss_fn was replaced, but "sequence_parallel_size" and "tiled_loss" have changed it at '
                "initialize: give the PipelineModule the loss with which it shall train"
            )
        kept = kept_statistics(module, self._context.place.placement, module.dualpipe_recomputed)
        if interval > 0 and kept:
            raise ConfigError(kept[0])
        renew_views(module, self._context.views)
        self._install()
        self._make_chunks()
        self._set_chunks()

    def _set_chunks(self) -> None:
        on_micro = self._before_forward if reads_micro_offset(self.module) else None
        for executor in (self._executor, self._eval_executor):
            executor.chunks, executor.on_micro = self._chunks, on_micro

    def _install(self) -> None:
        """Let modules defer their weight gradients, and those that "recompute" names compute again."""
        if self._store is not None:
            self.weight_split = install(self.module, self._store)
        if self._recompute is not None:
            self._recompute.install()

    def _make_chunk(self, stage: int, view: PipelineModule) -> StageChunk:
        is_last = stage == self._context.plan.placement.num_stages - 1
        overlap = self.dualpipe_config.overlap is not False
        return make_chunk(
            view,
            stage,
            by_phases=overlap and has_phases(self.module),
            timeout_s=self.dualpipe_config.p2p_timeout_s,
            log=self._transfers,
            recompute=self._recompute,
            overlap=overlap,
            is_last=is_last,
            loss_fn=self._additional.watch(self.module.loss_fn) if is_last else None,
            store=self._store,
            params=params_of(view.forward_funcs),
            offload=self._offload,
        )

    def _before_forward(self, stage: int, micro: int) -> None:
        """Seeds of `seed_layers` count micro-batches as a pipeline of one direction would."""
        # Around nn.Module.__setattr__, which takes microseconds of every forward.
        vars(self._context.views[stage])["micro_offset"] = self.module.micro_offset + micro


def _is(one: object, other: object) -> bool:
    return one is other
