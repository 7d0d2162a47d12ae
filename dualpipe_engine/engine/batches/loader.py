"""Where an engine reads its batches from; the loader of `initialize(training_data=...)` goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.dataloader import RepeatingLoader
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.utils.data import DistributedSampler, IterableDataset, Sampler

from ...comm.from_all import from_all
from ...comm.nest import Nest
from ...errors import ConfigError
from ..given import Dataset, Loader
from ..placing.grid import Place
from ..placing.sequences import Sharing
from ..placing.stages import needs_input_gradient
from .feed import BatchFeed, check_same_stream, check_shared_stream
from .shards import Shards


class ResumableSampler(DistributedSampler):
    """The samples of one replica, in the order of the data set, from a sample on.

    Attributes:
        start: samples that the next pass leaves out at its beginning; the passes after it are whole.
    """

    start = 0

    def __init__(self, dataset: Dataset, replicas: int, replica: int) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=replica, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(RepeatingLoader):
    """Repeats a loader and counts.

    Args:
        loader: yields micro-batches of `batch_size` samples.
        sampler: the sampler of `loader`.
        batch_size: samples of a micro-batch.
    """

    def __init__(self, loader: Loader, sampler: ResumableSampler, batch_size: int) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._seen = 0  # samples of this replica in this pass
        self.data_iter: Iterator[Nest]
        super().__init__(loader)

    def __next__(self) -> Nest:
        try:
            batch = next(self.data_iter)
        except StopIteration:
            self._seen = 0
            self.data_iter = iter(self.loader)
            batch = next(self.data_iter)
        self._seen += self._batch_size
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position in the data set: samples that all replicas together have read in this pass."""
        return {"samples": self._seen * self._sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a position, which another number of replicas may have reached."""
        self._seen = self._sampler.start = state["samples"] // self._sampler.num_replicas
        self.data_iter = iter(self.loader)


class Loading(PipelineEngine):
    """The part of `DualPipeEngine` that reads data, on the ranks at the ends of the pipeline."""

    data_iterator: Iterator[Nest] | None
    place: Place
    sharing: Sharing
    _shards: Shards | None

    def set_dataloader(self, loader: Loader) -> None:
        """Read batches of training from `loader`, on the ranks that read data."""
        if self.place.feeds:
            self.training_dataloader = loader
            self.data_iterator = iter(loader)

    def set_dataiterator(self, iterator: Iterator[Nest]) -> None:
        """Read batches from `iterator`, on the ranks that read data."""
        if self.place.feeds:
            self.training_dataloader = None
            self.data_iterator = iterator

    def deepspeed_io(
        self,
        dataset: Dataset,
        batch_size: int | None = None,
        route: str = ROUTE_TRAIN,
        pin_memory: bool = True,
        data_sampler: Sampler[int] | None = None,
        **options: object,
    ) -> Loader:
        """DeepSpeed's loader, of the share of a dataset that this replica has: both ends of a pipeline read the same.

        Args:
            options: `collate_fn` and `num_local_io_workers`, as DeepSpeed's.

        Raises:
            ConfigError: the dataset has no samples by number.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"each replica reads its share of a dataset by number, and {type(dataset).__name__} has no numbers: "
                "give train_batch an iterator over part engine.data_rank of engine.data_replicas",
                everywhere=True,
            )
        if data_sampler is None:
            data_sampler = DistributedSampler(dataset, self.data_replicas, self.data_rank, shuffle=route == ROUTE_TRAIN)
        return super().deepspeed_io(dataset, batch_size, route, pin_memory, data_sampler, **options)

    def _build_data_iter(self, dataset: Dataset) -> None:
        sampler = ResumableSampler(dataset, self.data_replicas, self.data_rank)
        loader = self.deepspeed_io(dataset, data_sampler=sampler)
        self.set_dataloader(ResumableLoader(loader, sampler, self.micro_batch_size))

    def _feed(self, num_micro: int, fingerprint: bool = False) -> BatchFeed:
        if self.place.feeds and self.data_iterator is None and self.batch_fn is None:
            raise ConfigError("there is no data: pass data_iter, or training_data to initialize")
        if self.place.feeds and self.data_iterator is not None and not hasattr(self.data_iterator, "__next__"):
            kind = type(self.data_iterator).__name__
            raise ConfigError(f"data_iter must be an iterator, and a {kind} is none: pass iter(...) of it, made once")
        return BatchFeed(
            self.place,
            num_micro,
            self._next_batch,
            self.device,
            side=self._inbound,
            input_gradient=needs_input_gradient(self.module),
            fingerprint=fingerprint,
            shards=self._shards,
        )

    def _no_feed(self) -> BatchFeed:
        return BatchFeed(self.place, 0, self._next_batch, self.device)

    def _check_stream(self, feed: BatchFeed) -> None:
        """After the first batch: both ends of the pipeline must have read the same data."""
        self._checked_stream = True
        if len(self.place.ends) < 2 and self.sharing.group is None:
            return
        sums = from_all(feed.checksum, self._pipeline_group)
        check_same_stream({rank: sums[rank] for rank in self.place.ends})
        if self.sharing.group is not None:
            check_shared_stream(from_all(sums[self.place.ends[0]], self.sharing.group))
