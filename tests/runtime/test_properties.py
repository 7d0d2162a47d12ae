"""Properties of the executor: random plans and random stages, on threads, against micro-batches run one by one.

HYPOTHESIS_PROFILE=long runs 10,000 examples of each.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_executor import ListFeed, check_against_oracle, make_stages, mean_square, run_plan
from torch import nn

from dualpipe_engine.schedule.orders.registry import SCHEDULES, placement_of
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel

WIDTH = 3


class Plain(nn.Module):
    """A tensor in, a tensor out, whatever the nest; the rest travels on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        x, rest = (value[0], value[1:]) if isinstance(value, tuple) else (value, ())
        x = torch.tanh(self.linear(x))
        return (x, *rest) if rest else x


class Opens(Plain):
    """Passes on what later stages may use: a bool mask, indices, a second float, a plain value and a dict."""

    def forward(self, value):
        x = super().forward(value)
        x = x[0] if isinstance(x, tuple) else x
        return x, x > 0, torch.arange(len(x)), x.cumsum(0), 3, {"scale": x.mean(0)}


class Closes(Plain):
    """Uses some of it and drops the rest: outputs of the stage before get no gradient."""

    def forward(self, value):
        if not isinstance(value, tuple):
            return super().forward(value)
        x, *rest = value
        if len(rest) == 5:
            mask, index, other, number, named = rest
            x = (x * mask)[index] + other / number + named["scale"]
        return torch.tanh(self.linear(x))


class Twice(Plain):
    """The same tensor at two places of the nest."""

    def forward(self, value):
        x = super().forward(value)
        x = x[0] if isinstance(x, tuple) else x
        return x, x


class Joins(Plain):
    """Adds up all floats of the same shape."""

    def forward(self, value):
        parts = value if isinstance(value, tuple) else (value,)
        same = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point() and p.shape == parts[0].shape]
        return torch.tanh(self.linear(torch.stack(same).sum(0)))


class NoWeights(nn.Module):
    def forward(self, value):
        return (value[0] * 0.5, *value[1:]) if isinstance(value, tuple) else value * 0.5


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


KINDS = [Plain, Opens, Closes, Twice, Joins, NoWeights, Frozen]


class Last(nn.Module):
    """The last stage's output is one tensor."""

    def __init__(self, stage):
        super().__init__()
        self.stage, self.linear = stage, nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        value = self.stage(value)
        return self.linear(value[0] if isinstance(value, tuple) else value)


@st.composite
def jobs(draw):
    schedule, ranks = draw(st.sampled_from(SCHEDULES)), draw(st.sampled_from([2, 4]))
    micros, optimize = draw(st.integers(1, 9)), draw(st.booleans())
    costs = CostModel(fb=draw(st.floats(1.5, 3.0))).for_placement(placement_of(schedule, ranks))
    plan = lower(make_plan(schedule, ranks, micros, costs, optimize))
    stages = plan.placement.num_stages
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=stages, max_size=stages))
    return plan, kinds, draw(st.booleans()), draw(st.booleans())


@given(jobs())
def test_any_plan_on_any_stages_equals_one_process(job):
    plan, kinds, split, dynamic = job

    def make(stage):
        made = kinds[stage]()
        return Last(made) if stage == len(kinds) - 1 else made

    originals, copies = make_stages(plan.placement, make)
    generator = torch.Generator().manual_seed(plan.num_micro)
    rows = [2 + (micro % 3 if dynamic else 0) for micro in range(plan.num_micro)]
    inputs = [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for n in rows]
    feed = ListFeed(inputs, [-x for x in inputs])
    results, _ = run_plan(plan, copies, mean_square, feed, split=split, dynamic=dynamic)
    for original in originals:  # what no backward reaches has no gradient in the oracle
        for param in original.parameters():
            param.grad = torch.zeros_like(param)
    for held in copies:
        for module in held.values():
            for param in module.parameters():
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    check_against_oracle(plan, originals, copies, mean_square, feed, results)
