"""A checkpoint with the optimizer's state of whole parameters: DeepSpeed's Universal Checkpoint, experts included.

    files of ZeRO, one a rank         fragments of each parameter           whole parameters
    zero_pp_rank_0_mp_rank_00   ->    N.experts.up of rank 0, of rank 1  -> zero/N.experts.up/{fp32,exp_avg,...}.pt

DeepSpeed's own converter does that for parameters that all copies of a stage hold. Of experts that ranks share it knows
neither which rank has which, nor in which order to join them; here the ranks have said so in their own files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from ...errors import CheckpointError
from ..given import ParamGroup, SavedState
from ..placing.param_groups import PLACEHOLDER, placeholder_name
from .files import DESCRIPTION, PARTIAL, damages, peek, sync, write_text

SHARES = "shares"  #: in the files of the ranks: `placing.experts.expert_shares`, and where the rank stands
_OWN, _LAYERS, _CUT = "dualpipe_rank_*.pt", "layer_*-model_states.pt", "layer_*-model_[0-9]*-model_states.pt"
_ZERO_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_OF_RANKS = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")
_OF_GROUPS = ("params", "param_names", "name", "moe")  #: keys of a group that hold on its ranks alone

States: TypeAlias = dict[str, SavedState]
"""Of a parameter, or of a part of it: "fp32" and what the optimizer keeps, by name."""


class _Part(NamedTuple):
    """A fragment of a parameter.

    Args:
        position: pipe position of the rank that has it.
        share: number of the rank among those that share an expert.
        copy: number of the rank among all copies of the stage.
        states: flat.
    """

    position: int
    share: int
    copy: int
    states: States


def convert(source: Path, target: Path) -> None:
    """Write a Universal Checkpoint.

    Args:
        source: folder of one checkpoint of this engine, with ZeRO-1 or ZeRO-2.
        target: made; another folder beside the source.

    Raises:
        CheckpointError: the checkpoint cannot be read or is of another kind, or the target cannot be written.
    """
    files = _Files.of(source)
    if target.exists():
        raise CheckpointError(f"{target} is there already: give the name of a new folder, or remove it")
    aside = Path(f"{target}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_all(files, aside)
        for path in (*files.models, *files.own, *source.glob(_LAYERS), source / DESCRIPTION):
            shutil.copy2(path, aside)
        sync(aside)
        aside.rename(target)
        write_text(target.parent / "latest_universal", target.name)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error})") from error
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be converted ({type(error).__name__}: {error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Files(NamedTuple):
    """What is read of a checkpoint.

    Args:
        zero: the optimizer's state, a file for each copy of each position.
        models: what belongs to each position.
        own: what this package keeps of each rank.
    """

    zero: list[Path]
    models: list[Path]
    own: list[Path]

    @classmethod
    def of(cls, folder: Path) -> _Files:
        """The files of a folder, looked at."""
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        found = cls(
            [path for path in there if _ZERO_FILE.search(path.name)],
            [path for path in there if path.match("mp_rank_*_model_states.pt")],
            [path for path in there if path.match(_OWN)],
        )
        if not all(found):
            raise CheckpointError(
                f"{folder} is no folder of one checkpoint that dualpipe_engine saved with ZeRO-1 or ZeRO-2: give that "
                "of a tag, such as global_step100"
            )
        if cut := [path.name for path in there if path.match(_CUT)]:
            raise CheckpointError(
                f"{folder / cut[0]} holds a part of a layer: tensor-parallel weights are for DeepSpeed's own "
                "converter, python -m deepspeed.checkpoint.ds_to_universal"
            )
        if wrong := damages([*found.zero, *found.models, *found.own]):
            raise CheckpointError(f"the checkpoint is not whole: {', '.join(wrong)}")
        return found


def _write_all(files: _Files, target: Path) -> None:
    sizes, numbers = _experts(files.own)
    shapes = {n: shape for path in files.models for group in peek(path)["param_shapes"] for n, shape in group.items()}
    parts: dict[str, list[_Part]] = {}
    for path in files.zero:
        copy, position = map(int, _ZERO_FILE.search(path.name).groups())  # type: ignore[union-attr]
        for name, states in _fragments(peek(path)["optimizer_state_dict"]):
            share = numbers[position, copy].get(name, 0)
            parts.setdefault(name, []).append(_Part(position, share, copy, states))
    folder = target / "zero"
    folder.mkdir(parents=True)
    for name, found in parts.items():
        if not name.startswith(PLACEHOLDER):
            _write(folder / name, _joined(found, sizes.get(name, 1), shapes[name]), name in sizes)
    groups = _groups(files.zero)
    _write_placeholders(folder, next(iter(parts.values()))[0].states, len(groups))
    first = peek(files.zero[0])["optimizer_state_dict"]
    kept = {key: value for key, value in first.items() if key not in _OF_RANKS}
    torch.save(kept | {"param_groups": groups}, folder / "optimizer_state.pt")


def _experts(own: Iterable[Path]) -> tuple[dict[str, int], dict[tuple[int, int], dict[str, int]]]:
    """Name of a parameter of experts -> ranks that share it; (position, copy) -> name -> number among them."""
    sizes: dict[str, int] = {}
    numbers: dict[tuple[int, int], dict[str, int]] = {}
    for path in own:
        said = peek(path).get(SHARES)
        if said is None:
            raise CheckpointError(f"{path} does not say which experts its rank has: save the checkpoint anew")
        here = numbers.setdefault((said["position"], said["copy"]), {})
        for name, place in said["experts"].items():
            if place is None:
                raise CheckpointError(
                    f"{name} is of experts of DeepSpeed's own MoE layer, whose optimizer state stays with its ranks"
                )
            here[name], sizes[name] = place
    return sizes, numbers


def _fragments(optimizer: SavedState) -> Iterator[tuple[str, States]]:
    """Name and states of all that a rank has of its parameters."""
    states = optimizer["base_optimizer_state"]["state"]
    for number, mapping in enumerate(optimizer["param_slice_mappings"]):
        flat = optimizer["single_partition_of_fp32_groups"][number]
        held = {"fp32": flat} | states.get(number, {})
        for name, at in mapping.items():
            yield (
                name,
                {
                    key: value.narrow(0, at.start, at.numel)
                    if torch.is_tensor(value) and value.dim()  # what the optimizer keeps is padded, unlike the weights
                    else value
                    for key, value in held.items()
                },
            )


def _joined(parts: list[_Part], size: int, shape: torch.Size) -> States:
    """The states of a whole parameter.

    Args:
        parts: of it.
        size: ranks that share it; 1: each copy holds it whole.
        shape: of what a rank holds.
    """
    position = min(part.position for part in parts)  # a tied one is at several
    shares: list[list[States]] = [[] for _ in range(size)]
    for part in sorted(parts, key=lambda part: part.copy):
        if part.position == position:
            shares[part.share].append(part.states)
    found: States = {}
    for key, value in shares[0][0].items():
        if key == "step" or not torch.is_tensor(value) or not value.dim():
            found[key] = value
        else:
            flat = [torch.cat([states[key] for states in share]) for share in shares]
            found[key] = torch.cat([each.view(shape) for each in flat])
    return found


def _write(folder: Path, states: States, experts: bool) -> None:
    """The files of a parameter.

    Args:
        folder: of the parameter.
        states: of the whole of it.
        experts: whether it is of experts, which ranks may share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in states.items():
        content = value
        if key != "step":
            content = {"param": value.clone(), "cat_dim": 0}
            if experts:
                content |= {"is_expert_param": True, "ep_num_experts": len(value)}
        torch.save(content, folder / f"{key}.pt")


def _write_placeholders(folder: Path, like: States, groups: int) -> None:
    """States for parameters that stand where a rank trains none, which another layout may have."""
    nothing = {
        key: torch.zeros(1, dtype=value.dtype) if torch.is_tensor(value) and value.dim() else value
        for key, value in like.items()
    }
    for number in range(groups):
        _write(folder / placeholder_name(number), nothing, False)


def _groups(files: Iterable[Path]) -> list[ParamGroup]:
    """The options of all groups of parameters: the user's, then those of the experts in them, which DeepSpeed's
    optimizers keep apart. Another layout may have such where this one has none: those of an only group are known."""
    plain: list[ParamGroup] = []
    apart: list[ParamGroup] = []
    for path in files:
        groups = peek(path)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        plain = plain or [group for group in groups if not group.get("moe")]
        mine = [group for group in groups if group.get("moe")]
        apart = mine if len(mine) > len(apart) else apart
    if not apart and len(plain) == 1:
        apart = plain
    return [{key: value for key, value in group.items() if key not in _OF_GROUPS} for group in (*plain, *apart)]
