"""Parts of sequences while a model is measured, before it is placed: replicas share them then as in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.pipe import PipelineModule

from ..batches.shards import Shards, shard_batches
from ..placing.exchanges import overlap_exchanges
from ..placing.sequences import Sharing, share_sequences

_ABSENT = object()


@contextmanager
def in_parts(module: PipelineModule, sharing: Sharing, overlap: bool) -> Iterator[Shards | None]:
    """Let the layers of a module, and its loss, work on parts of sequences in the body, and on whole ones after it.

    Collective over all ranks. Ranks of `sharing.group` run the same layers of the same micro-batches in one order.

    Args:
        module: a PipelineModule as its constructor left it.
        sharing: with whom this rank shares its sequences.
        overlap: let layers offer their exchanges as phases.

    Yields:
        What cuts micro-batches; None: they stay whole.

    Raises:
        ConfigError: see `share_sequences` and `shard_batches`.
    """
    if sharing.group is None:
        yield None
        return
    loss_fn = module.loss_fn
    before = [
        _Attributes(each) for part in module.modules() for each in (part, *getattr(part, "beside_submodules", ()))
    ]
    try:
        shared = share_sequences(module, sharing)
        if overlap:
            overlap_exchanges(module, module._grid.dp_proc_group)
        yield shard_batches(module, shared)
    finally:
        module.loss_fn = loss_fn
        for each in before:
            each.restore()


class _Attributes:
    """Attributes of an object, of which lists and dicts are put back with what was in them."""

    def __init__(self, of: object) -> None:
        self._own = vars(of)
        self._before = dict(self._own)
        self._inside = {name: value.copy() for name, value in self._before.items() if isinstance(value, (list, dict))}

    def restore(self) -> None:
        for name in [name for name in self._own if name not in self._before]:
            del self._own[name]
        for name, value in self._before.items():
            if self._own.get(name, _ABSENT) is not value:
                self._own[name] = value
        for name, inside in self._inside.items():
            held = self._before[name]
            held.clear()
            held.extend(inside) if isinstance(held, list) else held.update(inside)
