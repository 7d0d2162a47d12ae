"""Building a large plan allocates hundreds of thousands of tuples, none of them garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the cyclic garbage collector from scanning all of them again and again (it takes half of the time).

    What was made meanwhile counts as old afterwards, or the next object made anywhere would have all of it scanned.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # else unfreezing would take from the user what is frozen
                gc.freeze()
                gc.unfreeze()
            gc.enable()
