"""Proof that the stages of a model compute what the model does, on other inputs than those that showed its chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.nest import Nest
from ..errors import ConfigError
from .messages import Inputs


def check_result(
    model: nn.Module,
    inputs: Inputs,
    probe: Mapping[str, Any],
    cut: Callable[[], Sequence[nn.Module]],
) -> None:
    """Run the stages and the model on the same inputs and compare, bit for bit.

    Args:
        model: the whole model, with weights; it keeps its mode and the random state.
        inputs: reads its output.
        probe: keyword arguments of a small forward.
        cut: makes the stages.

    Raises:
        ConfigError: the stages fail, or give something else.
    """
    name = type(model).__name__
    with _evaluated(model), torch.no_grad():
        for given in (_others(model, probe), probe):
            try:
                whole = _seeded(_whole, model, inputs, given)
                break
            except Exception:  # inputs that are not for this model
                if given is probe:
                    raise
        try:
            found = _seeded(_through, cut(), given)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"{name} cannot be cut: its stages do not run by themselves ({type(error).__name__}: {first}); "
                "something that its forward needs lies neither in its blocks nor in its inputs"
            ) from error
    for index, (ours, theirs) in enumerate(zip(_tensors(found), _tensors(whole), strict=False)):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True):
            far = "in shape" if ours.shape != theirs.shape else f"by {(ours - theirs).abs().max():.2g}"
            raise ConfigError(
                f"{name} cannot be cut: tensor {index} of the output of its stages, {list(ours.shape)}, differs from "
                f"the model's {far}; its forward passes values around the blocks, changes them in place or draws "
                "random ones"
            )


def _whole(model: nn.Module, inputs: Inputs, given: Mapping[str, Any]) -> Nest:
    return inputs.result(model(**given), {})


def _through(stages: Sequence[nn.Module], message: Nest) -> Nest:
    for stage in stages:
        message = stage.eval()(message)
    return message


def _others(model: nn.Module, probe: Mapping[str, Any]) -> dict[str, Any]:
    """Two rows of other values; of token ids other lengths, too."""
    generator = torch.Generator().manual_seed(11)
    config: Any = getattr(model, "config", None)

    def other(key: str, value: Nest) -> Nest:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            shape = value.shape if config is None else (2, *value.shape[1:])
            return torch.randn(shape, generator=generator).to(value.device, value.dtype)
        if key == "input_ids" and config is not None:
            most = min(40, config.get_text_config().vocab_size)
            return torch.randint(min(3, most - 1), most, (2, 6), generator=generator).to(value.device)
        return value

    return {key: other(key, value) for key, value in probe.items()}


def _tensors(value: Nest) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _seeded(run: Callable[..., Nest], *args: object) -> Nest:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(*args)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
