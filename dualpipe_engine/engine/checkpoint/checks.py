"""What is checked before a checkpoint is loaded: that its files are whole, and whose optimizer's state it holds."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups

from ...comm.from_all import from_all
from ...errors import CheckpointError, OtherRanksError
from ..given import ParamGroup, SavedState
from ..placing.experts import expert_shares
from .files import DESCRIPTION, damage, damages, other_tags, peek
from .sums import changed, listed
from .ties import Layout, with_own, without_own
from .unpartitioned import Shares, file_of_experts, with_experts

LAYOUT = "dualpipe_layout"  #: in the saved state: the parameters that an optimizer steps


class CheckpointChecks(PipelineEngine):
    """The part of `DualPipeEngine` that looks at a checkpoint."""

    @property
    def cuts_states(self) -> bool:
        """Whether the copies of a stage have a part of the optimizer's state each: ZeRO, and DeepSpeed's BF16_Optimizer
        without it."""
        return bool(self.zero_optimization() or self.using_bf16_optimizer)

    def _own_shares(self) -> Shares:
        """The experts of this rank, and which of those that share them it is; of DeepSpeed's layers too."""
        shares = expert_shares(self.module)
        for name, param in self.module.named_parameters():
            if name in shares and shares[name] is None:
                group: str = param.group_name
                shares[name] = groups._get_expert_parallel_rank(group), int(group.rpartition("_")[2])
        return shares

    def _experts_file(self, folder: Path) -> Path | None:
        """Where a checkpoint without ZeRO has the states of this rank's experts, if not in the file of the model."""
        nowhere = self.cuts_states or self.optimizer is None
        number = 0 if nowhere else file_of_experts(self._own_shares(), self.place.replica)
        return Path(self._get_optimizer_ckpt_name(str(folder.parent), folder.name, number)) if number else None

    def _check_files(self, folder: Path, states: bool) -> None:
        """Every file that a rank is about to read must be there and the one that was saved. Each is read through by one
        of the ranks that need it.

        Raises:
            CheckpointError: one is not.
        """
        needed = self._needed_files(folder, states)
        wrong = damages(needed)
        readers = from_all([] if wrong else [str(path) for path in needed])
        if not wrong:
            wrong = self._changed_files(folder, readers)
        all_wrong = sorted({each for of_rank in from_all(wrong) for each in of_rank})
        if all_wrong:
            others = other_tags(folder)
            instead = f'; load tag="{others[-1]}" instead' if others else ""
            more = f" and {len(all_wrong) - 3} more" if len(all_wrong) > 3 else ""
            text = f"the checkpoint is not whole: {', '.join(all_wrong[:3])}{more}{instead}"
            raise CheckpointError(text, everywhere=True)

    def _check_kind(self, folder: Path, states: bool) -> None:
        """The checkpoint must be of the kind that the configuration says; where it says none, weights load from both.

        Raises:
            CheckpointError: it is that of ranks where a Universal Checkpoint is meant, or the other way round.
        """
        text, meant = "", self.load_universal_checkpoint()
        if folder.is_dir() and (folder / "zero").is_dir() != meant and (states or meant):
            text = (
                f'{folder} is no Universal Checkpoint, which "load_universal" asks for: take the key out, or make one: '
                f"`dualpipe convert --checkpoint {folder} --out {folder}_universal`"
                if meant
                else f'{folder} is a Universal Checkpoint: set "checkpoint": {{"load_universal": true}}, or pass '
                "load_optimizer_states=False to load the weights alone"
            )
        if text := next(filter(None, from_all(text)), ""):
            raise CheckpointError(text, everywhere=True)

    @staticmethod
    def _changed_files(folder: Path, readers: list[list[str]]) -> list[str]:
        """What is wrong with this rank's share of the files that `readers` need, by rank, and which of this package are
        gone: not all checkpoints have them."""
        try:
            sums = listed(folder)
        except CheckpointError as error:
            return [str(error)]
        ranks: dict[str, list[int]] = {}
        for rank, names in enumerate(readers):
            for name in names:
                ranks.setdefault(name, []).append(rank)
        mine = [
            Path(name)
            for number, (name, held) in enumerate(sorted(ranks.items()))
            if held[number % len(held)] == dist.get_rank()
        ]
        gone = damages(folder / name for name in sums or () if name.startswith("dualpipe_"))
        return gone + [text for text in (changed(path, sums) for path in mine) if text]

    def _needed_files(self, folder: Path, states: bool) -> list[Path]:
        """What this rank reads of a checkpoint, there or not."""
        if not folder.is_dir():
            return [folder]
        models = [Path(name) for name in self._get_all_ckpt_names(str(folder.parent), folder.name)]
        files = models or [folder / "mp_rank_00_model_states.pt"]
        if self.load_universal_checkpoint():
            there = sorted([*folder.glob("zero/**/*.pt"), *folder.glob("layer_*.pt"), *folder.glob("dualpipe_*.pt")])
            return files + there[dist.get_rank() :: dist.get_world_size()]
        for index, layer in enumerate(self.module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                paths = self.module.ckpt_layer_path_list(str(folder), index)
                number = self.module.dualpipe_layers[index]
                files += map(Path, paths or [f"{folder}/layer_{number:02d}-model_states.pt"])
        files += (folder / own.name for own in self.module.own_files() if (folder / own.name).is_file())
        if states and self.cuts_states:
            files += self._needed_optimizer_files(folder)
        elif states and (experts := self._experts_file(folder)) is not None and self._has_layout(folder):
            files.append(experts)
        return files + [path for path in (folder / DESCRIPTION, *folder.glob("dualpipe_rank_*.pt")) if path.is_file()]

    def _needed_optimizer_files(self, folder: Path) -> list[Path]:
        rank = dist.get_rank(group=self.optimizer.dp_process_group)
        names = [
            self._get_rank_zero_ckpt_name(str(folder.parent), folder.name, self.checkpoint_mp_rank, rank, bf16)
            for bf16 in (self.bfloat16_enabled(), not self.bfloat16_enabled())
        ]
        there = [name for name in names if Path(name).exists()]
        if not there:
            model = Path(self._get_ckpt_name(str(folder.parent), folder.name))
            saved = {} if damage(model) else peek(model)
            if saved.get("dp_world_size", 0) <= rank or _is_whole(saved) or _has_none(saved):
                return []  # said elsewhere, or saved by fewer copies or without ZeRO, as `_check_layout` will say
        return [Path(there[0] if there else names[0])]

    def _layout(self) -> Layout:
        """Which parameters the optimizer of this rank steps, in its order: what its state belongs to."""
        if self.cuts_states:
            return [list(group.items()) for group in self._get_zero_param_shapes()]
        names = {param: name for name, param in self.module.named_parameters()}
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return [[(names.get(param), param.shape) for param in group["params"]] for group in groups]

    def _has_layout(self, folder: Path) -> bool:
        """Whether the states in the file of this pipe position belong to the same parameters, as far as it says."""
        path = Path(self._get_ckpt_name(str(folder.parent), folder.name))
        if damage(path):
            return False
        layout = peek(path).get(LAYOUT)
        return layout is None or _same(layout, self._layout()) or self._lacks_own_of_ties(layout)

    def _lacks_own_of_ties(self, layout: Layout) -> bool:
        """Whether the state was saved for the same parameters but those that tied layers have of their own, and can be
        loaded nevertheless: ZeRO cuts all parameters of a rank together."""
        own = self._layout()
        less = without_own(self.module, own)
        return less != own and _same(layout, less) and isinstance(self.optimizer, torch.optim.Optimizer)

    def _for_own_layout(self, saved: SavedState, folder: Path | None) -> SavedState:
        """What a file of a checkpoint holds, where it is the state of an optimizer: with this rank's experts in it, and
        with what the own optimizer has besides.

        Args:
            saved: what it holds.
            folder: of the checkpoint; None where no state of an optimizer is wanted.
        """
        layout = saved.get(LAYOUT) if isinstance(saved, dict) else None
        if layout is None or folder is None:
            return saved
        experts = self._experts_file(folder)
        if experts is not None:
            saved = {**saved, "optimizer": with_experts(saved["optimizer"], peek(experts)["optimizer"])}
        if self._lacks_own_of_ties(layout):
            return {**saved, "optimizer": with_own(self.module, saved["optimizer"], self._layout())}
        return saved

    def _check_scheduler(self, folder: Path) -> None:
        """A scheduler of learning rates must find its state.

        Raises:
            CheckpointError: there is none.
        """
        files = self._get_all_ckpt_names(str(folder.parent), folder.name)
        if any(from_all(self.lr_scheduler is not None and peek(Path(files[0])).get("lr_scheduler") is None)):
            raise CheckpointError(
                f"{folder} was saved without a scheduler of learning rates: pass load_lr_scheduler_states=False to let "
                "that of this run begin anew",
                everywhere=True,
            )

    def _lacking(self, saved: list[ParamGroup]) -> str:
        """What is wrong where these are groups of parameters of another kind of optimizer; "" if they are not.

        Args:
            saved: their options.
        """
        defaults = getattr(self.basic_optimizer, "defaults", {})
        numbers = {name for name, value in defaults.items() if type(value) in (int, float, tuple, list)}
        lacking = " and no ".join(sorted(numbers - saved[0].keys()) if saved else ())
        return lacking and f"it was saved with another kind of optimizer, which has no {lacking}"

    def _groups_of(self, saved: SavedState, folder: Path) -> list[ParamGroup]:
        """The options of the groups of parameters in a checkpoint.

        Args:
            saved: what the file of this pipe position holds.
            folder: of the checkpoint.
        """
        if self.cuts_states:
            optimizer = peek(self._needed_optimizer_files(folder)[0])["optimizer_state_dict"]["base_optimizer_state"]
        else:
            optimizer = saved["optimizer"].get("optimizer_state_dict", saved["optimizer"])  # within that of fp16
        return optimizer["param_groups"] if isinstance(optimizer, dict) else []

    def _check_layout(self, folder: Path) -> None:
        """The optimizer's state must be that of the same parameters, cut among as many copies, or by none.

        Raises:
            CheckpointError: it is not.
        """
        path = Path(self._get_ckpt_name(str(folder.parent), folder.name))
        why, wrong = "its optimizer state is cut for other pipeline ranks", ""
        if path.exists():
            saved = peek(path)
            shapes = saved.get("param_shapes")
            layout = saved.get(LAYOUT) or (shapes and [list(group.items()) for group in shapes])
            same = layout is None or _same(layout, self._layout()) or self._lacks_own_of_ties(layout)
            copies = saved.get("dp_world_size")
            if _has_none(saved):
                wrong = "it was saved without an optimizer"
            elif _is_whole(saved) == self.cuts_states:
                why = f"its optimizer state was saved with{'out' if self.cuts_states else ''} ZeRO"
            elif same and self.cuts_states and copies != self.seq_dp_world_size:
                why = f"its optimizer state is cut among {copies} copies of each stage, not {self.seq_dp_world_size}"
            elif same and layout is not None:
                why, wrong = "", self._lacking(self._groups_of(saved, folder))
            elif layout and _in_order(layout) == _in_order(self._layout()):
                why = 'its optimizer state has another order of parameters, which "round_robin_gradients" changes'
        if text := next(filter(None, from_all(wrong)), None):
            text = f"{folder}: {text}: pass load_optimizer_states=False to load the weights alone"
            raise CheckpointError(text, everywhere=True)
        if reason := next(filter(None, from_all(why)), None):
            text = (
                f"{folder} was saved by another schedule or other ranks: {reason}. Pass load_optimizer_states=False to "
                "load the weights alone"
            )
            if any(from_all(None in expert_shares(self.module).values())):
                text += ": the optimizer state of experts of deepspeed.moe.layer.MoE stays with its ranks"
            else:
                text += (
                    f", or convert it: `dualpipe convert --checkpoint {folder} --out {folder}_universal`, then load "
                    f'tag="{folder.name}_universal" with "checkpoint": {{"load_universal": true}} in the configuration'
                )
            raise OtherRanksError(text, everywhere=True)


def _is_whole(saved: SavedState) -> bool:
    """Whether the file of a pipe position has the optimizer's state, which no copies have cut."""
    return saved.get("optimizer") is not None and "base_optimizer_state" not in saved["optimizer"]


def _in_order(layout: Layout) -> list[list[str]]:
    return [sorted(str(tuple(each)) for each in group) for group in layout]


def _has_none(saved: SavedState) -> bool:
    """Whether it was saved without an optimizer."""
    return saved.get("optimizer") is None and saved.get("param_shapes") is None


def _same(saved: Layout, own: Layout) -> bool:
    return [[tuple(each) for each in group] for group in saved] == own
