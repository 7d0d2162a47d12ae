"""A checkpoint with the optimizer's state of whole parameters: DeepSpeed's Universal Checkpoint, experts included.

    files of ZeRO, one a rank         fragments of each parameter           whole parameters
    zero_pp_rank_0_mp_rank_00   ->    N.experts.up of rank 0, of rank 1  -> zero/N.experts.up/{fp32,exp_avg,...}.pt

DeepSpeed's own converter does that for parameters that all copies of a stage hold. Of experts that ranks share it knows
neither which rank has which, nor in which order to join them; here the ranks have said so in their own files. Nor does
it convert what was saved without ZeRO (`unpartitioned.py`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import CheckpointError
from ..given import ParamGroup, SavedState
from ..placing.own_files import PATTERNS
from ..placing.param_groups import ORIGIN, PLACEHOLDER, placeholder_name
from .checks import LAYOUT
from .description import read_description
from .files import DESCRIPTION, PARTIAL, check_free, damages, peek, sync, write_text
from .partitioned import FILE, NameOf, States, of_all_ranks, partitioned_states
from .saved_weights import SavedWeights
from .sums import SummedFile
from .ties import Layout
from .universal import PLAIN
from .unpartitioned import by_name

SHARES = "shares"  #: in the files of the ranks: `placing.experts.expert_shares`, and where the rank stands
_OWN, _LAYERS, _CUT = "dualpipe_rank_*.pt", "layer_*-model_states.pt", "layer_*-model_[0-9]*-model_states.pt"
_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
_OF_GROUPS = ("params", "param_names", "name", "moe", ORIGIN)  #: keys of a group that hold on its ranks alone


def convert(source: Path, target: Path) -> None:
    """Write a Universal Checkpoint.

    Args:
        source: folder of one checkpoint of this engine.
        target: made; another folder beside the source.

    Raises:
        CheckpointError: the checkpoint cannot be read or is of another kind, or the target cannot be written.
    """
    files = _Files.of(source)
    check_free(target)
    if target.exists():
        raise CheckpointError(f"{target} is there already: give the name of a new folder, or remove it")
    aside = Path(f"{target}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_all(files, source, aside)
        further = [path for pattern in (_LAYERS, *PATTERNS) for path in source.glob(pattern)]
        for path in (*files.own, *further, source / DESCRIPTION):
            shutil.copy2(path, aside)
        for path in files.models:
            _save(peek(path) | {"optimizer": None}, aside / path.name)
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
        zero: the optimizer's state under ZeRO, a file for each copy of each position.
        models: what belongs to each position; without ZeRO the optimizer's state too, but of experts of other ranks
            than the first.
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
            [path for path in there if FILE.search(path.name)],
            [path for path in there if _MODEL.search(path.name)],
            [path for path in there if path.match(_OWN)],
        )
        if found.models and not found.own:
            raise CheckpointError(
                f"{folder} was saved by stock DeepSpeed, whose own converter takes it: "
                "python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state"
            )
        if not found.models:
            raise CheckpointError(
                f"{folder} is no folder of one checkpoint that dualpipe_engine saved: give that of a tag, such as "
                "global_step100"
            )
        if cut := [path.name for path in there if path.match(_CUT)]:
            raise CheckpointError(
                f"{folder / cut[0]} holds a part of a layer: tensor-parallel weights are for DeepSpeed's own "
                "converter, python -m deepspeed.checkpoint.ds_to_universal"
            )
        if wrong := damages(path for paths in found for path in paths):
            raise CheckpointError(f"the checkpoint is not whole: {', '.join(wrong)}")
        for path in found.models if not found.zero else ():
            optimizer = peek(path).get("optimizer")
            if optimizer is None:
                raise CheckpointError(f"{folder} has no optimizer's state: load its weights as they are")
            if "param_groups" not in optimizer:
                raise CheckpointError(
                    f"{folder} was saved in fp16 without ZeRO, whose optimizer state does not move: save it with "
                    '"zero_optimization": {"stage": 1}, or load its weights alone'
                )
        return found


def _write_all(files: _Files, source: Path, target: Path) -> None:
    sizes, numbers = _experts(files.own)
    names: dict[int, dict[str, str]] = {}
    losses = set[int]()
    for said in map(_shares, files.own):
        names.setdefault(said["position"], said.get("names", {}))
        losses |= {said["position"]} if said.get("loss", True) else set()

    def name_of(name: str, position: int) -> str | None:
        """In the whole model; None where it is not trained, as the loss that each rank has and few run."""
        return names[position].get(name, name) if position in losses or not name.startswith("loss_fn.") else None

    shapes = {name_of(name, _position(path)) or name: shape for path in files.models for name, shape in _members(path)}
    if files.zero:
        states = partitioned_states(files.zero, shapes, sizes, numbers, name_of)
        groups, kept = of_all_ranks(files.zero[0])
    else:
        states = _unpartitioned_states(files, source, sizes, name_of)
        first = peek(files.models[0])
        groups, kept = first["optimizer"]["param_groups"], {"ds_version": first["ds_version"]}
    plain = [group for group in groups if not group.get("moe")]
    groups = _groups(plain, sizes, shapes)
    folder = target / "zero"
    folder.mkdir(parents=True)
    most: States = {}
    for name, found in states:
        most = max(most, found, key=len)
        _write(folder / name, found, name in sizes)
    _write_placeholders(folder, most, len(groups))
    _save(kept | {"param_groups": groups, PLAIN: len(plain)}, folder / "optimizer_state.pt")


def _position(path: Path) -> int:
    """The pipe position of a file of `_Files.models`."""
    return int(_MODEL.search(path.name)[1])  # type: ignore[index]


def _layout(path: Path) -> Layout:
    """Which parameters the optimizer of a pipe position steps."""
    saved = peek(path)
    found: Layout = saved.get(LAYOUT) or [list(group.items()) for group in saved["param_shapes"]]
    return found


def _members(path: Path) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of each of them."""
    for group in _layout(path):
        yield from ((name, shape) for name, shape in group if name is not None)


