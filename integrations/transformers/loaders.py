"""The data of a Trainer: which batches each process of a pipeline reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import seed_worker

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


class PipelineLoaders(Trainer):
    """The part of `DualPipeTrainer` that reads. All ranks of a pipeline, and of those that share it, read one batch."""

    _readers: int  #: groups of pipelines with batches of their own

    def _make_engine(self) -> DualPipeEngine:
        raise NotImplementedError

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self._train_batch_size * self._readers

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As the Trainer's, sharded over replicas with data of their own only; evaluation is not sharded."""
        shards = (self._readers, self._reader()) if kwargs.get("is_training", False) else (1, 0)
        prepare = self.accelerator.prepare
        self.accelerator.prepare = partial(self._prepare_loader, *shards)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator.prepare = prepare

    def _reader(self) -> int:
        return int(self._make_engine().data_rank) if self._readers > 1 else 0

    def _prepare_loader(self, shards: int, shard: int, loader: DataLoader) -> DataLoader:
        settings = self.accelerator.dataloader_config
        if loader.worker_init_fn is not None:  # the Trainer's, in training: workers of one reader draw the same
            loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=shard)
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=shards,
            process_index=shard,
            put_on_device=False,
            rng_types=self.accelerator.rng_types,
            dispatch_batches=False,
            even_batches=settings.even_batches,
            use_seedable_sampler=settings.use_seedable_sampler,
            data_seed=settings.data_seed,
        )
