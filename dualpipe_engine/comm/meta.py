"""Meta: what a message between two stages looks like, so that the receiver can allocate it.

A stage may pass on a tensor, or any nest of tensors and plain values that torch knows: tuples, named tuples, lists,
dicts, and classes that are registered with it. The nest is flattened; its tensors travel with every message and
everything else travels once, in the meta.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError, OutputError
from .nest import Nest

HEADER_BYTES = 4096
_LENGTH_BYTES = 8
_ALIGNED = 256  #: bytes; a multiple of where any kernel wants a tensor to begin

MAKE_IT_KNOWN = (
    "whose tensors torch does not see: make it in the layer that uses it, or make its class known by "
    "torch.utils._pytree.register_pytree_node (a dataclass by torch.export.register_dataclass)"
)


@dataclass(frozen=True)
class TensorMeta:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def differentiable(self) -> bool:
        """Whether a gradient travels back for this tensor: floating point and complex tensors only."""
        return self.dtype.is_floating_point or self.dtype.is_complex

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def zeros(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


_FIXED = (TensorMeta, str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def _dump(leaf: object) -> bytes | None:
    try:
        return pickle.dumps(leaf)
    except Exception:  # said in `encode`
        return None


def _are_equal(first: object, second: object) -> bool:
    try:
        return first is not second and bool(first == second)
    except Exception:  # arrays and tensors compare element by element
        return False


@dataclass(frozen=True)
class MessageMeta:
    """A flattened nest: `leaves` holds a `TensorMeta` for each tensor and the value itself for anything else."""

    leaves: tuple[object, ...]
    spec: pytree.TreeSpec | None

    @cached_property
    def tensors(self) -> tuple[TensorMeta, ...]:
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorMeta))

    @cached_property
    def differentiable(self) -> tuple[TensorMeta, ...]:
        return tuple(meta for meta in self.tensors if meta.differentiable)

    @cached_property
    def looks(self) -> tuple[object, ...]:
        """The leaves as they are when this is first asked for: what may change and stay the same object as bytes."""
        return tuple(leaf if isinstance(leaf, _FIXED) and leaf == leaf else _dump(leaf) for leaf in self.leaves)

    def is_like(self, other: MessageMeta) -> bool:
        """Whether a message of the look of `other` may be built from this one."""
        return self.spec == other.spec and len(self.leaves) == len(other.leaves) and not self.changed(other)

    def changed(self, other: MessageMeta) -> list[object]:
        """The leaves of `other`, of the same nest, that look otherwise here."""
        looks = zip(self.looks, other.looks, self.leaves, other.leaves, strict=False)
        return [its for before, now, mine, its in looks if before != now and not _are_equal(mine, its)]

    def build(self, tensors: list[torch.Tensor]) -> Nest:
        """Put received tensors (one for each entry of `self.tensors`) back into the nest."""
        if self.spec is None:
            return tensors[0]
        stream = iter(tensors)
        leaves = [next(stream) if isinstance(leaf, TensorMeta) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def is_of(self, value: Nest) -> bool:
        """Whether `value` is a single tensor, and this is its description; the quick answer to the usual case."""
        if self.spec is not None or not isinstance(value, torch.Tensor):
            return False
        (meta,) = self.leaves
        return isinstance(meta, TensorMeta) and value.shape == meta.shape and value.dtype == meta.dtype

    def describe(self) -> str:
        return ", ".join(
            f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            if isinstance(leaf, TensorMeta)
            else repr(leaf)
            for leaf in self.leaves
        )


def block_of(metas: Iterable[TensorMeta], device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Memory for several tensors in one: `[bytes]` uint8, and the tensors in it.

    They are no views of each other to autograd, so that one may be written to after another was used.
    """
    metas = list(metas)
    starts = list(accumulate((-(-meta.size // _ALIGNED) * _ALIGNED for meta in metas), initial=0))
    block = torch.empty(starts.pop(), dtype=torch.uint8, device=device)
    storage = block.untyped_storage()
    tensors = [
        torch.empty(0, dtype=meta.dtype, device=device).set_(
            storage, start // meta.dtype.itemsize, meta.shape, torch.empty(meta.shape, device="meta").stride()
        )
        for meta, start in zip(metas, starts, strict=True)
    ]
    return block, tensors


def flatten(value: Nest) -> tuple[list[torch.Tensor], MessageMeta]:
    """Split a stage output into its tensors and its meta.

    Raises:
        ConfigError: tensors are in an object that is no nest, where no gradient would reach them.
    """
    if isinstance(value, torch.Tensor):
        return [value], MessageMeta((TensorMeta(tuple(value.shape), value.dtype),), None)
    leaves, spec = pytree.tree_flatten(value)
    metas: list[object] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            metas.append(TensorMeta(tuple(leaf.shape), leaf.dtype))
        elif _needs_gradient(leaf):
            raise ConfigError(
                f"a stage output holds a {type(leaf).__name__}, whose tensors no gradient would reach: pass tensors in "
                "tuples, named tuples, lists and dicts between layers, or make the class known, a dataclass by "
                "torch.export.register_dataclass"
            )
        else:
            metas.append(leaf)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], MessageMeta(tuple(metas), spec)


def _needs_gradient(leaf: object) -> bool:
    return any(tensor.requires_grad for tensor in _held_by(leaf))


def _held_by(leaf: object) -> list[torch.Tensor]:
    """The tensors that are attributes of an object."""
    parts = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()
    values = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, part.name, None) for part in parts)]
    return [value for value in values if isinstance(value, torch.Tensor)]


def unseen(leaves: Iterable[object]) -> str | None:
    """The class of the first object among `leaves` whose tensors are pickled with it; None where there is none."""
    return next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _FIXED) and _held_by(leaf)), None)


def encode(meta: MessageMeta) -> torch.Tensor:
    """Header of a meta: `[HEADER_BYTES]` uint8 on the CPU.

    Raises:
        OutputError: the nest holds values that cannot be pickled, or too many of them.
    """
    body = io.BytesIO()
    try:
        _Pickler(body).dump((meta.leaves, meta.spec))
    except Exception as error:
        raise OutputError(f"a stage output holds a value that cannot travel: {error}") from error
    size = body.tell()
    if size > HEADER_BYTES - _LENGTH_BYTES and (name := unseen(meta.leaves)):
        raise OutputError(f"a stage output holds a {name}, {MAKE_IT_KNOWN}")
    if size > HEADER_BYTES - _LENGTH_BYTES:
        raise OutputError(
            f"the description of a stage output takes {size} bytes, more than {HEADER_BYTES - _LENGTH_BYTES}: "
            "pass fewer tensors or smaller constants between stages"
        )
    raw = size.to_bytes(_LENGTH_BYTES, "little") + body.getvalue()
    return torch.frombuffer(bytearray(raw.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


class _Pickler(pickle.Pickler):
    """torch warns of a spec of a leaf that is made by its class, as pickle would."""

    def reducer_override(self, value: object) -> tuple[Callable[..., object], tuple[int]]:
        leaf = isinstance(value, pytree.TreeSpec) and value.is_leaf()
        return (pytree.tree_structure, (0,)) if leaf else NotImplemented


def decode(header: torch.Tensor) -> MessageMeta:
    """Inverse of `encode`; `header` is `[HEADER_BYTES]` uint8 on any device."""
    raw = bytes(header.cpu().numpy().tobytes())
    length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
    leaves, spec = pickle.loads(raw[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return MessageMeta(leaves, spec)