def _unpartitioned_states(
    files: _Files, source: Path, sizes: Mapping[str, int], name_of: NameOf
) -> Iterator[tuple[str, States]]:
    """Name and states of each parameter that is no placeholder, where ZeRO has cut none."""
    forms = {name: form for path in files.own for name, form in peek(path)[SHARES].get("forms", {}).items()}
    weights = SavedWeights(source, read_description(source)["layers"], forms)
    done = set[str]()  # a tied one is at several positions
    for path in files.models:
        sharing = max(sizes.get(name, 1) for name, _ in _members(path))
        others = [
            source / f"expp_rank_{number}_mp_rank_{_position(path):02d}_optim_states.pt" for number in range(1, sharing)
        ]
        if wrong := damages(others):
            raise CheckpointError(f"the checkpoint is not whole: {', '.join(wrong)}")
        shares = [dict(by_name(peek(each)["optimizer"], _layout(path))) for each in (path, *others)]
        for here, shape in _members(path):
            name = name_of(here, _position(path))
            if name is not None and name not in done and not name.startswith(PLACEHOLDER):
                done.add(name)
                states = [share.get(here, {}) for share in shares[: sizes.get(name, 1)]]
                weight = weights.get(name)
                yield name, whole_states(name, states, shape) | ({} if weight is None else {"fp32": weight})


def whole_states(name: str, shares: list[States], shape: torch.Size) -> States:
    """The states of a parameter.

    Args:
        name: of it.
        shares: of the ranks that share it, or one.
        shape: of what a rank holds.
    """
    found: States = {}
    for key, value in shares[0].items():
        if torch.is_tensor(value) and value.dim() and len(shares) > 1:
            if value.shape != shape:
                raise CheckpointError(
                    f"the optimizer keeps {key} of shape {list(value.shape)} for the experts {name} of shape "
                    f"{list(shape)}, which cannot be joined: load the weights alone"
                )
            value = torch.cat([share[key] for share in shares])
        found[key] = value
    return found


def _experts(own: Iterable[Path]) -> tuple[dict[str, int], dict[tuple[int, int], dict[str, int]]]:
    """Name of a parameter of experts -> ranks that share it; (position, copy) -> name -> number among them."""
    sizes: dict[str, int] = {}
    numbers: dict[tuple[int, int], dict[str, int]] = {}
    for path in own:
        said = _shares(path)
        here = numbers.setdefault((said["position"], said["copy"]), {})
        for name, place in said["experts"].items():
            if place is None:
                raise CheckpointError(
                    f"{name} is of experts of DeepSpeed's own MoE layer, whose optimizer state stays with its ranks: "
                    "load the weights alone, with load_optimizer_states=False"
                )
            here[name], sizes[name] = place
    return sizes, numbers


def _shares(path: Path) -> SavedState:
    """What a rank has said of itself."""
    said = peek(path).get(SHARES)
    if said is None:
        raise CheckpointError(f"{path} does not say which experts its rank has: save the checkpoint anew")
    return said


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
            content = {"param": value.clone() if torch.is_tensor(value) else value, "cat_dim": 0}
            if experts and torch.is_tensor(value) and value.dim():
                content |= {"is_expert_param": True, "ep_num_experts": len(value)}
        _save(content, folder / f"{key}.pt")


def _save(content: object, path: Path) -> None:
    """`torch.save`, of which a full disk is an OSError."""
    with SummedFile(path) as file:
        torch.save(content, file)  # type: ignore[arg-type]  # it writes, which is all that is asked of it


def _write_placeholders(folder: Path, like: States, groups: int) -> None:
    """States for parameters that stand where a rank trains none, which another layout may have."""
    nothing = {
        key: torch.zeros(1, dtype=value.dtype) if torch.is_tensor(value) and value.dim() else value
        for key, value in like.items()
    }
    for number in range(groups):
        _write(folder / placeholder_name(number), nothing, False)


def _groups(plain: list[ParamGroup], sizes: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> list[ParamGroup]:
    """The options of the user's groups of parameters, then enough for those that another layout may make of the experts
    in them: DeepSpeed's optimizers keep experts apart by the number of ranks that share them, and its loader passes
    over groups without options. Which group has which is put right there (`universal.py`).

    Args:
        plain: groups of a rank, but for those that are apart.
        sizes: ranks that share a parameter of experts.
        shapes: of parameters.
    """
    experts = {shapes[name][0] * size for name, size in sizes.items() if name in shapes}
    ways = max((sum(number % size == 0 for size in range(1, number + 1)) for number in experts), default=0)
    return [{key: value for key, value in group.items() if key not in _OF_GROUPS} for group in plain * (1 + ways)]
