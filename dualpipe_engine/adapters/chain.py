"""Chain: which modules of a model run before, in and after its row of blocks, found by one probe forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.nest import Nest
from ..errors import ConfigError
from .sketch import Forwards, in_place, sketches


@dataclass(frozen=True)
class Chain:
    """The parts of a model, as module names. No name lies within another.

    Args:
        prologue: run before the first block, such as an embedding.
        blocks: run one after the other; each takes the hidden state that the one before it returns.
        epilogue: run after the last block, such as a norm and a head.
        outputs: for each block the length of the tuple or list that it returns, the hidden state first; 0 for a tensor.
    """

    prologue: tuple[str, ...]
    blocks: tuple[str, ...]
    epilogue: tuple[str, ...]
    outputs: tuple[int, ...]


@dataclass
class _Call:
    """One call of a module within the probe."""

    name: str
    inputs: list[torch.Tensor]
    began: int
    ended: int = -1
    output: Nest = None
    calls: list[_Call] = field(default_factory=list)

    @property
    def result(self) -> torch.Tensor | None:
        """The first tensor of the output."""
        return next(iter(_tensors(self.output)), None)


def find_chain(model: nn.Module, inputs: Mapping[str, Nest] | tuple[Nest, ...]) -> Chain:
    """Run one forward without side effects on the model's mode, gradients or random state, and find its chain.

    Args:
        model: the whole model. On the meta device sketches of its blocks run.
        inputs: keyword or positional arguments of its forward, small ones.

    Raises:
        ConfigError: the model is no single chain; the message says what stands against it.
    """
    meta = any(param.is_meta for param in model.parameters())
    try:
        root = _trace(model, inputs, sketches(model, _row_of_blocks(model)) if meta else {})
    except ConfigError:
        raise
    except Exception as error:
        what = f"the chain of {type(model).__name__} cannot be found"
        if meta:
            raise ConfigError(f"{what} without weights ({error}): pass the model itself") from error
        raise ConfigError(
            f"{what}: its forward fails on the inputs of the probe ({type(error).__name__}: {error}); pass "
            "example_inputs= (the arguments of its forward) to get_model_adapter"
        ) from error
    blocks = _longest_run(root, model)
    if len(blocks) < 2:
        raise ConfigError(
            f"{type(model).__name__} is no single chain: in its forward no two neighbours of a ModuleList or "
            "Sequential hand one tensor on to the next"
        )
    _check_blocks(model, blocks)
    names = tuple(call.name for call in blocks)
    prologue, epilogue = _ends(model, root, names, blocks[0].began, blocks[-1].ended)
    outputs = tuple(len(call.output) if isinstance(call.output, (tuple, list)) else 0 for call in blocks)
    return Chain(prologue, names, epilogue, outputs)


def refuse_shared_weights(model: nn.Module, chain: Chain) -> None:
    """Refuse a weight of two pieces that could be on two stages: each would train a copy of its own.

    Raises:
        ConfigError: there is one that trains. Prologue and epilogue may share, as they are tied.
    """
    found: dict[int, tuple[int, str]] = {}
    for piece, names in enumerate(((*chain.prologue, *chain.epilogue), *((block,) for block in chain.blocks))):
        for name in names:
            for key, param in model.get_submodule(name).named_parameters():
                first, other = found.setdefault(id(param), (piece, f"{name}.{key}"))
                if param.requires_grad and first != piece:
                    raise ConfigError(
                        f"{type(model).__name__} is no single chain: {other} and {name}.{key} are one weight, of which "
                        "stages would train copies apart: freeze it, or give each block its own (of PEFT use LoRA)"
                    )


def ancestors(names: tuple[str, ...]) -> set[str]:
    """Every module name that lies above one of `names`; the model itself is ''."""
    above = {""}
    for name in names:
        parts = name.split(".")
        above.update(".".join(parts[:count]) for count in range(1, len(parts)))
    return above


def _tensors(value: Nest) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _trace(model: nn.Module, inputs: Mapping[str, Nest] | tuple[Nest, ...], replaced: Forwards) -> _Call:
    """The tree of module calls; `replaced` are forwards that run in place of those of the modules named."""
    root = _Call("", [], 0)
    stack, clock, hooks = [root], [0], []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Nest, ...], kwargs: dict[str, Nest]) -> None:
            clock[0] += 1
            call = _Call(name, list(_tensors((args, kwargs))), clock[0])
            stack[-1].calls.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, args: Nest, output: Nest) -> None:
        clock[0] += 1
        call = stack.pop()
        call.ended, call.output = clock[0], output

    training = {module: module.training for module in model.modules()}
    try:
        for name, module in model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
                hooks.append(module.register_forward_hook(leave))
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), in_place(model, replaced):
            model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return root


def _row_of_blocks(model: nn.Module) -> tuple[str, ...]:
    """The entries of the ModuleList with the most parameters."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(param.numel() for param in module.parameters())
            if size > best[0]:
                best = size, tuple(f"{name}.{entry}" for entry in module._modules)
    return best[1]


