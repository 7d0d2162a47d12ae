"""Checkpoints in DeepSpeed's own files, complete or not there, and resumed bit for bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import groups, logger

from ...comm.from_all import from_all
from ...errors import CheckpointError, ConfigError
from ..given import CheckpointEngine, ClientState
from ..placing.experts import block_forms, expert_shares, has_experts, told_universal_loader
from .checks import LAYOUT
from .convert import SHARES
from .data_position import DataPosition
from .description import description
from .files import (
    DESCRIPTION,
    checked_tag,
    damage,
    new_job,
    peek,
    reading,
    standing,
)
from .on_signal import SaveOnSignal
from .save import Save
from .state import check_ties, random_state, set_random_state, universal_info
from .ties import named_as_saved, names_of_layers
from .universal import UniversalLoading
from .unpartitioned import experts_of, file_of_experts

CLIENT = "dualpipe_client_state"  #: in the saved state: what has names there that DeepSpeed takes
_DEEPSPEEDS = (
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd skipped_steps global_steps global_samples dp_world_size mp_world_size num_experts "
    "ds_config ds_version checkpoint_parallel_dimensions"
)
WAIT_S = 60.0  #: at most, for another job that saves into the same folder


class Checkpoints(UniversalLoading, DataPosition):
    """The part of `DualPipeEngine` that saves and loads."""

    checkpoint_engine: CheckpointEngine
    _pending: Save | None = None  # what is being written in the background
    #: Gives the `client_state` of a checkpoint that a signal asks for.
    client_state_on_signal: Callable[[], ClientState] | None = None

    def _init_saving(self) -> None:
        self._job, self._born = new_job(), time.monotonic()
        name = self.dualpipe_config.save_on_signal
        self._on_signal = None if name is None else SaveOnSignal(name)
        self._save_folder = self.dualpipe_config.save_folder

    def signals_here(self) -> int:
        """Whether this rank was sent the signal of "save_on_signal"."""
        return int(self._on_signal is not None and self._on_signal.came)

    def _check_save_folder(self) -> None:
        """Raises:
        ConfigError: a signal would not find where to save.
        """
        if self._on_signal is not None and self._save_folder is None:
            raise ConfigError(
                '"save_on_signal" must know where: set "save_folder" in the "pipeline" section, or call '
                "load_checkpoint or save_checkpoint before the first train_batch",
                everywhere=True,
            )

    def _end_on_signal(self) -> None:
        """After a batch: save and end if a rank was sent the signal. Collective over all ranks.

        Raises:
            SystemExit: the checkpoint is saved.
        """
        if self._on_signal is not None and float(self.totals.finish().signals):
            assert self._save_folder is not None
            state = None if self.client_state_on_signal is None else self.client_state_on_signal()
            self.save_checkpoint(self._save_folder, client_state=state)
            self._follow_save(wait=True)
            if dist.get_rank() == 0:
                logger.warning(f"saved in {self._save_folder} after {self._on_signal.number.name}; the job ends")
            raise self._on_signal.leave()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: ClientState | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save a checkpoint, as DeepSpeed does. Collective over all ranks.

        Each weight is written once, although two ranks hold it. The files are written into a folder beside the
        checkpoint's, which takes its name when all are complete and on the disk: a run that is killed while it saves
        leaves the checkpoint before as the latest one. Random states and the position of a stateful data loader
        (`state_dict`) are kept as well.

        With `"checkpoint": {"async": true}` this returns when a copy is in host memory, and a thread writes it. An
        error of the thread is raised by the next `train_batch`, `save_checkpoint`, `load_checkpoint`,
        `wait_for_checkpoint` or `destroy`.

        Args:
            save_dir: folder of checkpoints.
            tag: name of this one; `global_step<N>` by default.
            client_state: what `load_checkpoint` shall return.
            save_latest: let `load_checkpoint` without a tag load this one.
            exclude_frozen_parameters: leave out what is not trained.

        Raises:
            CheckpointError: no file would hold certain tied weights, the tag names no folder below `save_dir`, ranks
                were given different ones, another job saves into the folder, or it cannot be written; the same on every
                rank, the checkpoints before stand, and training can go on.
        """
        self._check_expert_states()
        check_ties(self.module)
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        job = self._agree(self._job, save_dir, tag, client_state)
        checked_tag(tag)
        self._save_folder = str(save_dir)
        self._follow_save(wait=True)
        self.masters.follow(self.optimizer)
        if not hasattr(self.module, "universal_checkpoint_info"):
            self.module.universal_checkpoint_info = universal_info(self.module)
        background = self._saves_in_background()
        save = Save(
            self.checkpoint_engine,
            Path(save_dir),
            tag,
            job,
            age_s=time.monotonic() - self._born,
            latest=save_latest,
            background=background,
            patience_s=min(WAIT_S, self.dualpipe_config.p2p_timeout_s / 2),
        )
        kept, self.checkpoint_engine = self.checkpoint_engine, save.writer
        try:
            super().save_checkpoint(
                save_dir,
                str(save.folder.relative_to(save_dir)),
                {**_apart(client_state or {}), LAYOUT: self._layout()},
                save_latest=False,
                exclude_frozen_parameters=exclude_frozen_parameters,
            )
            self._save_own_state(save, job)
            self._save_own_experts(save)
        except BaseException:
            save.abandon()
            raise
        finally:
            self.checkpoint_engine = kept
        if background:
            save.start()
            self._pending = save
        else:
            save.finish()
        return True

    def _saves_in_background(self) -> bool:
        return bool((self._config._param_dict.get("checkpoint") or {}).get("async"))

    def _follow_save(self, wait: bool = False) -> None:
        """Look after a checkpoint that is being written in the background. Collective over all ranks.

        Raises:
            CheckpointError: it could not be written; on all ranks.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            if not pending.follow(wait):
                self._pending = pending

    def wait_for_checkpoint(self) -> None:
        """Return when a checkpoint that is written in the background has its name. Collective over all ranks.

        Raises:
            CheckpointError: it could not be written; on all ranks.
        """
        self._follow_save(wait=True)

    def _checkpoint_tag_validation(self, tag: str) -> None:
        """Nothing: `_agree` has compared the tags, and the job's name in this one is that of rank 0."""

    def _copy_recovery_script(self, save_path: str) -> None:
        self.checkpoint_engine.attempt(super()._copy_recovery_script, save_path)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., object] | None = None,
    ) -> tuple[str | None, ClientState | None]:
        """Load a checkpoint of this engine or of stock DeepSpeed, as DeepSpeed does. Collective over all ranks.

        Weights load whatever the schedule, the pipeline ranks and the replicas were. The optimizer's state loads where
        the ranks hold the same layers; elsewhere through DeepSpeed's Universal Checkpoint.

        Returns:
            (path of the loaded file, `client_state`); (None, None) when `load_dir` holds no latest checkpoint.

        Raises:
            CheckpointError: a file is missing or cut off, the optimizer's state belongs to other ranks, or there is no
                state of the optimizer or the scheduler; before anything is loaded. Or a file does not fit a layer. The
                same on every rank.
            ConfigError: there is a `custom_load_fn`.
        """
        if custom_load_fn is not None:
            raise ConfigError(
                "custom_load_fn would get no state dict of the model, as each layer has a file: change the weights of "
                "engine.module after load_checkpoint, by name",
                everywhere=True,
            )
        universal = self.load_universal_checkpoint()
        tag = None if tag is None else str(tag)
        self._agree(self._job, load_dir, tag)
        self._save_folder = str(load_dir)
        self._follow_save(wait=True)
        if tag is None:
            tag = self._latest(Path(load_dir, "latest_universal" if universal else "latest"))
        else:
            checked_tag(tag)
        states = load_optimizer_states and not load_module_only and self.optimizer is not None
        if tag is not None:
            folder = standing(Path(load_dir, tag))
            tag = str(folder.relative_to(load_dir))
            self._check_kind(folder, states)
            self._check_files(folder, states)
            if universal:
                self._check_groups(folder, states)
            elif states:
                self._check_layout(folder)
            if load_lr_scheduler_states and not load_module_only:
                self._check_scheduler(folder)
        with ExitStack() as stack:
            as_saved = tag is not None and states and not universal
            fitted = partial(self._for_own_layout, folder=folder if as_saved else None)
            stack.enter_context(reading(self.checkpoint_engine, fitted))
            stack.enter_context(told_universal_loader(self.module))
            if universal and tag is not None:
                stack.enter_context(named_as_saved(self.module, self.param_names, Path(load_dir, tag)))
            by_layer = universal and tag is not None and next(folder.glob("layer_*"), None) is not None
            if by_layer:  # buffers and what is not trained; the optimizer's own copies of weights follow
                self.module.load_state_dir(str(folder), self.checkpoint_engine, load_module_strict)
            options = load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only
            by_deepspeed = not (universal or self.using_bf16_optimizer)
            if tag is None or by_deepspeed or (self.zero_optimization() and (states or not universal)):
                path, client_state = super().load_checkpoint(load_dir, tag, *options, custom_load_fn)
                if universal and states and tag is not None:
                    self._set_options(folder)
            else:
                path, client_state = self._load_without_zero(folder, states, *options, custom_load_fn)
            if by_layer:  # where the optimizer's copies may be those of another layer of a tie
                self.module.load_own_files(str(folder), self.checkpoint_engine)
        if path is not None and client_state is not None:
            client_state.pop(LAYOUT, None)
            client_state |= client_state.pop(CLIENT, {})
            if not load_module_only:
                self._load_own_state(Path(path).parent)
        return path, client_state

    def _check_expert_states(self) -> None:
        """Refuse to save what could not be loaded.

        Raises:
            ConfigError: experts are shared by several ranks, and fp16 without ZeRO keeps their optimizer states.
        """
        whole = self.optimizer is None or isinstance(self.optimizer, torch.optim.Optimizer)
        if not self.cuts_states and not whole and has_experts(self.module):
            raise ConfigError(
                "in fp16 without ZeRO, DeepSpeed's files hold the optimizer states of one of the ranks that share the "
                'experts: set "zero_optimization": {"stage": 1} to save checkpoints'
            )

    @staticmethod
    def _agree(job: str, folder: str, tag: str | None, client_state: object = None) -> str:
        """Look at what the ranks were given, and compare it. Collective over all ranks.

        Returns:
            `job` of rank 0.

        Raises:
            CheckpointError: it differs, or cannot be; on all ranks.
        """
        wrong = None
        if not isinstance(folder, (str, os.PathLike)) or not str(folder):
            wrong = f"{folder!r} is no name of a folder of checkpoints"
        elif client_state is not None and not isinstance(client_state, Mapping):
            wrong = f"client_state must be a dict, and is of type {type(client_state).__name__}"
        of_ranks = from_all((job, (str(folder), tag), wrong))
        job, first, _ = of_ranks[0]
        for rank, (_, each, text) in enumerate(of_ranks):
            if text is not None:
                raise CheckpointError(f"rank {rank}: {text}", everywhere=True)
            if each != first:
                text = f"the ranks mean different checkpoints: {first} on rank 0, {each} on rank {rank}"
                raise CheckpointError(text, everywhere=True)
        return job

    @staticmethod
    def _latest(path: Path) -> str | None:
        """The tag that the file `path` names, as rank 0 reads it; None if there is none. Collective over all ranks."""
        box = [path.read_text(errors="replace").strip() if dist.get_rank() == 0 and path.is_file() else None]
        dist.broadcast_object_list(box, 0)
        return None if box[0] is None else checked_tag(box[0], str(path))

    # -- what DeepSpeed does not keep ----------------------------------------------------------------------------

    def _save_own_state(self, save: Save, job: str) -> None:
        state = {
            "random": random_state(self.device),
            "micro_offset": self.module.micro_offset,
            "replicas": self.place.replicas,
            "data": self._data_position(),
            SHARES: {
                "position": self.checkpoint_mp_rank,
                "copy": groups._get_data_parallel_rank(),
                "experts": expert_shares(self.module),
                "forms": block_forms(self.module),
                "loss": self.place.reads_labels,
                "names": names_of_layers(self.module),
            },
        }
        save.writer.save(state, str(self._own_file(save.folder, dist.get_rank())))
        if dist.get_rank() == 0:
            ranks = self.plan.placement.num_ranks
            about = {"schedule": self.plan.schedule, "ranks": ranks, **description(self.module), "job": job}
            save.writer.write(save.folder / DESCRIPTION, json.dumps(about, indent=1).encode())

    def _save_own_experts(self, save: Save) -> None:
        """Without ZeRO: the optimizer's state of experts that the file of the model does not have."""
        path, placement = self._experts_file(save.folder), self.place.placement
        shares = self._own_shares()
        if path is None or self.optimizer is None or self.place.replica != file_of_experts(shares, self.place.replica):
            return
        # one of the copies: the first direction, and the first ranks with these experts
        if placement.num_directions == 1 or 2 * self.place.rank < placement.num_ranks:
            state, layout = self.optimizer.state_dict(), self._layout()
            save.writer.save({"optimizer": experts_of(state, layout, shares), LAYOUT: layout}, str(path))

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


def _apart(client_state: ClientState) -> ClientState:
    """A `client_state` that does not take the place of what DeepSpeed saves."""
    taken = {*_DEEPSPEEDS.split(), LAYOUT}.intersection(client_state)
    free = {key: value for key, value in client_state.items() if key not in taken}
    return free | {CLIENT: {key: client_state[key] for key in taken}} if taken else free
