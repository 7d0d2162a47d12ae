"""The position in the training data, of whatever iterator or loader knows its own (`state_dict`)."""

from __future__ import annotations

from collections.abc import Iterator

from deepspeed.utils import logger

from ...comm.nest import Nest
from ..batches.loader import Loading
from ..given import Loader
from ..placing.partition import same_random_state


class DataPosition(Loading):
    """The part of `DualPipeEngine` that goes on in the data where a checkpoint was saved."""

    _data_state: dict[str, object] | None = None  # of a checkpoint, until there is data to go on with

    def set_dataiterator(self, iterator: Iterator[Nest]) -> None:
        super().set_dataiterator(iterator)
        self._resume_data()

    def set_dataloader(self, loader: Loader) -> None:
        super().set_dataloader(loader)
        self._resume_data()

    def _data_position(self) -> dict[str, object] | None:
        """What a checkpoint is to keep; None where nothing is read, or nothing knows its position."""
        source = self._data_source("state_dict")
        if self._data_state is not None or source is None:
            return self._data_state
        position: dict[str, object] = source.state_dict()
        return position

    def _data_source(self, method: str) -> Loader | None:
        """The iterator of the training data, or the loader behind it, whichever has the method."""
        return next((each for each in (self.data_iterator, self.training_dataloader) if hasattr(each, method)), None)

    def _resume_data(self) -> None:
        if self._data_state is None or self.data_iterator is None:
            return
        source = self._data_source("load_state_dict")
        if source is None:
            logger.warning("the data iterator has no load_state_dict: its position is not resumed")
        else:
            with same_random_state():  # loaders draw a seed for their workers
                source.load_state_dict(self._data_state)
                if source is not self.data_iterator:
                    self.data_iterator = iter(source)
        self._data_state = None
