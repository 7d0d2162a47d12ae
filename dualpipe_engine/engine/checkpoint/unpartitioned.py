"""The optimizer's state without ZeRO: of whole parameters, and of the experts that a rank holds.

    mp_rank_00_model_states.pt              all that the first of the ranks that share experts keeps
    expp_rank_1_mp_rank_00_optim_states.pt  what the second keeps of its experts

DeepSpeed has the name of the second file for layers of its own, and the state of all parameters in it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import count
from math import lcm
from pathlib import Path

import torch
from torch import nn

from ..given import ParamGroup, SavedState
from .files import peek
from .ties import Layout

Shares = Mapping[str, "tuple[int, int] | None"]
"""As `placing.experts.expert_shares`."""


def file_of_experts(shares: Shares, replica: int) -> int:
    """Number of the file that has the experts of a rank: 0 for that of the whole model.

    Args:
        shares: of the rank.
        replica: of the pipeline, to which the rank belongs; it tells which experts the rank has.
    """
    return replica % lcm(*(share[1] for share in shares.values() if share is not None))


def experts_of(state: SavedState, layout: Layout, experts: Container[str]) -> SavedState:
    """The part of the state of an optimizer that belongs to experts.

    Args:
        state: `state_dict` of an optimizer of torch.
        layout: what it steps.
        experts: names of parameters.
    """
    return {**state, "state": {number: each for number, name, each in _numbered(state, layout) if name in experts}}


def with_experts(state: SavedState, experts: SavedState) -> SavedState:
    """The state of an optimizer, with what another rank keeps of its experts.

    Args:
        state: of the first rank.
        experts: as `experts_of` returns it.
    """
    return {**state, "state": state["state"] | experts["state"]}


def by_name(state: SavedState, layout: Layout) -> Iterator[tuple[str, SavedState]]:
    """Name of each parameter that has state, and the state.

    Args:
        state: as of `experts_of`.
        layout: likewise.
    """
    for _, name, states in _numbered(state, layout):
        if name is not None:
            yield name, {key: value for key, value in states.items() if value is not None}


def _numbered(state: SavedState, layout: Layout) -> Iterator[tuple[int, str | None, SavedState]]:
    for group, members in zip(state["param_groups"], layout, strict=True):
        for number, (name, _) in zip(group["params"], members, strict=True):
            if number in state["state"]:
                yield number, name, state["state"][number]


def load_universal(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    options: Sequence[ParamGroup],
    names: Mapping[nn.Parameter, str],
    shares: Shares,
) -> None:
    """Load a Universal Checkpoint into an optimizer without ZeRO, and the weights in it into its parameters.

    Args:
        folder: of the checkpoint.
        optimizer: one of torch.
        options: of its groups, in the checkpoint.
        names: of parameters, in the checkpoint.
        shares: which experts this rank has.
    """
    numbers = count()
    state: dict[int, SavedState] = {}
    groups: list[ParamGroup] = []
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        params = [next(numbers) for _ in group["params"]]
        for number, param in zip(params, group["params"], strict=True):
            found = _states(folder / "zero" / names[param], shares.get(names[param]) or (0, 1))
            weight = found.pop("fp32", None)
            if weight is not None:
                param.data.copy_(weight.view_as(param))
            if found:
                state[number] = found
        own = {key: value for key, value in group.items() if key != "params"}
        groups.append(own | saved | {"params": params})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_weights(folder: Path, names: Mapping[nn.Parameter, str], shares: Shares) -> None:
    """Load the weights of a Universal Checkpoint into the parameters that it has.

    Args:
        folder: of the checkpoint.
        names: of parameters, in the checkpoint.
        shares: which experts this rank has.
    """
    for param, name in names.items():
        weight = _states(folder / "zero" / name, shares.get(name) or (0, 1), "fp32").get("fp32")
        if weight is not None:
            param.data.copy_(weight.view_as(param))


def _states(folder: Path, share: tuple[int, int], kind: str = "*") -> SavedState:
    """What a Universal Checkpoint has of a parameter, of one kind or all; of experts those of a share (number, of how
    many)."""
    found = {}
    for path in folder.glob(f"{kind}.pt"):
        value = content = peek(path)
        if path.stem != "step":
            value = content["param"]
            if content.get("is_expert_param"):
                value = value.tensor_split(share[1])[share[0]]
        found[path.stem] = value.clone() if torch.is_tensor(value) else value
    return found
