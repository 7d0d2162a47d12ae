"""Random states that are put back are those of this rank alone; some layers are not cut apart."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from dualpipe_engine.engine.placing import partition
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement


@pytest.mark.parametrize(("kind", "devices"), [("cuda", [3]), ("cpu", [])])
def test_devices_of_other_ranks_are_left_alone(monkeypatch, kind, devices):
    """All ranks of a machine see all of its devices; to ask for the state of one makes a context on it."""
    asked = []
    accelerator = SimpleNamespace(device_name=lambda: kind, current_device=lambda: 3)
    monkeypatch.setattr(partition, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **given: asked.append(given) or nullcontext())
    with partition.same_random_state():
        pass
    assert asked == [{"devices": devices, "device_type": "cuda"}]


@pytest.mark.parametrize(
    ("name", "bounds", "kept"),
    [
        (BIDIRECTIONAL, [0, 2, 3, 5, 8], [0, 2, 3, 4, 8]),
        (BIDIRECTIONAL, [0, 2, 4, 7, 8], [0, 2, 3, 4, 8]),  # the stages before make room
        (BIDIRECTIONAL, [0, 2, 3, 4, 8], [0, 2, 3, 4, 8]),
        (VEE, [0, 2, 5, 6, 8], [0, 2, 3, 4, 8]),
        (LINEAR, [0, 2, 3, 5, 8], [0, 2, 3, 5, 8]),
    ],
)
def test_layers_that_want_the_next_one_are_not_cut_off(name, bounds, kept):
    layers = [SimpleNamespace(with_next=number in (4, 5, 6)) for number in range(8)]
    placement = Placement(name, 2 if name == VEE else 4)
    assert partition.kept_together(bounds, layers, placement) == kept


def test_too_few_layers_are_cut_as_they_were():
    layers = [SimpleNamespace(with_next=number > 1) for number in range(5)]
    assert partition.kept_together([0, 1, 2, 3, 5], layers, Placement(BIDIRECTIONAL, 4)) == [0, 1, 2, 3, 5]


class Wide(nn.Module):
    pass


class Narrow(nn.Module):
    pass


class Other(nn.Module):
    pass


def module_of(kinds, stages, method):
    """What of a PipelineModule its cut is made of; `method` None: a cut that no method makes."""
    layers = [LayerSpec(kind) for kind in kinds]
    module = SimpleNamespace(
        _layer_specs=layers, global_rank=0, _count_layer_params=lambda: [0] * (len(kinds) - 1) + [1]
    )
    module._find_layer_type = partial(PipelineModule._find_layer_type, module)
    module.parts = [0, 1, len(kinds)] if method is None else partition.cut_layers(module, stages, method)
    return module


def test_the_method_of_a_module_is_found_from_its_cut():
    """Also where it names several classes."""
    kinds = [Wide, Other, Wide, Other, Wide, Narrow, Wide, Narrow, Narrow, Other]
    module = module_of(kinds, 2, "type:wide|narrow")
    assert module.parts not in [partition.cut_layers(module, 2, f"type:{name}") for name in ("wide", "narrow", "other")]
    assert partition.cut_layers(module, 4, None) == partition.cut_layers(module, 4, "type:wide|narrow")


def test_a_cut_of_no_method_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(partition.logger, "warning", said.append)
    module = module_of([Other] * 8, 2, None)
    assert partition.cut_layers(module, 4, None) == partition.cut_layers(module, 4, "parameters")
    assert len(said) == 1 and '"partition_method" in the "pipeline" section' in said[0]


@pytest.mark.parametrize("method", ["type:Block", "type:("])
def test_a_type_of_no_layer_is_refused(method):
    with pytest.raises(ConfigError, match=r"finds no layer: .* names of their classes, which are Wide, Narrow"):
        partition.cut_layers(module_of([Wide, Narrow, Wide], 2, "uniform"), 2, method)
