"""Recomputation by name: what named modules compute is not kept for the backward, but computed again in it.

Unlike a checkpoint around such a module, which keeps its output wherever something else uses it, this drops the output
too, as DeepSeek-V3 does for norms and up-projections (arXiv 2412.19437, section 3.2.3): what would keep it as its input
keeps a handle instead. A handle is asked in the backward, and lets the module run once more on what it
was given, with the random state and the autocast that it had. Each call is repeated at most once: what the module's own
backward needs and its output come from the same run.

A handle is freed with the node of the graph that holds it, and with the last one what it stands for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import get_device_states, set_device_states

from ..comm.nest import Nest
from ..errors import ConfigError, PipelineRuntimeError
from .weight_grad import Forward

Hooks: TypeAlias = tuple[Callable[[Tensor], object], Callable[..., Tensor]]
Random: TypeAlias = tuple[Tensor, list[int], list[Tensor]]
"""The state of the CPU's generator, devices, and the states of theirs."""

_PLAIN = (Tensor, nn.Parameter)


class Recompute:
    """The modules of a rank that are computed again.

    Args:
        modules: name -> module; of two of which one contains the other, give the outer one.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._outputs: dict[int, _Output] = {}  # by storage
        self._hooks: Hooks = (self._pack, _unpack)
        self._outer: Hooks | None = None

    def install(self) -> None:
        """Let the modules be computed again; on top of what `weight_grad.install` has put there, so after it."""
        for name, module in self.modules.items():
            top = vars(module).get("forward")
            if isinstance(top, _Recomputed):
                top.remove()
            vars(module)["forward"] = _Recomputed(module, name, self)

    def within(self, run: Callable[..., Nest]) -> Callable[..., Nest]:
        """`run`, in which named modules drop what they compute; elsewhere, as within activation checkpoints, they do
        nothing special."""

        def scoped(*args: Nest) -> Nest:
            if not torch.is_grad_enabled():
                return run(*args)
            before, self._outer = self._outer, _top_hooks()
            try:
                with saved_tensors_hooks(*self._hooks):
                    return run(*args)
            finally:
                self._outer = before

        return scoped

    @property
    def active(self) -> bool:
        """Whether `within` is the innermost of all that changes what a graph keeps."""
        return _top_hooks() == self._hooks

    def keep(self, tensor: Tensor) -> _Kept | _Part:
        """What stands for a tensor until the backward: the tensor, or a handle where it is an output of a call."""
        found = self._outputs.get(tensor.untyped_storage()._cdata) if has_storage(tensor) else None
        part = None if found is None else found.part(tensor)
        return _Kept(tensor, self._outer) if part is None else part

    def add(self, call: _Call, outputs: Sequence[Nest], given: Collection[int]) -> None:
        """Remember the outputs of a call, but those that share memory with what it was given."""
        for index, tensor in enumerate(outputs):
            if not isinstance(tensor, Tensor) or not has_storage(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                ref = weakref.ref(storage, partial(self._forget, storage._cdata))
                self._outputs[storage._cdata] = _Output(ref, call, index, tensor)

    def _forget(self, storage: int, _: object) -> None:
        self._outputs.pop(storage, None)

    def _pack(self, tensor: Tensor) -> _Kept | _Part:
        return self.keep(tensor)


def _unpack(kept: _Kept | _Part | _Value) -> Tensor:
    return kept.get()


class _Kept:
    """A tensor that is kept as it is, by the hooks outside of ours if there are some."""

    __slots__ = ("_packed", "_unpack", "_version")

    def __init__(self, tensor: Tensor, outer: Hooks | None) -> None:
        self._version = tensor._version
        self._unpack = None if outer is None else outer[1]
        self._packed = tensor.detach() if outer is None else outer[0](tensor)

    def get(self) -> Tensor:
        if self._unpack is not None:
            return self._unpack(self._packed)
        tensor = self._packed
        assert isinstance(tensor, Tensor)
        if tensor._version != self._version:
            raise PipelineRuntimeError(
                f"a tensor of shape {list(tensor.shape)} was changed in place after it was saved for the backward: "
                'take the operation that makes a new tensor, or leave out "recompute"'
            )
        return tensor


class _Value:
    """What a node of the graph holds in place of a tensor of a call."""

    __slots__ = ("__weakref__", "call", "tensor")

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            self.call.run()
        assert self.tensor is not None
        return self.tensor


class _Part:
    """A view of an output of a call."""

    __slots__ = ("_offset", "_size", "_stride", "_value")

    def __init__(self, value: _Value, tensor: Tensor, offset: int) -> None:
        self._value, self._offset = value, offset
        self._size, self._stride = tensor.shape, tensor.stride()

    def get(self) -> Tensor:
        whole = self._value.get()
        return whole.as_strided(self._size, self._stride, whole.storage_offset() + self._offset)


class _Output:
    """An output of a call, as long as its memory is there."""

    def __init__(self, storage: weakref.ref[torch.UntypedStorage], call: _Call, index: int, tensor: Tensor) -> None:
        self._storage, self._call, self._index = storage, call, index
        self._version, self._offset, self._dtype = tensor._version, tensor.storage_offset(), tensor.dtype

    def part(self, tensor: Tensor) -> _Part | None:
        """A handle of a tensor that has the same memory; None if it has changed since, or is read in another way."""
        if self._storage() is None or tensor._version != self._version or tensor.dtype != self._dtype:
            return None
        return _Part(self._call.output(self._index), tensor, int(tensor.storage_offset() - self._offset))


class _Recomputed(Forward):
    """The forward of a named module."""

    def __init__(self, module: nn.Module, name: str, recompute: Recompute) -> None:
        super().__init__(module)
        self.name = name
        self._recompute = recompute
        self._looked = False
        self._repeated = False

    def run(self, args: Sequence[Nest], kwargs: dict[str, Nest]) -> list[Nest] | None:
        """The outputs of one more run; None where it was left when all that is needed was there.

        Raises:
            ConfigError: it writes a buffer, as it did before.
        """
        versions = {} if self._repeated else self._versions()
        try:
            outputs = pytree.tree_leaves(self._plain(*args, **kwargs))
        except _Enough:
            outputs = None
        now = {} if self._repeated else self._versions()
        self._repeated = True
        if written := [name for name, version in now.items() if versions.get(name) != version]:
            raise ConfigError(
                f'"recompute": {self.name} writes its buffer {written[0]}, which would be written twice as it runs '
                "again: leave it out"
            )
        return outputs

    def _versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in self._module.named_buffers()}

    def __call__(self, *args: Nest, **kwargs: Nest) -> Nest:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._recompute.active:
            return self._plain(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():  # whose tensors cannot be kept
            return self._plain(*args, **kwargs)
        given, form = pytree.tree_flatten((args, kwargs))
        tensors = [value for value in given if isinstance(value, Tensor)]
        versions = [tensor._version for tensor in tensors]
        call = _Call(self, self._recompute, given, form)
        with ExitStack() as stack:
            if not self._looked:
                stack.enter_context(_NoTransfers(self.name))
            stack.enter_context(saved_tensors_hooks(call.pack, _unpack))
            out = self._plain(*args, **kwargs)
        self._looked = True
        if [tensor._version for tensor in tensors] != versions:
            raise ConfigError(
                f'"recompute": {self.name} changes its input in place, so that it cannot run on it again: name another '
                "module, or let it make a new tensor"
            )
        call.end()
        held = {tensor.untyped_storage()._cdata for tensor in tensors if has_storage(tensor)}
        self._recompute.add(call, pytree.tree_leaves(out), held)
        return out


class _Given(NamedTuple):
    """A tensor that a call was given."""

    kept: _Kept | _Part
    needs_grad: bool

    def again(self) -> Tensor:
        return self.kept.get().detach().requires_grad_(self.needs_grad)


class _Call:
    """One call of a named module, to be repeated in the backward."""

    def __init__(self, forward: _Recomputed, recompute: Recompute, given: list[Nest], form: pytree.TreeSpec) -> None:
        self._forward, self._form = forward, form
        tensors = [value for value in given if isinstance(value, Tensor)]
        kept = {id(tensor): _Given(recompute.keep(tensor), tensor.requires_grad) for tensor in tensors}
        self._given = [kept.get(id(value), value) for value in given]
        self._devices = [tensor for tensor in tensors if tensor.device.type not in ("cpu", "meta")][:1]
        self._random: Random | None = _random_state(self._devices)
        self._autocast = autocast_now({"cpu", *(tensor.device.type for tensor in self._devices)})
        self._inner: list[weakref.ref[_Value]] = []
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._made: dict[int, weakref.ref[_Value]] = {}

    def pack(self, tensor: Tensor) -> _Value:
        """Of what the module saves nothing is kept."""
        value = _Value(self)
        self._inner.append(weakref.ref(value))
        self._saved.append((tensor.shape, tensor.dtype))
        return value

    def end(self) -> None:
        """The module has run: forget the random state where it was not used."""
        assert self._random is not None
        now = _random_state(self._devices)
        before = self._random
        if all(torch.equal(a, b) for a, b in zip((before[0], *before[2]), (now[0], *now[2]), strict=True)):
            self._random = None
        self._devices = []

    def output(self, index: int) -> _Value:
        ref = self._made.get(index)
        value = None if ref is None else ref()
        if value is None:
            value = _Value(self)
            self._made[index] = weakref.ref(value)
        return value

    def run(self) -> None:
        """Run the module once more, for everything that somebody still holds a handle of."""
        count = 0
        needs_output = any(ref() is not None for ref in self._made.values())

        def collect(tensor: Tensor) -> None:
            nonlocal count
            if count == len(self._saved) or (tensor.shape, tensor.dtype) != self._saved[count]:
                self._differs()
            value = self._inner[count]()
            if value is not None:
                value.tensor = tensor.detach()
            count += 1
            if count == len(self._saved) and not needs_output:
                raise _Enough

        # What was one tensor is one again: attention asks whether queries are keys.
        again = {id(value): value.again() for value in self._given if isinstance(value, _Given)}
        args, kwargs = pytree.tree_unflatten([again.get(id(value), value) for value in self._given], self._form)
        with torch.enable_grad(), _random_of(self._random), self._autocast(), saved_tensors_hooks(collect, _refuse):
            outputs = self._forward.run(args, kwargs)
        if outputs is None:
            return
        if count != len(self._saved):
            self._differs()
        for index, ref in self._made.items():
            value = ref()
            if value is not None:
                value.tensor = outputs[index].detach()

    def _differs(self) -> NoReturn:
        raise PipelineRuntimeError(
            f'"recompute": {self._forward.name} does not do the same when it runs again, so that its gradients cannot '
            "be computed: leave it out"
        )


class _Enough(Exception):
    """All that is needed of a call is there."""


class _NoTransfers(TorchDispatchMode):
    """Refuses modules that communicate: other ranks would not take part again."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Collection[type],
        args: tuple[Nest, ...] = (),
        kwargs: dict[str, Nest] | None = None,
    ) -> Nest:
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            raise ConfigError(
                f'"recompute": {self._name} communicates, which is not to be repeated: name modules in it that do not'
            )
        return func(*args, **(kwargs or {}))


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one, which its storage, sizes and strides describe."""
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided or is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor())


def _top_hooks() -> Hooks | None:
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


def _refuse(_: None) -> NoReturn:
    raise ConfigError('"recompute": a module that differentiates in its own forward cannot run again: leave it out')


def _random_state(tensors: Sequence[Tensor]) -> Random:
    devices, states = get_device_states(*tensors) if tensors else ([], [])
    return torch.get_rng_state(), list(devices), list(states)


@contextmanager
def _random_of(state: Random | None) -> Iterator[None]:
    """Random numbers as from that state in the body, and afterwards as if nothing had been drawn."""
    if state is None:
        yield
        return
    cpu, devices, states = state
    kind = torch.accelerator.current_accelerator().type if devices else "cuda"  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.set_rng_state(cpu)
        if devices:
            set_device_states(devices, states, device_type=kind)
        yield


def autocast_now(kinds: Iterable[str]) -> Callable[[], ExitStack]:
    """What enters the autocast that is on now, later.

    Args:
        kinds: types of devices.
    """
    cached = torch.is_autocast_cache_enabled()
    now = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]

    def enter() -> ExitStack:
        stack = ExitStack()
        for kind, enabled, dtype in now:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
        return stack

    return enter
