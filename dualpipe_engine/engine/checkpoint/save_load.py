"""Checkpoints in DeepSpeed's own files, complete or not there, and resumed bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger

from ...errors import CheckpointError, ConfigError
from ..placing.experts import has_experts
from ..placing.partition import same_random_state
from .files import (
    DESCRIPTION,
    PARTIAL,
    checked_tag,
    damage,
    damages,
    naming_reads,
    other_tags,
    peek,
    publish,
    settle,
    standing,
    write_text,
)
from .state import check_ties, description, random_state, set_random_state, universal_info

_LAYOUT = "dualpipe_layout"


class Checkpoints(PipelineEngine):
    """The part of `DualPipeEngine` that saves and loads."""

    _data_state: dict[str, Any] | None = None  # of the loader, until there is one

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save a checkpoint, as DeepSpeed does. Collective over all ranks.

        Each weight is written once, although two ranks hold it. The files are written into a folder beside the
        checkpoint's, which takes its name when all are complete: a run that is killed while it saves leaves the
        checkpoint before as the latest one. Random states and the position of a stateful data loader (`state_dict`)
        are kept as well.

        Args:
            save_dir: folder of checkpoints.
            tag: name of this one; `global_step<N>` by default.
            client_state: what `load_checkpoint` shall return.
            save_latest: let `load_checkpoint` without a tag load this one.
            exclude_frozen_parameters: leave out what is not trained.

        Raises:
            CheckpointError: no file would hold certain tied weights, the tag names no folder below `save_dir`, or ranks
                were given different ones; the same on every rank, before anything is written.
        """
        self._check_expert_states()
        check_ties(self.module)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        self._agree(save_dir, tag)
        checked_tag(tag)
        folder = Path(save_dir, tag)
        if not hasattr(self.module, "universal_checkpoint_info"):
            self.module.universal_checkpoint_info = universal_info(self.module)
        self._on_first(settle, folder)
        super().save_checkpoint(
            save_dir,
            tag + PARTIAL,
            {**(client_state or {}), _LAYOUT: self._layout()},
            save_latest=False,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        if self.checkpoint_engine.is_decoupled():  # it writes in the background
            self._commit_decoupled_checkpoint()
        self._save_own_state(Path(f"{folder}{PARTIAL}"))
        dist.barrier()
        self._on_first(publish, folder)
        if save_latest:
            self._on_first(write_text, Path(save_dir, "latest"), tag)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint of this engine or of stock DeepSpeed, as DeepSpeed does. Collective over all ranks.

        Weights load whatever the schedule, the pipeline ranks and the replicas were. The optimizer's state loads where
        the ranks hold the same layers; elsewhere through DeepSpeed's Universal Checkpoint.

        Returns:
            (path of the loaded file, `client_state`); (None, None) when `load_dir` holds no latest checkpoint.

        Raises:
            CheckpointError: a file is missing or cut off, or the optimizer's state belongs to other ranks; the same on
                every rank, before anything is loaded.
        """
        universal = self.load_universal_checkpoint()
        tag = None if tag is None else str(tag)
        self._agree(load_dir, tag)
        if tag is None:
            tag = self._latest(Path(load_dir, "latest_universal" if universal else "latest"))
        else:
            checked_tag(tag)
        states = load_optimizer_states and not load_module_only
        if tag is not None:
            folder = standing(Path(load_dir, tag))
            tag = str(folder.relative_to(load_dir))
            self._check_files(folder, states)
            if states and not universal:
                self._check_layout(folder)
        with naming_reads(self.checkpoint_engine):
            path, client_state = super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        if path is not None and client_state is not None:
            client_state.pop(_LAYOUT, None)
            if not load_module_only:
                self._load_own_state(Path(path).parent)
        return path, client_state

    def _check_expert_states(self) -> None:
        """Refuse to save what could not be loaded.

        Raises:
            ConfigError: experts are shared by several ranks and their optimizer states are not partitioned.
        """
        if not self.zero_optimization() and not self.using_bf16_optimizer and has_experts(self.module):
            raise ConfigError(
                "without ZeRO, DeepSpeed's files hold the optimizer states of one of the ranks that share the experts: "
                'set "zero_optimization": {"stage": 1} to save checkpoints'
            )

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        super().set_dataiterator(iterator)
        self._resume_data()

    @staticmethod
    def _agree(folder: str, tag: str | None) -> None:
        """Compare what the ranks were given. Collective over all ranks.

        Raises:
            CheckpointError: they differ; on all ranks.
        """
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (str(folder), tag))
        for rank, each in enumerate(found):
            if each != found[0]:
                text = f"the ranks mean different checkpoints: {found[0]} on rank 0, {each} on rank {rank}"
                raise CheckpointError(text, everywhere=True)

    @staticmethod
    def _latest(path: Path) -> str | None:
        """The tag that the file `path` names, as rank 0 reads it; None if there is none. Collective over all ranks."""
        box = [path.read_text(errors="replace").strip() if dist.get_rank() == 0 and path.is_file() else None]
        dist.broadcast_object_list(box, 0)
        return None if box[0] is None else checked_tag(box[0], str(path))

    def _on_first(self, function: Any, *args: Any) -> None:
        """Run on rank 0 while the others wait."""
        if dist.get_rank() == 0:
            function(*args)
        dist.barrier()

    # -- what is checked before loading --------------------------------------------------------------------------

    def _check_files(self, folder: Path, states: bool) -> None:
        """Every file that a rank is about to read must be there and whole.

        Raises:
            CheckpointError: one is not.
        """
        models = [Path(name) for name in self._get_all_ckpt_names(str(folder.parent), folder.name)]
        wrong = damages(models) if models else [f"{folder}/mp_rank_00_model_states.pt is missing"]
        if not self.load_universal_checkpoint():
            wrong += self._damaged_layers(folder)
            if states and self.zero_optimization():
                wrong += self._damaged_optimizer(folder)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, wrong)
        all_wrong = sorted({each for rank in found for each in rank})
        if all_wrong:
            others = other_tags(folder)
            instead = f'; load tag="{others[-1]}" instead' if others else ""
            more = f" and {len(all_wrong) - 3} more" if len(all_wrong) > 3 else ""
            text = f"the checkpoint is not whole: {', '.join(all_wrong[:3])}{more}{instead}"
            raise CheckpointError(text, everywhere=True)

    def _damaged_layers(self, folder: Path) -> list[str]:
        wrong = []
        for index, layer in enumerate(self.module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                paths = self.module.ckpt_layer_path_list(str(folder), index)
                number = self.module.dualpipe_layers[index]
                wrong += damages(map(Path, paths)) or (
                    [] if paths else [f"{folder}/layer_{number:02d}-model_states.pt is missing"]
                )
        return wrong

    def _damaged_optimizer(self, folder: Path) -> list[str]:
        rank = dist.get_rank(group=self.optimizer.dp_process_group)
        names = [
            self._get_rank_zero_ckpt_name(str(folder.parent), folder.name, self.checkpoint_mp_rank, rank, bf16)
            for bf16 in (self.bfloat16_enabled(), not self.bfloat16_enabled())
        ]
        there = [name for name in names if Path(name).exists()]
        if not there:
            model = Path(self._get_ckpt_name(str(folder.parent), folder.name))
            if damage(model) or peek(model).get("dp_world_size", 0) <= rank:
                return []  # said elsewhere, or saved by fewer copies, as `_check_layout` will say
        return damages([Path(there[0] if there else names[0])])

    def _layout(self) -> list[Any]:
        """Which parameters the optimizer of this rank steps, in its order: what its state belongs to."""
        if self.zero_optimization():
            return [list(group.items()) for group in self._get_zero_param_shapes()]
        names = {param: name for name, param in self.module.named_parameters()}
        groups = () if self.optimizer is None else self.optimizer.param_groups
        return [[(names.get(param), param.shape) for param in group["params"]] for group in groups]

    def _check_layout(self, folder: Path) -> None:
        """The optimizer's state must be that of the same parameters, cut among as many copies.

        Raises:
            CheckpointError: it is not.
        """
        path = Path(self._get_ckpt_name(str(folder.parent), folder.name))
        why = "its optimizer state is cut for other pipeline ranks"
        if path.exists():
            saved = peek(path)
            shapes = saved.get("param_shapes")
            layout = saved.get(_LAYOUT) or (shapes and [list(group.items()) for group in shapes])
            same = layout is None or [[tuple(each) for each in group] for group in layout] == self._layout()
            copies = saved.get("dp_world_size")
            if same and self.zero_optimization() and copies != self.seq_dp_world_size:
                why = f"its optimizer state is cut among {copies} copies of each stage, not {self.seq_dp_world_size}"
            elif same and layout is not None:
                why = ""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, why)
        if reason := next(filter(None, found), None):
            raise CheckpointError(
                f"{folder} was saved by another schedule or other ranks: {reason}. Pass load_optimizer_states=False to "
                "load the weights alone, or convert it (ZeRO-1 and ZeRO-2): `python -m "
                f"deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {folder} "
                f'--output_folder {folder}_universal`, then load tag="{folder.name}_universal" with '
                '"checkpoint": {"load_universal": true} in the configuration',
                everywhere=True,
            )

    # -- what DeepSpeed does not keep ----------------------------------------------------------------------------

    def _save_own_state(self, folder: Path) -> None:
        state = {
            "random": random_state(self.device),
            "micro_offset": self.module.micro_offset,
            "replicas": self.place.replicas,
            "data": self.data_iterator.state_dict() if hasattr(self.data_iterator, "state_dict") else None,
        }
        self.checkpoint_engine.save(state, str(self._own_file(folder, dist.get_rank())))
        if dist.get_rank() == 0:
            about = description(self.module, self.plan)
            write_text(folder / DESCRIPTION, json.dumps(about, indent=1))

    @staticmethod
    def _own_file(folder: Path, rank: int) -> Path:
        return folder / f"dualpipe_rank_{rank:05d}.pt"

    def _load_own_state(self, folder: Path) -> None:
        """Random states, where the ranks are the same; the data's position, where replicas are, or where it is ours,
        which counts samples."""
        if damage(self._own_file(folder, 0)):
            return  # stock DeepSpeed's
        world = len(list(folder.glob("dualpipe_rank_*.pt")))
        first = self._own_file(folder, self.place.pipeline[0])  # an end: it has read data
        same_ranks = world == dist.get_world_size() and peek(first)["replicas"] == self.place.replicas
        data = peek(first if same_ranks else self._own_file(folder, 0))
        self.module.micro_offset = data["micro_offset"]
        if same_ranks:
            set_random_state(peek(self._own_file(folder, dist.get_rank()))["random"], self.device)
        elif dist.get_rank() == 0:
            logger.warning(f"{folder} was saved by {world} ranks: random generators start anew")
        if data["data"] is not None:
            if same_ranks or data["data"].keys() == {"samples"}:
                self._data_state = data["data"]
                self._resume_data()
            elif dist.get_rank() == 0:
                logger.warning(f"{folder} was saved by {data['replicas']} replicas: the data starts anew")

    def _resume_data(self) -> None:
        if self._data_state is not None and self.data_iterator is not None:
            if hasattr(self.data_iterator, "load_state_dict"):
                with same_random_state():  # loaders draw a seed for their workers
                    self.data_iterator.load_state_dict(self._data_state)
            else:
                logger.warning("the data iterator has no load_state_dict: its position is not resumed")
            self._data_state = None
