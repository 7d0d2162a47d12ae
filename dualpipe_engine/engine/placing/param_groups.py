"""GroupMap: the user's choice of parameters, carried over to the stages that a rank holds after `place`.

A user lists parameters, groups them, or builds an optimizer over them while the PipelineModule is as it was built.
Every parameter is given its name then (`name_parameters`) and takes it along when its layer moves, so that lists and
groups can be applied by name to the parameters that train, whenever they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from ..checks.agreement import raise_everywhere
from ..checks.fingerprint import text
from ..given import Optimizer, ParamEntry, ParamGroup, Scheduler

PLACEHOLDER = "nothing_to_train"
"""Start of the names of parameters that stand where a rank trains none, always 0: DeepSpeed's optimizers need one in
each group, and take one collective for each group."""

ORIGIN = "dualpipe_group"
"""Of a group of experts apart: the number of the group that they were taken out of."""

_NAME = "dualpipe_name"


def name_parameters(module: PipelineModule) -> None:
    """Let every parameter that a user may have listed know its name.

    Args:
        module: as its constructor left it.
    """
    for name, param in module.named_parameters():
        setattr(param, _NAME, name)
    for number, spec in enumerate(module._layer_specs):
        for name, param in spec.named_parameters() if isinstance(spec, nn.Module) else ():
            if not hasattr(param, _NAME):  # of a layer that is built on all ranks and runs on another
                setattr(param, _NAME, f"{number}.{name}")


def take_name(param: nn.Parameter, other: nn.Parameter) -> None:
    """Let a parameter that takes the place of another, or a part of it, be listed and grouped as that."""
    setattr(param, _NAME, getattr(other, _NAME))


def placeholder_name(number: int) -> str:
    """The name of a rank's placeholder with that number."""
    return f"{PLACEHOLDER}_{number}" if number else PLACEHOLDER


def add_placeholder(module: PipelineModule) -> nn.Parameter:
    """Register a parameter that stands where this rank trains none."""
    number = sum(name.startswith(PLACEHOLDER) for name in module._parameters)
    param = nn.Parameter(torch.zeros(1, device=get_accelerator().device_name(module.local_rank)))
    param.ds_pipe_replicated = False  # type: ignore[attr-defined]
    setattr(param, _NAME, PLACEHOLDER)
    module.register_parameter(placeholder_name(number), param)
    return param


class _Group(NamedTuple):
    """A group on one rank.

    Args:
        key: its options as text, and how many groups of the rank with the same options come before it.
        options: all but the parameters.
        names: of its parameters.
    """

    key: tuple[str, int]
    options: ParamGroup
    names: list[str]


