"""Plans made without measured costs."""

from types import SimpleNamespace

import pytest
from deepspeed.pipe import LayerSpec
from torch import nn

from dualpipe_engine.engine.plan import OVERLAPPED, make_lowered_plan, unmeasured_costs
from dualpipe_engine.engine.section import DualPipeConfig
from dualpipe_engine.schedule.timing.costs import UNIT


class WithPhases(nn.Linear):
    def phases(self):
        return []


class WithOverlap(nn.Linear):
    @classmethod
    def overlapped_forward_backward(cls, *args):
        raise NotImplementedError


@pytest.mark.parametrize("kind, expected", [(nn.Linear, UNIT), (WithPhases, OVERLAPPED), (WithOverlap, OVERLAPPED)])
@pytest.mark.parametrize("built", [False, True])
def test_layers_that_overlap_are_planned_so(kind, expected, built):
    layer = kind(2, 2) if built else LayerSpec(kind, 2, 2)
    module = SimpleNamespace(_layer_specs=[LayerSpec(nn.Linear, 2, 2), layer, len])
    assert unmeasured_costs(module, DualPipeConfig(schedule="dualpipe")) == expected
    assert unmeasured_costs(module, DualPipeConfig(schedule="dualpipe", overlap=False)) == UNIT


def test_pairs_survive_only_where_they_win():
    def pairs(costs):
        plan = make_lowered_plan(DualPipeConfig(schedule="dualpipe"), 8, 20, costs.for_placement)
        return sum(op.kind == "FB" for program in plan.programs for op in program)

    assert pairs(OVERLAPPED) > pairs(UNIT)
