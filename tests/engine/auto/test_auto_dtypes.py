""" "auto" under bf16 leaves the dtypes of buffers to DeepSpeed, and a start from its file trains alike."""

from __future__ import annotations

import copy

import moe_runs
import torch
import training


def started(path, steps=3):
    """A start under the file `path`, with routers whose bias moves by steps that bf16 cannot add up."""
    import dualpipe_engine

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
    _cast(module, settings, torch.bfloat16)
    parameters = {param.dtype for param in module.parameters()}
    buffers = {name: buffer.dtype for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    return parameters, buffers.pop("users"), set(buffers.values())


def test_buffers_are_cast_where_the_configuration_asks(ranks):
    assert ranks.run(1, cast, kind=None) == [({torch.bfloat16}, torch.float32, {torch.float32})]
    assert ranks.run(1, cast, kind="bf16") == [({torch.bfloat16}, torch.bfloat16, {torch.float32})]