class GroupMap:
    """Made after `place`. The constructor is collective over all ranks.

    Groups of several ranks are one where their options are the same, in the order of the first rank that has each; so
    every rank has all groups, those that are empty on it included.

    Args:
        model: the module, placed.
        parameters: `model_parameters` of initialize: None, parameters, or dicts of groups.
        optimizer: `optimizer` of initialize: None, a callable, or an optimizer over the module's parameters.
        pipeline: process group of the ranks of this pipeline.
        scheduler: `lr_scheduler` of initialize.

    Raises:
        ConfigError: a parameter does not belong to the module, the optimizer has state already, or a scheduler knows
            other groups; the same on every rank.
    """

    def __init__(
        self,
        model: PipelineModule,
        parameters: Iterable[ParamEntry] | None,
        optimizer: Optimizer,
        pipeline: dist.ProcessGroup,
        scheduler: Scheduler = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._own = isinstance(optimizer, torch.optim.Optimizer)
        given: list[ParamEntry] | None = None if parameters is None else list(parameters)
        if self._own:
            given = optimizer.param_groups
        flat = not given or not any(isinstance(group, dict) for group in given)
        self._groups: list[ParamGroup] | None = [{"params": given}] if given and flat else given
        wrong: list[str] = []
        if self._own and optimizer.state:
            wrong.append("the optimizer has taken steps already: pass a fresh one to initialize")
        mine = None if self._groups is None else self._named(wrong)
        found: list[Any] = [None] * dist.get_world_size(pipeline)
        experts = any(is_moe_param(param) for param in model.parameters())
        dist.all_gather_object(found, (mine, flat, experts), group=pipeline)
        self._flat = all(flat for _, flat, _ in found)
        without = [rank for rank, (groups, *_) in enumerate(found) if groups is None]
        if 0 < len(without) < len(found):
            wrong.append(f"pipeline ranks {without} were given no parameters, but others were: give all ranks theirs")
        self._merged: dict[tuple[str, int], _Group] = {}
        for group in (group for groups, *_ in found for group in groups or ()):
            before = self._merged.get(group.key)
            self._merged[group.key] = group if before is None else before._replace(names=before.names + group.names)
        if mine is not None and not self._merged:
            wrong.append("no parameter was given to train: list some, or leave model_parameters out")
        known = getattr(scheduler, "base_lrs", None)
        others = mine is not None and [group.key for group in mine] != list(self._merged)
        if known is not None and (others or (self._own and any(experts for *_, experts in found))):
            why = "the ranks have different ones" if others else "experts that ranks share have groups of their own"
            wrong.append(
                f"the learning rate scheduler was made for the parameter groups of one rank, but {why}: pass "
                "initialize a function that makes it, lr_scheduler=lambda optimizer: ..."
            )
        raise_everywhere(wrong)

    def _named(self, wrong: list[str]) -> list[_Group]:
        assert self._groups is not None
        groups, seen = [], Counter[str]()
        for group in self._groups:
            params = group["params"]
            params = group["params"] = [params] if isinstance(params, torch.Tensor) else list(params)
            names = [getattr(param, _NAME, None) for param in params]
            if None in names:
                shape = list(params[names.index(None)].shape)
                wrong.append(f"a parameter of shape {shape} given to initialize does not belong to the PipelineModule")
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            said = text(dict(sorted(options.items())), 5)
            groups.append(_Group((said, seen[said]), options, [name for name in names if name and name != PLACEHOLDER]))
            seen[said] += 1
        return groups

    def _placed(self) -> list[ParamGroup]:
        """All groups, with the parameters of this rank, of which each has one that trains."""
        held: dict[str, list[tuple[str, nn.Parameter]]] = {}
        spare = []
        for name, param in self._model.named_parameters():
            if name.startswith(PLACEHOLDER):
                spare.append((name, param))
            else:
                held.setdefault(getattr(param, _NAME, name), []).append((name, param))
        order = {name: number for number, (name, _) in enumerate(self._model.named_parameters())}
        groups: list[ParamGroup] = []
        for group in self._merged.values():
            found = [pair for name in dict.fromkeys(group.names) for pair in held.get(name, ())]
            found.sort(key=lambda pair: order[pair[0]])
            if not any(param.requires_grad for _, param in found):
                found.append(spare.pop(0) if spare else (PLACEHOLDER, add_placeholder(self._model)))
            groups.append(_of(found, group.options))
        for pair in spare:  # of optimizers before this one
            groups[0]["params"].append(pair[1])
            groups[0]["param_names"].append(pair[0])
        return groups

    def _experts_of(self, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Take experts that ranks share out of groups; the groups of their own that DeepSpeed's optimizers want."""
        made: list[ParamGroup] = []
        for number, group in enumerate(groups if not any(group.get("moe") for group in groups) else ()):
            kept: list[tuple[str, nn.Parameter]] = []
            shared: dict[str, list[tuple[str, nn.Parameter]]] = {}
            for name, param in zip(group["param_names"], group["params"], strict=True):
                taken = is_moe_param(param) and param.requires_grad
                (shared.setdefault(param.group_name, []) if taken else kept).append((name, param))
            apart = {"moe": True, ORIGIN: number}
            made += [_of(pairs, group | apart | {"name": key}) for key, pairs in shared.items()]
            if shared and not any(param.requires_grad for _, param in kept):
                kept.append((PLACEHOLDER, add_placeholder(self._model)))
            group.update(_of(kept))
        return made

    def apply(self) -> tuple[Optimizer, list[ParamEntry] | None]:
        """What to give DeepSpeed: the optimizer, the user's own over the parameters of this rank; and the parameters,
        None where none were given."""
        if self._groups is None:
            return self._optimizer, None
        placed = self._placed()
        if self._own or not self._flat:
            placed += self._experts_of(placed)
        named = self._own and any("param_names" in group for group in self._groups)
        for group in placed if not named else ():
            del group["param_names"]
        if self._own:
            for index, group in enumerate(placed):  # the user's dicts where there are, which schedulers hold
                if index < len(self._groups):
                    self._groups[index].clear()
                    self._groups[index].update(group)
                else:
                    self._groups.append(group)
            return self._optimizer, None
        return self._optimizer, list(placed[0]["params"]) if self._flat else placed


def origins(groups: Sequence[ParamGroup]) -> list[int]:
    """Of each group of an optimizer the number of the user's group whose options it has."""
    plain = count()
    return [group.get(ORIGIN, 0) if group.get("moe") else next(plain) for group in groups]


def _of(pairs: list[tuple[str, nn.Parameter]], options: ParamGroup | None = None) -> ParamGroup:
    """A group of parameters with their names."""
    return (options or {}) | {"params": [param for _, param in pairs], "param_names": [name for name, _ in pairs]}


def check_dtypes(
    model: PipelineModule, optimizer: Optimizer, parameters: list[ParamEntry] | None, settings: DeepSpeedConfig
) -> None:
    """Refuse what ZeRO would turn into another dtype: it lays the parameters of a group end to end. Collective over all
    ranks.

    Args:
        model: the module, placed.
        optimizer: as `GroupMap.apply` returns it.
        parameters: likewise.
        settings: DeepSpeed's; under fp16 and bf16 it casts all parameters to one dtype before.

    Raises:
        ConfigError: a group has trained parameters of several dtypes; the same on every rank.
    """
    if not settings.zero_enabled or settings.float16_config.enabled or settings.bfloat16_config.enabled:
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        parameters = optimizer.param_groups
    given: list[ParamEntry] = list(model.parameters()) if parameters is None else parameters
    names = {param: name for name, param in model.named_parameters()}
    wrong = []
    for group in given if isinstance(given[0], dict) else [{"params": given}]:
        trained = [param for param in group["params"] if param.requires_grad]
        for param in trained:
            if param.dtype != trained[0].dtype:
                wrong.append(
                    f"{names[trained[0]]} is of {trained[0].dtype} and {names[param]} of {param.dtype}, but ZeRO would "
                    'make one flat tensor of their group: use "zero_optimization": {"stage": 0} or one dtype'
                )
                break
    raise_everywhere(wrong)
