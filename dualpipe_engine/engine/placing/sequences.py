"""Sequence parallelism: which replicas of the pipeline share each sequence, and who has which part.

S replicas with neighbouring numbers share their sequences, at every position of the pipeline. To DeepSpeed they stay
replicas: its ZeRO shards over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from ...comm.from_all import from_all
from ...errors import ConfigError
from ..checks.agreement import refused_everywhere
from ..checks.token_mixing import knows_parts, mixing_modules, refusal
from ..given import Settings
from .module import numbered_layers

SIZE, DATA = "sequence_parallel_size", "data_parallel_size"


def read_sizes(settings: Settings, mesh_param: object) -> Settings:
    """The configuration with the sizes that `mesh_param` gives.

    Args:
        settings: the DeepSpeed JSON.
        mesh_param: (data-parallel size, sequence-parallel size), or None.

    Raises:
        ConfigError: they are no whole numbers, contradict each other, or go with a key that does not know them.
    """
    if mesh_param is not None:
        pair = tuple(mesh_param) if isinstance(mesh_param, (tuple, list)) else ()
        if len(pair) != 2:
            raise ConfigError(
                f"mesh_param must be (data-parallel size, sequence-parallel size), as DeepSpeed's, got {mesh_param!r}"
            )
        for name, value in zip((DATA, SIZE), pair, strict=True):
            if settings.get(name, value) != value:
                raise ConfigError(f'mesh_param {pair} contradicts "{name}": {settings[name]}: give one of the two')
        settings = settings | dict(zip((DATA, SIZE), pair, strict=True))
    for name in (SIZE, DATA):
        value = settings.get(name, 1)
        if type(value) is not int or value < (name == DATA):
            raise ConfigError(f'"{name}" must be a whole number above 0, got {value!r}')
    if settings.get(SIZE, 1) > 1:
        _check_others(settings)
    return settings


def _check_others(settings: Settings) -> None:
    if str(settings.get("gradient_allreduce_op", "mean")).lower() == "sum":
        raise ConfigError(
            f'"{SIZE}" and "gradient_allreduce_op": "sum" do not go together, because ranks have parts of one mean: '
            'take "mean"'
        )


@dataclass(frozen=True)
class Sharing:
    """With whom a rank shares its sequences.

    Args:
        size: S; 1: each replica has sequences of its own.
        rank: which part this rank has.
        group: the ranks at this position of the pipeline that share them; None where S is 1.
        cuts_inputs: whether the first layer is given whole inputs, and cuts them.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    cuts_inputs: bool = False

    def readers(self, replicas: int) -> int:
        """Groups with sequences of their own, of so many replicas of the pipeline."""
        return replicas // self.size


def readers_of(settings: Settings, replicas: int) -> int:
    """How many groups of replicas read sequences of their own.

    Raises:
        ConfigError: S does not divide the replicas, or they are not as many as the two sizes say.
    """
    size: int = settings.get(SIZE, 1) or 1
    if replicas % size:
        raise ConfigError(
            f'"{SIZE}": {size} does not divide the {replicas} replicas of the pipeline: start a multiple of {size} '
            "replicas, or take a divisor",
            everywhere=True,
        )
    data = settings.get(DATA)
    if size > 1 and data is not None and data * size != replicas:
        raise ConfigError(
            f'"{DATA}": {data} x "{SIZE}": {size} must be the {replicas} replicas of the pipeline: leave "{DATA}" out, '
            f"or set it to {replicas // size}",
            everywhere=True,
        )
    return replicas // size


def make_sharing(base_grid: PipelineParallelGrid, size: int) -> Sharing:
    """Groups of `size` replicas with neighbouring numbers. Collective over all ranks."""
    own = Sharing()
    if size == 1:
        return own
    for copies in base_grid.topology().get_axis_comm_lists("data"):
        for start in range(0, len(copies), size):
            ranks = copies[start : start + size]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                own = Sharing(size, ranks.index(dist.get_rank()), group)
    return own


def share_sequences(module: PipelineModule, own: Sharing) -> Sharing:
    """Let the layers of a module, placed or not, work on parts of sequences. Collective over all ranks.

    The first layer may have an attribute `cuts_inputs`: it takes whole inputs, and cuts what it returns.

    Args:
        module: whose layers may have a method `share_sequences`.
        own: of this rank, as `make_sharing` returns it.

    Returns:
        The same, which knows who cuts inputs.

    Raises:
        ConfigError: no layer knows how, one of them cannot, or there is no loss function; on all ranks.
    """
    if own.size == 1:
        return own
    sharing = [part for part in module.modules() if knows_parts(part)]
    with refused_everywhere():
        for name in mixing_modules(module)[:1]:
            raise ConfigError(refusal(name))
        for part in sharing:
            part.share_sequences(own.group)
    if not any(from_all(bool(sharing))):
        raise ConfigError(
            f'"{SIZE}": {own.size} needs layers whose attention knows parts of sequences, and the model has none: take '
            "those of dualpipe_engine.models or of an adapter of a model of transformers, or give a layer of yours a "
            "method share_sequences(group)",
            everywhere=True,
        )
    if module.loss_fn is None:
        raise ConfigError(
            f'"{SIZE}": {own.size} weighs the losses of parts of sequences: give the PipelineModule a loss_fn, the '
            "mean over labels other than -100",
            everywhere=True,
        )
    first = [layer for number, layer in numbered_layers(module) if number == 0]
    return replace(own, cuts_inputs=any(from_all(any(getattr(layer, "cuts_inputs", False) for layer in first))))
