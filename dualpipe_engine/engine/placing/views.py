"""Views: a placed module as each of its stages."""

from __future__ import annotations

from collections.abc import Mapping

from deepspeed.pipe import PipelineModule

from ...errors import ConfigError
from ...runtime.weight_grad import Forward
from ..given import EngineAttribute
from .module import PlacedModule

#: What a view has of its own; all else is the module's, whoever reads or writes it. The module's `forward` may be one
#: of `runtime.weight_grad.install`, which is bound to it.
_OWN = frozenset(
    (
        "forward",
        "forward_funcs",
        "_local_start",
        "_local_stop",
        "is_checkpointable_results",
        "is_checkpointable_results_interval",
        "micro_offset",
    )
)
_TABLES = frozenset(("_parameters", "_buffers", "_modules"))  #: the same objects, which nn.Module takes from `__dict__`
_OF = "dualpipe_view_of"


class _View(PipelineModule):
    """A placed module whose forward runs the layers of one stage."""

    def __getattribute__(self, name: str) -> EngineAttribute:
        if name not in _OWN:
            shared = vars(object.__getattribute__(self, "__dict__")[_OF])
            if name in shared:
                return shared[name]
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(vars(self)[_OF], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)[_OF], name)


def refuse_own_forward(module: PipelineModule) -> None:
    """Refuse a forward that the object has in place of its class's: it would run whole ranks, not stages.

    Raises:
        ConfigError: there is one.
    """
    own = vars(module).get("forward")
    if own is not None and not isinstance(own, Forward):
        raise ConfigError(
            "the forward of this PipelineModule was replaced on the object, which cannot run it once a stage: override "
            "forward in a class, class Mine(PipelineModule)"
        )


def stage_views(module: PlacedModule) -> dict[int, PipelineModule]:
    """One callable module for each stage of this rank; they share parameters and attributes with `module`.

    A view has its own list of layers, so the PipelineModule's own forward (activation checkpointing, seeds, a user's
    override) runs unchanged for each stage.
    """
    views, kind = {}, type(module)
    for stage in module.dualpipe_place.stages:
        view = kind.__new__(kind)
        view.__dict__ |= {name: value for name, value in vars(module).items() if name in _OWN | _TABLES}
        view.__dict__[_OF] = module
        view.__class__ = type(kind.__name__, (_View, kind), {"__module__": kind.__module__})
        views[stage] = view
    renew_views(module, views)
    return views


def renew_views(module: PlacedModule, views: Mapping[int, PipelineModule]) -> None:
    """Give each view the layers of its stage, and have it ask anew which of them are checkpointed."""
    for stage, view in views.items():
        start, stop = module.parts[stage], module.parts[stage + 1]
        numbered = zip(module.dualpipe_layers, module.forward_funcs, strict=True)
        view.forward_funcs = [function for number, function in numbered if start <= number < stop]
        view._local_start, view._local_stop = start, stop
        view.is_checkpointable_results, view.is_checkpointable_results_interval = [], None
        view._precompute_checkpointable_values()
