""" "auto" under bf16 leaves the dtypes of buffers to DeepSpeed, a start from its file trains alike, and W is measured
with the sums that the optimizer keeps."""

from __future__ import annotations

import copy

import moe_runs
import pytest
import torch
import training
from deepspeed.runtime.config import DeepSpeedConfig

import dualpipe_engine
from dualpipe_engine.engine.auto.stage_probe import _Adding, _sums_of


def started(path, steps=3):
    """A start under the file `path`, with routers whose bias moves by steps that bf16 cannot add up."""
    model = moe_runs.config(blocks=2, expert_parallel=1, bias_rate=0.001)
    module = moe_runs.make_module(model, 2, 1)
    moe_runs.set_routing(module, [0.5, 0.25, 0.0, -0.5])
    settings = training.settings(2, 1, 1, "bf16", schedule="auto", costs=str(path))
    engine, *_ = dualpipe_engine.initialize(
        model=module, config=copy.deepcopy(settings), training_data=moe_runs.Tokens(8)
    )
    data = training.stream(0)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    engine.watch.close()
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    return {"losses": losses, "buffers": buffers, "weights": training.weights(engine), "plan": engine.plan.digest()}


def test_the_second_start_trains_as_the_first(ranks, tmp_path):
    first, second = (ranks.run(2, started, path=tmp_path / "costs.json") for _ in range(2))
    for mine, again in zip(first, second, strict=True):
        assert mine["plan"] == again["plan"] and mine["losses"] == again["losses"]
        assert mine["buffers"].keys() == again["buffers"].keys()
        for name, buffer in mine["buffers"].items():
            assert buffer.dtype == again["buffers"][name].dtype, name
            assert torch.equal(buffer, again["buffers"][name]), name
        for name, value in mine["weights"].items():
            assert torch.equal(value, again["weights"][name]), name
    dtypes = {buffer.dtype for rank in first for name, buffer in rank["buffers"].items() if name.endswith("bias")}
    assert dtypes == {torch.float32}


def cast(kind):
    """Before the probe: dtypes of a module's parameters, of a buffer of the user's, and of those of routers."""
    from dualpipe_engine.engine.auto.choose import _cast

    module = moe_runs.make_module(moe_runs.config(blocks=1, expert_parallel=1), 1, 1)
    module.register_buffer("users", torch.zeros(2))
    settings = training.settings(2, 1, 1, "bf16") | {"data_types": {} if kind is None else {"buffer_dtype": kind}}
    _cast(module, DeepSpeedConfig(settings, module._grid), torch.bfloat16)
    parameters = {param.dtype for param in module.parameters()}
    buffers = {name: buffer.dtype for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return parameters, buffers.pop("users"), set(buffers.values())


def test_buffers_are_cast_where_the_configuration_asks(ranks):
    assert ranks.run(1, cast, kind=None) == [({torch.bfloat16}, torch.float32, {torch.float32})]
    assert ranks.run(1, cast, kind="bf16") == [({torch.bfloat16}, torch.bfloat16, {torch.float32})]


def sums(precision, zero, accumulated):
    """Of what dtype the probe takes the optimizer's sums to be, and of what dtype they are; None: there are none."""
    from dualpipe_engine.engine.auto.choose import _sums

    settings = training.settings(2, 1, zero, precision)
    settings["data_types"] = {} if accumulated is None else {"grad_accum_dtype": accumulated}
    module = training.make_module(1, 2)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.half}.get(precision)
    expected = _sums(DeepSpeedConfig(settings, module._grid), dtype)
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(settings))
    optimizer, kept = engine.optimizer, None
    if getattr(optimizer, "use_grad_accum_attribute", False):
        kept = optimizer.gradient_accumulation_dtype
    elif hasattr(optimizer, "fp32_groups_gradients"):
        kept = optimizer.fp32_groups_gradients[0][0].dtype
    engine.destroy()
    return expected, kept


@pytest.mark.parametrize(
    ("precision", "zero", "accumulated"),
    [
        ("fp32", 0, None),
        ("fp32", 1, None),
        ("bf16", 0, None),
        ("bf16", 1, "fp32"),
        ("bf16", 1, None),
        ("fp16", 1, "fp32"),
    ],
)
def test_the_probe_knows_the_sums_of_the_optimizer(ranks, precision, zero, accumulated):
    [(expected, kept)] = ranks.run(1, sums, precision=precision, zero=zero, accumulated=accumulated)
    assert expected == kept


def test_the_probe_adds_to_the_sums():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    [(_, total)] = added = _sums_of(torch.nn.ParameterList([param]), torch.float32)
    for _ in range(2):
        param.grad = torch.full_like(param, 1 / 256)
        _Adding(added).accumulate(0)
    assert param.grad is None and torch.equal(total, torch.full((3,), 2 / 256))
