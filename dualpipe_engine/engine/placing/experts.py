"""Expert parallelism in DeepSpeed's terms: its process groups, and what an engine does for layers with experts.

Experts are shared by ranks of one pipeline position and one direction; copies of one rank's share are the like-numbered
ranks of the other groups, the mirror's included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import groups
from torch import Tensor, nn

from ...comm.communicators import close, matches_by_tag, put_beside
from ...comm.from_all import from_all
from ...errors import ConfigError
from ...models.autoep.layer import SharedMoE
from ...models.autoep.weights import SourceForm
from ...models.experts import Experts
from ..checks.agreement import raise_everywhere, refused_everywhere
from .deepspeed_experts import whole_layer
from .param_groups import PLACEHOLDER, add_placeholder

_ABSENT = object()


def make_expert_groups(module: PipelineModule, base_grid: PipelineParallelGrid) -> list[dist.ProcessGroup]:
    """Make the expert groups that the layers of a module ask for. Collective over all ranks.

    Args:
        module: placed, or as its constructor left it.
        base_grid: the grid that it was built on.

    Returns:
        The groups that this rank is in.

    Raises:
        ConfigError: the replicas of the pipeline cannot share experts as the layers want it, or a rank has the share of
            another; the same on every rank.
    """
    if base_grid.model_parallel_size > 1:
        _refuse_slices(module)
    # A MoE layer of DeepSpeed's, or one of `models`.
    mine = {part.ep_size for part in module.modules() if hasattr(part, "set_deepspeed_parallelism")}
    sizes_of_ranks = from_all(mine)
    base, replicas = base_grid.topology(), base_grid.data_parallel_size
    own: list[dist.ProcessGroup] = []
    for size in sorted(set[int]().union(*sizes_of_ranks)):
        if replicas % size:
            raise ConfigError(
                f"experts are shared by {size} ranks, but the pipeline has {replicas} replicas: their number must be a "
                f"multiple of {size}"
            )
        name = f"ep_size_{size}"
        for copies in module._grid.topology().get_axis_comm_lists("data"):
            by_position: dict[int, list[int]] = {}
            for rank in copies:
                by_position.setdefault(base.get_coord(rank).pipe, []).append(rank)
            sharing = [ranks[i : i + size] for ranks in by_position.values() for i in range(0, len(ranks), size)]
            for table, ranks_table, members in (
                (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, sharing),
                (
                    groups._EXPERT_DATA_PARALLEL_GROUP,
                    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
                    [list(each) for each in zip(*sharing, strict=True)],
                ),
            ):
                for ranks in members:
                    group = dist.new_group(ranks)
                    if dist.get_rank() in ranks:
                        table[name], ranks_table[name] = group, ranks
                        own.append(group)
            if not matches_by_tag(base_grid.ds_model_proc_group):
                # Numbers of rows, which the host waits for, would queue behind rows in a communicator's one order.
                for ranks in sharing:
                    counting = dist.new_group(ranks, group_desc=f"dualpipe_counts_{size}")
                    if dist.get_rank() in ranks:
                        put_beside(groups._EXPERT_PARALLEL_GROUP[name], counting)
                        own.append(counting)
    with refused_everywhere():
        for part in module.modules():
            if isinstance(part, Experts) and part.ep_size > 1:
                part.check(groups._EXPERT_PARALLEL_GROUP[part.expert_group_name])
    return own


def _refuse_slices(module: PipelineModule) -> None:
    """DeepSpeed's layer gives each slice some of the rows, and nobody adds up what its experts learn from them."""
    found = any(isinstance(part, MoE) for part in module.modules())
    raise_everywhere(
        [
            "deepspeed.moe.layer.MoE and tensor parallelism do not go together: build the PipelineModule on a "
            "PipeDataParallelTopology, or take the experts of dualpipe_engine.models"
        ]
        if found
        else []
    )


def stand_in_for_experts(module: PipelineModule) -> None:
    """Let a rank without experts have a parameter where others have theirs: DeepSpeed's optimizers keep those apart in
    groups of their own, and take a collective for each group. Collective over all ranks.

    Args:
        module: placed.
    """
    mine = {param.group_name for param in module.parameters() if is_moe_param(param) and param.requires_grad}
    for name in sorted(set().union(*from_all(mine)) - mine):
        param = add_placeholder(module)
        param.allreduce, param.group_name = False, name  # type: ignore[attr-defined]


