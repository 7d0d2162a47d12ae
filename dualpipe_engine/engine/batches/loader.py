"""The loader of `initialize(training_data=...)`: endless, and able to go on where a checkpoint left off."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from deepspeed.runtime.dataloader import RepeatingLoader
from torch.utils.data.distributed import DistributedSampler


class ResumableSampler(DistributedSampler):
    """The samples of one replica, in the order of the data set, from a sample on.

    Attributes:
        start: samples that the next pass leaves out at its beginning; the passes after it are whole.
    """

    start = 0

    def __init__(self, dataset: Any, replicas: int, replica: int) -> None:
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

    def __init__(self, loader: Any, sampler: ResumableSampler, batch_size: int) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._seen = 0  # samples of this replica in this pass
        self.data_iter: Iterator[Any]
        super().__init__(loader)

    def __next__(self) -> Any:
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
