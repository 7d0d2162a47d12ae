"""Loading DeepSpeed's Universal Checkpoints, and what else it loads under ZeRO alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...comm.from_all import from_all
from ...errors import CheckpointError
from ..given import ClientState, ParamGroup
from ..placing.experts import expert_shares
from ..placing.param_groups import origins
from .checks import CheckpointChecks
from .files import peek
from .ties import name_in_tie, names_of_layers
from .unpartitioned import load_universal, load_weights

PLAIN = "dualpipe_groups"  #: in a Universal Checkpoint: how many groups of parameters the user has


class UniversalLoading(CheckpointChecks):
    """The part of `DualPipeEngine` that loads them."""

    def _check_groups(self, folder: Path, states: bool) -> None:
        """A Universal Checkpoint must have the states of all parameters of this rank, and the options of their groups:
        DeepSpeed passes over the states of others without a word.

        Args:
            folder: of the checkpoint.
            states: whether they are wanted, beside the weights.

        Raises:
            CheckpointError: it has fewer, or those of another kind of optimizer, or this is not one that loads it.
        """
        wrong = None
        if not self.cuts_states and not isinstance(self.optimizer, torch.optim.Optimizer):
            wrong = 'in fp16 it loads under ZeRO only: set "zero_optimization": {"stage": 1}'
        else:
            saved = self._saved_groups(folder)
            groups = 1 + max(origins(self.optimizer.param_groups), default=-1)
            if groups > len(saved):
                wrong = (
                    f"it has {len(saved)} groups of parameters, this rank {groups}: pass initialize the groups with "
                    "which it was saved"
                )
            elif states and (kind := self._lacking(saved)):
                wrong = f"{kind}: name that one, or pass load_optimizer_states=False to load the weights alone"
            elif missing := self._missing(folder):
                wrong = (
                    f"it has nothing of {missing[0]}"
                    + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                    + ": it is of another model, or what is trained here was frozen when it was saved"
                )
            elif next(folder.glob("layer_*"), None) is None and (kept := self._only_in_layers()):
                wrong = (
                    f"it has nothing of {kept[0]}, which is not trained: copy the files layer_* and dualpipe_* of the "
                    "checkpoint that it was made from into its folder"
                )
        if reason := next(filter(None, from_all(wrong)), None):
            raise CheckpointError(f"{folder} is a Universal Checkpoint, and {reason}", everywhere=True)

    def _missing(self, folder: Path) -> list[str]:
        """Names of parameters that are trained, and that a Universal Checkpoint does not have."""
        trained = {name for name, param in self.module.named_parameters() if param.requires_grad}
        found, of_layers = [], names_of_layers(self.module)
        for name in trained.intersection(name for group in self._layout() for name, _ in group if name is not None):
            names = [name, name_in_tie(self.module, name) or name, of_layers.get(name, name)]
            if not any((folder / "zero" / each).is_dir() for each in names):
                found.append(name)
        return sorted(found)

    def _only_in_layers(self) -> list[str]:
        """Names of what only files of layers have: buffers, and parameters that are not trained."""
        frozen = [name for name, param in self.module.named_parameters() if not param.requires_grad]
        return frozen + list(self._get_buffer_names())

    @staticmethod
    def _saved_groups(folder: Path) -> list[ParamGroup]:
        """The options of the user's groups of parameters in a Universal Checkpoint."""
        saved = peek(folder / "zero" / "optimizer_state.pt")
        groups: list[ParamGroup] = saved.get("param_groups", [])
        return groups[: saved.get(PLAIN)]

    def _own_options(self, folder: Path) -> list[ParamGroup]:
        """The options that a Universal Checkpoint has for each group of the optimizer."""
        saved = self._saved_groups(folder)
        return [saved[number] for number in origins(self.optimizer.param_groups)]

    def _load_without_zero(
        self,
        folder: Path,
        states: bool,
        strict: bool,
        load_optimizer_states: bool,
        load_lr_scheduler_states: bool,
        load_module_only: bool,
        custom_load_fn: Callable[..., object] | None,
    ) -> tuple[str | None, ClientState | None]:
        """What DeepSpeed does under ZeRO alone: Universal Checkpoints, and states that its BF16_Optimizer has cut; and
        what it does not: the weights of a Universal Checkpoint alone."""
        parent, universal = str(folder.parent), self.load_universal_checkpoint()
        rest = load_lr_scheduler_states, load_module_only, custom_load_fn
        path, client_state = self._load_checkpoint(parent, folder.name, strict, False, *rest)
        if client_state is not None and load_optimizer_states:
            client_state.pop("optimizer", None)
        if universal and not states:
            load_weights(folder, self.param_names, expert_shares(self.module))
            refresh = "refresh_fp32_params" if self.using_bf16_optimizer else "_restore_from_bit16_weights"
            getattr(self.optimizer, refresh, lambda: None)()
        elif self.using_bf16_optimizer:
            if states:
                self._load_zero_checkpoint(parent, folder.name)
            else:
                self.optimizer.refresh_fp32_params()
            if universal:
                self.optimizer.update_lp_params()
            if universal and states:
                self._set_options(folder)
        elif states:
            load_universal(
                folder, self.optimizer, self._own_options(folder), self.param_names, expert_shares(self.module)
            )
        return path, client_state

    def _set_options(self, folder: Path) -> None:
        """DeepSpeed gives the options of a Universal Checkpoint to the groups of parameters by their order."""
        for group, saved in zip(self.optimizer.param_groups, self._own_options(folder), strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