def _longest_run(call: _Call, model: nn.Module) -> list[_Call]:
    """Of this call and all within it the run of blocks with the most parameters, runs within blocks opened up."""
    runs: list[list[_Call]] = []
    for inner in call.calls:
        joins = runs and _in_container(inner.name, model) and _hands_on(runs[-1][-1], inner)
        if joins:
            runs[-1].append(inner)
        elif _in_container(inner.name, model):
            runs.append([inner])
    candidates = [run for run in runs if len(run) > 1] + [_longest_run(inner, model) for inner in call.calls]
    best = max(candidates, key=lambda run: _size(run, model), default=[])
    if best and best in runs:
        return [block for entry in best for block in _opened(entry, model)]
    return best


def _opened(call: _Call, model: nn.Module) -> list[_Call]:
    """The run that makes up a whole block, or the block."""
    inner = call.calls
    whole = (
        bool(inner)
        and all(_in_container(part.name, model) for part in inner)
        and bool(call.inputs)
        and bool(inner[0].inputs)
        and inner[0].inputs[0] is call.inputs[0]
        and all(_hands_on(before, after) for before, after in pairwise(inner))
        and inner[-1].result is call.result
    )
    if not whole or len({part.name for part in inner}) < len(inner):
        return [call]
    return [block for part in inner for block in _opened(part, model)]


def _hands_on(before: _Call, after: _Call) -> bool:
    return bool(after.inputs) and before.result is after.inputs[0]


def _in_container(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.ModuleList, nn.Sequential))


def _size(run: list[_Call], model: nn.Module) -> int:
    return sum(param.numel() for call in run for param in model.get_submodule(call.name).parameters())


def _check_blocks(model: nn.Module, blocks: list[_Call]) -> None:
    """Refuse blocks that share something besides the hidden state.

    Raises:
        ConfigError: they do.
    """
    kind = type(model).__name__
    names = [call.name for call in blocks]
    if len(set(names)) < len(names):
        raise ConfigError(f"{kind} is no single chain: it runs {names[0]} more than once")
    for call in blocks:
        if any(tensor.requires_grad for tensor in call.inputs[1:]):
            raise ConfigError(
                f"{kind} is no single chain: {call.name} takes a second tensor that depends on parameters, so a "
                "gradient would have to flow past the hidden state"
            )


def _ends(
    model: nn.Module, root: _Call, blocks: tuple[str, ...], first: int, last: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of prologue and epilogue modules."""
    above = ancestors(blocks)
    prologue: dict[str, None] = {}
    epilogue: dict[str, None] = {}
    kind = type(model).__name__

    def visit(call: _Call) -> None:
        for inner in call.calls:
            if inner.name in above:
                visit(inner)
            elif inner.ended < first:
                prologue[inner.name] = None
            elif inner.began > last:
                epilogue[inner.name] = None
            elif inner.name not in blocks and next(model.get_submodule(inner.name).parameters(), None) is not None:
                raise ConfigError(f"{kind} is no single chain: {inner.name} runs between its blocks and has parameters")

    visit(root)
    for name in above:
        own = [param for param, _ in model.get_submodule(name).named_parameters(recurse=False)]
        if own:
            raise ConfigError(f"{kind}: {name or 'the model'} uses its parameter {own[0]} outside of any module")
    return tuple(prologue), tuple(epilogue)
