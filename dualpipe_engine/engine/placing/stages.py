"""Stages of a placed module: their parameters, and the chunks that run them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import nn

from ...comm.nest import Nest
from ...comm.tickets import Transfer
from ...errors import ConfigError
from ...runtime.chunk import ChunkOptions, StageChunk
from ...runtime.overlap import PhasedChunk, phases_of
from ...runtime.phases import COMPUTE, Phased, hooks_of, parts_with_parts, runs_by_phases
from ...runtime.recompute import Recompute
from ..given import LayerFunction, Settings
from .module import PlacedModule

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OVERLAPPED = "overlapped_forward_backward"


def needs_input_gradient(module: PipelineModule) -> bool:
    """Whether the first stage's inputs must require a gradient, as reentrant activation checkpointing demands."""
    return (
        module.activation_checkpoint_interval > 0
        and module.activation_checkpoint_func is not checkpointing.non_reentrant_checkpoint
    )


def set_activation_checkpointing(module: PipelineModule, section: Settings) -> None:
    """Apply what the "pipeline" section says of activation checkpointing."""
    if section.get("use_reentrant") is False:
        module.activation_checkpoint_func = checkpointing.non_reentrant_checkpoint
    if section.get("activation_checkpoint_interval", 0) > 0:
        module.activation_checkpoint_interval = section["activation_checkpoint_interval"]


def make_chunk(
    view: PipelineModule,
    stage: int,
    by_phases: bool,
    timeout_s: float,
    log: list[Transfer] | None = None,
    recompute: Recompute | None = None,
    **options: Unpack[ChunkOptions],
) -> StageChunk:
    """The chunk that runs a stage.

    Args:
        view: the stage.
        stage: its number.
        by_phases: run it by phases, as `has_phases` allows; all stages of a rank alike, so that they can pair.
        timeout_s: seconds after which a transfer within a phase is given up.
        log: takes what became of the transfers within phases.
        recompute: modules that are computed again; None: there are none.
        options: of `StageChunk`.

    Raises:
        ConfigError: modules shall be computed again in a stage that runs by its own `overlapped_forward_backward`, or
            activations leave for host memory that DeepSpeed's activation checkpointing keeps.
    """
    if not by_phases:
        if options.get("offload") is not None and view.activation_checkpoint_interval > 0:
            raise ConfigError(
                '"offload_activations" moves nothing of layers under "activation_checkpoint_interval", whose inputs '
                'DeepSpeed keeps by itself: name what shall be computed again in "recompute" in its place'
            )
        runnable = _runnable(view)
        if recompute is not None and options.get("overlap", True) and hasattr(type(runnable), _OVERLAPPED):
            raise ConfigError(
                f'"recompute" does not reach into the {_OVERLAPPED} of {type(runnable).__name__}: set '
                '"overlap": false, or leave out "recompute"'
            )
        return StageChunk(runnable if recompute is None else recompute.within(runnable), stage, **options)
    interval = view.activation_checkpoint_interval > 0

    def whole(layer: LayerFunction) -> bool:
        return interval and view._is_checkpointable([layer])

    phases = phases_of(view.forward_funcs, whole)
    if recompute is not None:
        phases = [
            phase._replace(run=recompute.within(phase.run)) if phase.kind == COMPUTE else phase for phase in phases
        ]
    layers = filter(runs_by_phases, view.forward_funcs)
    parts = [view, *(part for layer in layers for part in parts_with_parts(layer))]
    return PhasedChunk(view, stage, phases, timeout_s, log, parts, **options)


def has_phases(module: PipelineModule) -> bool:
    """Whether any layer of this rank offers phases and nothing stands against running the layers one by one: a
    PipelineModule with a forward of its own, or with `seed_layers`, whose seeds belong to whole layers."""
    return not reads_micro_offset(module) and any(map(runs_by_phases, module.forward_funcs))


def hooked_layers(module: PlacedModule) -> dict[int, str]:
    """Number of a layer of this rank whose phases are not run -> why."""
    layers = zip(module.dualpipe_layers, module.forward_funcs, strict=True)
    hooked = [number for number, layer in layers if isinstance(layer, Phased) and not runs_by_phases(layer)]
    return dict.fromkeys(hooked, "it has hooks, which phases would pass by")


def reads_micro_offset(module: PipelineModule) -> bool:
    """Whether a forward of the module may ask which micro-batch it is: one of its own, or `seed_layers`."""
    return getattr(type(module), "forward", None) is not PipelineModule.forward or module.seed_layers


def _runnable(view: PipelineModule) -> LayerFunction:
    """The stage as its chunk runs it: the view, its layers alone where its forward does no more than call them, or its
    only layer where that brings `overlapped_forward_backward`."""
    functions = view.forward_funcs
    if len(functions) == 1 and hasattr(type(functions[0]), _OVERLAPPED):
        return functions[0]
    return view if reads_micro_offset(view) or view.activation_checkpoint_interval > 0 else _Layers(view)


class _Layers:
    """Calls the layers of a stage one after another; PipelineModule's forward takes longer than a small layer."""

    def __init__(self, view: PipelineModule) -> None:
        self._view, self._first = view, view._local_start
        self._layers = tuple(view.forward_funcs)
        # Shared with the module that the user holds, who may hang something in later.
        self._hooks = hooks_of(view)

    def __call__(self, inputs: Nest) -> Nest:
        if any(self._hooks):
            return self._view(inputs)
        done = 0
        try:
            for layer in self._layers:
                inputs = layer(inputs)
                done += 1
        except Exception as error:
            if inputs is None and done:
                name = f"layer {self._first + done - 1} ({type(self._layers[done - 1]).__name__})"
                raise ConfigError(f"{name} has returned None, which the next one cannot take") from error
            raise
        return inputs


def params_of(functions: Iterable[LayerFunction]) -> set[nn.Parameter]:
    """Parameters of layers: modules, functions bound to one (a TiedLayerSpec's `forward_fn`), methods of one."""
    found: set[nn.Parameter] = set()
    for function in functions:
        parts = [function, getattr(function, "__self__", None)]
        if isinstance(function, partial):
            parts += [*function.args, *function.keywords.values(), function.func]
        for part in parts:
            if isinstance(part, nn.Module):
                found.update(part.parameters())
    return found
