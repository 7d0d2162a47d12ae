"""Deferred weight gradients: the backward of a stage runs as I, what the previous stage waits for, and W, the rest.

`install` makes the modules of a stage put their weight gradients into a `DeferredWeightGrads` while that is deferring;
zero bubble schedules (arXiv 2401.10241; DeepSeek-V3 report, section 3.2.1) run them later. Biases, norms and embeddings
belong to I, as does what no split operation covers, and a parameter with hooks: autograd would run those of a deferred
one in I, too, while its `grad` is still None or old.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..comm.nest import Nest
from .weight_grad_mode import SplitMode
from .weight_grad_ops import FusedWgrad, Linear
from .weight_grad_split import Contribution, accumulate, has_hooks, split

_OWN = "weight_grad_store"
BATCH_BYTES = 1 << 20  #: weight gradients of one call of the autograd engine, whose cost shows in small layers only


class DeferredWeightGrads:
    """Collects the weight gradients that a backward leaves out. One store serves all stages of a rank.

    A parameter with a `main_grad` (fp32, the parameter's shape) gets its weight gradients there, computed in fp32, in
    W and in a full backward alike, and its `grad` stays as it is; biases, norms and embeddings keep using `grad`.

    Args:
        fused_wgrad: adds `grad.T @ x` of half-precision operands to an fp32 sum, called as `fused_wgrad(x, grad, sum)`;
            `apex_status().wgrad` on CUDA.
    """

    def __init__(self, fused_wgrad: FusedWgrad | None = None) -> None:
        self.deferring = False
        self.fused_wgrad = fused_wgrad
        self.split_params: set[nn.Parameter] = set()
        self._waiting: list[Contribution | Callable[[], None]] = []

    def defer(self) -> AbstractContextManager[None]:
        """Keep the weight gradients of the backward passes in the body for `take`."""
        return _Deferring(self)

    def put(self, deferred: Contribution | Callable[[], None]) -> None:
        """Add a closure that a backward leaves for W. CUDA's backward threads may call it."""
        self._waiting.append(deferred)

    def holds(self, param: nn.Parameter) -> bool:
        return any(isinstance(each, Contribution) and each.param is param for each in self._waiting)

    def take(self) -> list[Callable[[], None]]:
        """Hand over what was put since the last `take`, in that order; each closure has an effect once.

        Gradients of one parameter are in one closure, which adds them up before it accumulates, as autograd does.
        A closure holds as many parameters as make `BATCH_BYTES` of gradients: that much is alive at once beside what it
        is added to, and is done at a time by what fills a wait for communication.
        """
        waiting, self._waiting = self._waiting, []
        batches: dict[nn.Parameter, list[Contribution]] = {}
        closures: list[Callable[[], None]] = []
        batch: list[Contribution] = []
        left = 0
        for each in waiting:
            if not isinstance(each, Contribution):
                closures.append(functools.partial(_without_grad, each))
                continue
            if each.param not in batches:
                size = each.param.nbytes
                if size > left:
                    batch, left = [], BATCH_BYTES
                    closures.append(functools.partial(_run_once, batch, self.fused_wgrad))
                batches[each.param] = batch
                left -= size
            batches[each.param].append(each)
        return closures


class _Deferring:
    """A store defers in the body. A generator would do; there is one in every I."""

    def __init__(self, store: DeferredWeightGrads) -> None:
        self._store = store

    def __enter__(self) -> None:
        self._before, self._store.deferring = self._store.deferring, True

    def __exit__(self, *error: object) -> None:
        self._store.deferring = self._before


def _without_grad(closure: Callable[[], None]) -> None:
    """As in a backward. `torch.no_grad` takes longer than a small product."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        closure()
    finally:
        torch._C._set_grad_enabled(before)


def _run_once(contributions: list[Contribution], fused: FusedWgrad | None) -> None:
    if contributions:
        accumulate(contributions, fused)


def install(module: nn.Module, store: DeferredWeightGrads) -> DeferReport:
    """Let `module` (a stage) defer its weight gradients into `store`.

    The forward of each `nn.Linear` is replaced, and that of each other module runs in a `SplitMode`; a module that has
    no matrix of its own and splits nothing in its first forward gets its own forward back. Checkpointed modules need
    nothing more: their recompute calls the same forwards. Compiled and scripted modules are left as they are, and do
    not see the mode of a container, for which they would be compiled again. Parameters that are frozen now and trained
    later need another `install`. A copy or a pickle of an installed module is not installed.

    A module that has an attribute `weight_grad_store` (None at first) gets the store there and may defer by itself:
    while `weight_grad_store.deferring`, its backward gives `put` a closure that adds to the gradient of the weight.

    Returns:
        A report that is up to date whenever it is read; it is empty before the first forward.
    """
    uninstall(module)
    mode = SplitMode(store)
    left_alone, whole = _opaque(module), _unsplit(module)
    for part in module.modules():
        if hasattr(part, _OWN):
            setattr(part, _OWN, store)
        if part in left_alone or part in whole:
            continue
        if isinstance(part, nn.Linear) and part.forward == nn.Linear.forward.__get__(part):
            vars(part)["forward"] = _LinearForward(part, store)
        elif _has_forward(part) and _may_split(part, left_alone):
            vars(part)["forward"] = _ScopedForward(part, mode)
    return DeferReport(module, store)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    for part in module.modules():
        if hasattr(part, _OWN):
            setattr(part, _OWN, None)
        while isinstance(vars(part).get("forward"), Forward):
            vars(part)["forward"].remove()


class DeferReport:
    """Which parameters of `module` have deferred weight gradients, judged by the forwards run so far."""

    def __init__(self, module: nn.Module, store: DeferredWeightGrads) -> None:
        self._module = module
        self._store = store

    @property
    def total_numel(self) -> int:
        """Elements of all parameters that need a gradient."""
        return sum(param.numel() for _, param in self._trained())

    @property
    def deferred_numel(self) -> int:
        return sum(param.numel() for _, param in self._trained() if param in self._store.split_params)

    @property
    def share(self) -> float:
        """Deferred part of all elements, 0 to 1."""
        return self.deferred_numel / max(1, self.total_numel)

    @property
    def not_deferred(self) -> list[tuple[str, str]]:
        """(parameter name, reason) of each trained parameter whose gradient belongs to I."""
        opaque = {param for part in _opaque(self._module) for param in part.parameters(recurse=False)}
        tiled = {param for part in _unsplit(self._module) for param in part.parameters(recurse=False)}
        embeddings = [part for part in self._module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))]
        tables = {param for part in embeddings for param in part.parameters(recurse=False)}
        found = []
        for name, param in self._trained():
            if param in self._store.split_params:
                continue
            if param in opaque:
                reason = "compiled or scripted module"
            elif param in tiled:
                reason = "tiled module"
            elif has_hooks(param):
                reason = "hook on the parameter"
            elif param in tables:
                reason = "embedding"
            elif param.dim() < 2:
                reason = "bias, norm or other vector"
            else:
                reason = "no split operation used it"
            found.append((name, reason))
        return found

    def __str__(self) -> str:
        text = f"{self.share:.1%} of {self.total_numel:,} parameter elements have deferred weight gradients."
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.not_deferred:
            by_reason.setdefault(reason, []).append(name)
        if by_reason:
            parts = (f"{reason} ({len(names)}, such as {names[0]})" for reason, names in by_reason.items())
            text += f" Part of I: {'; '.join(parts)}."
        return text

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self._module.named_parameters() if param.requires_grad]


class Unsplit:
    """A replacement of a module's forward, in which nothing is split: its weight gradients belong to I."""


class Forward:
    """A replacement of a module's forward; `remove` puts the former one back, also from under another one."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = "forward" in vars(module)
        self._plain: Callable[..., Nest] = module.forward
        self.__wrapped__ = self._plain  # what inspect.signature reads

    def __reduce__(self) -> tuple[object, ...]:
        return _same, (self._plain,)

    def remove(self) -> None:
        top = vars(self._module).get("forward")
        if isinstance(top, Forward) and top._plain is self:
            top._plain, top._own = self._plain, self._own
        elif self._own:
            self._module.forward = self._plain
        else:
            vars(self._module).pop("forward", None)


class _LinearForward(Forward):
    """`nn.Linear.forward` without the mode, whose few microseconds would be paid most often here."""

    def __init__(self, module: nn.Linear, store: DeferredWeightGrads) -> None:
        super().__init__(module)
        self._linear = module
        self._store = store

    def __call__(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = self._plain(input)
            return result
        weight, bias = self._linear.weight, self._linear.bias  # once: a parametrization may change each time
        out = split(self._store, Linear(), input, weight, bias)
        return nn.functional.linear(input, weight, bias) if out is None else out


class _ScopedForward(Forward):
    """A forward under the mode."""

    def __init__(self, module: nn.Module, mode: SplitMode) -> None:
        super().__init__(module)
        self._mode = mode
        self._stays = _has_matrix(module)

    def __call__(self, *args: Nest, **kwargs: Nest) -> Nest:
        if torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        result, caught = self._mode.run(self._plain, args, kwargs)
        if caught:
            self._stays = True
        elif not self._stays and torch.is_grad_enabled():
            self.remove()
        return result


def _opaque(module: nn.Module) -> set[nn.Module]:
    """Compiled and scripted modules, with everything in them."""
    return {
        inner
        for part in module.modules()
        if part._compiled_call_impl is not None
        or hasattr(part, "_orig_mod")
        or isinstance(part, torch.jit.ScriptModule)
        for inner in part.modules()
    }


def _unsplit(module: nn.Module) -> set[nn.Module]:
    """Modules that `Unsplit` stands before, with everything in them."""
    return {
        inner for part in module.modules() if isinstance(vars(part).get("forward"), Unsplit) for inner in part.modules()
    }


def _has_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _may_split(module: nn.Module, left_alone: set[nn.Module]) -> bool:
    return _has_matrix(module) or (_has_matrix(module, recurse=True) and left_alone.isdisjoint(module.modules()))


def _has_matrix(module: nn.Module, recurse: bool = False) -> bool:
    return any(param.requires_grad and param.dim() > 1 for param in module.parameters(recurse))


def _same(forward: Callable[..., Nest]) -> Callable[..., Nest]:
    return forward
