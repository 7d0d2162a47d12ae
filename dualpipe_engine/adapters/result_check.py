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
from ..models.trial import having
from .messages import Inputs
from .sketch import Forwards, in_place
from .stage import Stage


def check_result(
    model: nn.Module,
    inputs: Inputs,
    probe: Mapping[str, Any],
    cut: Callable[[], Sequence[Stage]],
    forwards: Forwards,
) -> None:
    """Run the stages and the model on the same inputs and compare, bit for bit.

    Args:
        model: the whole model; it keeps its mode and the random state.
        inputs: reads its output.
        probe: keyword arguments of a small forward.
        cut: makes the stages.
        forwards: of a model on the meta device what runs in place of its modules; else none.

    Raises:
        ConfigError: the stages fail, or give something else.
    """
    name = type(model).__name__
    with _evaluated(model), torch.no_grad():
        for given in (_others(model, inputs, probe), probe):
            try:
                with in_place(model, forwards):
                    whole = _seeded(_whole, model, inputs, given)
                break
            except Exception as error:  # inputs that are not for this model
                if given is probe:
                    raise _failed(name, "the model does not run", error) from error
        try:
            found = _seeded(_through, cut(), given, forwards)
        except Exception as error:
            raise _failed(name, "its stages do not run by themselves", error) from error
    for index, (ours, theirs) in enumerate(zip(_tensors(found), _tensors(whole), strict=False)):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True):
            far = "in shape" if ours.shape != theirs.shape else f"by {(ours - theirs).abs().max():.2g}"
            raise ConfigError(
                f"{name} cannot be cut: tensor {index} of the output of its stages, {list(ours.shape)}, differs from "
                f"the model's {far}; its forward passes values around the blocks, changes them in place or draws "
                "random ones"
            )


def has_loss(
    model: nn.Module, inputs: Inputs, probe: Mapping[str, Any], forwards: Forwards, loss: Callable[..., torch.Tensor]
) -> bool:
    """Whether a model's forward makes of its logits the loss that is expected of its class; of one that makes none from
    one label for each row of its logits it is not known, and taken to be so.

    Args:
        model: the whole model; it keeps its mode and the random state.
        inputs: reads its output.
        probe: keyword arguments of a small forward.
        forwards: of a model on the meta device what runs in place of its modules; else none.
        loss: of logits and labels.
    """
    config: Any = model.config
    kept = having(config, "problem_type", config.problem_type)  # a forward notes there what its first labels are of
    with _evaluated(model), torch.no_grad(), in_place(model, forwards), kept:
        for given in (_others(model, inputs, probe), probe):
            try:
                logits = _seeded(_whole, model, inputs, given)
                labels = torch.arange(logits.shape[:-1].numel(), device=logits.device) % logits.shape[-1]
                labels = labels.view(logits.shape[:-1])
                theirs = _seeded(model, **given, labels=labels).loss
                ours = loss(logits, labels)
            except Exception:  # inputs or labels that are not for this model
                continue
            return theirs is None or torch.allclose(ours.float(), theirs.float(), rtol=1e-5, atol=0.0, equal_nan=True)
    return True


def _failed(name: str, what: str, error: Exception) -> ConfigError:
    first = (str(error).splitlines() or [""])[0]
    return ConfigError(
        f"{name} cannot be cut: {what} ({type(error).__name__}: {first}); something that its forward needs lies "
        "neither in its blocks nor in its inputs"
    )


def _whole(model: nn.Module, inputs: Inputs, given: Mapping[str, Any]) -> Nest:
    return inputs.result(model(**given), {})


def _through(stages: Sequence[Stage], message: Nest, forwards: Forwards) -> Nest:
    for stage in stages:
        with in_place(stage, forwards):
            message = stage.eval().trial(message)
    return message


def _others(model: nn.Module, inputs: Inputs, probe: Mapping[str, Any]) -> dict[str, Any]:
    """Two rows of other values; of token ids other lengths, too, and with a mask where the model takes one."""
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

    changed = {key: other(key, value) for key, value in probe.items()}
    if "input_ids" in changed and "attention_mask" in inputs.names:
        changed["attention_mask"] = torch.ones_like(changed["input_ids"])
        changed["attention_mask"][0, -2:] = 0
    return changed


def _tensors(value: Nest) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _seeded(run: Callable[..., Any], *args: object, **kwargs: object) -> Any:  # noqa: ANN401
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(*args, **kwargs)


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