@contextmanager
def connected_experts(module: PipelineModule) -> Iterator[None]:
    """Let the layers of a module that is not placed yet run in the body; they and their groups are gone from it after.

    Collective over all ranks, its end too.

    Args:
        module: a PipelineModule as its constructor left it.

    Raises:
        ConfigError: as `make_expert_groups`.
    """
    made = make_expert_groups(module, module._grid)
    before = [(vars(part), dict(vars(part))) for part in module.modules()]
    for part in module.modules():
        if hasattr(part, "set_deepspeed_parallelism"):
            part.set_deepspeed_parallelism()
    changed = [
        (own, key, held.get(key, _ABSENT))
        for own, held in before
        for key in own
        if own[key] is not held.get(key, _ABSENT)
    ]
    yield
    for own, key, value in changed:
        if value is _ABSENT:
            del own[key]
        else:
            own[key] = value
    close(made)


def numel_by_sharing(params: Iterable[Tensor]) -> dict[int, int]:
    """Ranks that share a parameter's layer -> elements of those parameters; 1: each rank has all of it."""
    found: dict[int, int] = {}
    for param in params:
        sharing = int(param.group_name.rpartition("_")[2]) if is_moe_param(param) else 1  # type: ignore[attr-defined]
        found[sharing] = found.get(sharing, 0) + param.numel()
    return found


def has_experts(module: nn.Module) -> bool:
    """Whether any parameter is held by some of the ranks of its stage only."""
    return any(is_moe_param(param) for param in module.parameters())


def expert_shares(module: nn.Module) -> dict[str, tuple[int, int] | None]:
    """Name of each parameter of experts -> (number of this rank among those that share them, how many these are); None
    for those of DeepSpeed's own layer, which are parameters of single experts."""
    found: dict[str, tuple[int, int] | None] = {}
    for path, part in module.named_modules():
        if isinstance(part, Experts):
            found |= {f"{path}.{name}": (part.rank, part.ep_size) for name, _ in part.named_parameters()}
        elif isinstance(part, SharedMoE):
            names = [name for name, _ in part.experts.named_parameters()]
            found |= {f"{path}.experts.{name}": (part.ep_rank, part.ep_size) for name in names}
    for name, param in module.named_parameters():
        if is_moe_param(param) and not name.startswith(PLACEHOLDER):
            found.setdefault(name, None)
    return found


def block_forms(module: nn.Module) -> dict[str, SourceForm]:
    """Name of each block of experts whose state dict has other names, where it is whole -> these."""
    return {path: part.form for path, part in module.named_modules() if isinstance(part, SharedMoE)}


@contextmanager
def told_universal_loader(module: nn.Module) -> Iterator[None]:
    """Let DeepSpeed's loader of Universal Checkpoints know which experts this rank has of each parameter. It would ask
    its process groups, and find those of other engines too, and of all parameters the same."""
    shares, told = expert_shares(module), []
    for name, param in module.named_parameters():
        if (share := shares.get(name)) is not None and hasattr(param, "load_hp_checkpoint_state"):
            told.append((param, param.load_hp_checkpoint_state))
            param.load_hp_checkpoint_state = _told(param.load_hp_checkpoint_state, *share)
    try:
        yield
    finally:
        for param, load in told:
            param.load_hp_checkpoint_state = load  # type: ignore[attr-defined]


def _told(load: Callable[..., object], rank: int, size: int) -> Callable[..., object]:
    def told(folder: str, tp_rank: int, tp_world_size: int, ep_rank: int, ep_size: int) -> object:
        return load(folder, tp_rank, tp_world_size, ep_rank=rank, ep_size=size)

    return told


def whole_experts(module: nn.Module, keep: bool) -> ExitStack:
    """A context in which state dicts hold the experts of all ranks. Collective over the ranks that share them.

    Args:
        module: holds layers of `models`, of DeepSpeed, or blocks of others whose experts are shared.
        keep: whether this rank needs the state dicts.
    """
    stack = ExitStack()
    for part in module.modules():
        if isinstance(part, (Experts, SharedMoE)):
            stack.enter_context(part.whole(keep))
        elif isinstance(part, MoE):
            stack.enter_context(whole_layer(part, keep))
    return stack
