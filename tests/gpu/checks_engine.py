"""Checks of the engine on ranks that share the one GPU, over gloo."""

from __future__ import annotations

import copy
import importlib
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import CPU, DEVICE, Facts, Run, asleep, together

SIZES = {"vocabulary": 64, "hidden": 32, "heads": 2, "head": 16, "rotary": 8, "kv_rank": 16, "dense_inner": 64}
MOE = SIZES | {"expert_inner": 32, "experts": 4, "shared_experts": 1, "expert_parallel": 2, "bias_rate": 0.05}
LENGTH, MICRO, RATE = 16, 2, 1e-3


def _settings(schedule: str, micros: int, zero: int = 1, precision: str = "fp32", **pipeline: Any) -> Facts:
    found: Facts = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": micros,
        "optimizer": {"type": "Adam", "params": {"lr": RATE, "adam_w_mode": False, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "steps_per_print": None,
        "pipeline": {"schedule": schedule, "p2p_timeout_s": 60.0} | pipeline,
    }
    if precision == "bf16":
        found |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return found


class Rows:
    """Tokens and the tokens after them."""

    def __init__(self, rows: int = 64, seed: int = 3, length: int = LENGTH) -> None:
        self._rows = torch.randint(0, 64, (rows, length + 1), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index, :-1], self._rows[index, 1:]


def stream(replica: int = 0, length: int = LENGTH) -> Any:
    """Micro-batches without end."""
    rows, at = Rows(seed=3 + replica, length=length), 0
    while True:
        chosen = [rows[(at + each) % len(rows)] for each in range(MICRO)]
        at += MICRO
        yield torch.stack([x for x, _ in chosen]), torch.stack([y for _, y in chosen])


def start(config: Facts, model: Facts, ranks: int, replicas: int = 1, data: Any = None) -> tuple[Any, int]:
    """An engine, and the replica of this rank."""
    import dualpipe_engine

    module, replica = build(model, ranks, replicas)
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config), training_data=data)
    return engine, replica


def build(model: Facts, ranks: int, replicas: int = 1) -> tuple[Any, int]:
    """A PipelineModule, and the replica of this rank."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    from dualpipe_engine.models.config import MoEConfig
    from dualpipe_engine.models.transformer import layers, loss

    # It takes the group that is there. Its op for shared memory takes half a minute to build, and nobody uses it here.
    with patch.object(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None):
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    topology = PipeDataParallelTopology(ranks, replicas)
    replica = topology.get_coord(torch.distributed.get_rank()).data
    torch.manual_seed(7)
    return PipelineModule(layers=layers(MoEConfig(**model), replica), topology=topology, loss_fn=loss), replica


def train(config: Facts, model: Facts, ranks: int, replicas: int = 1, steps: int = 2, slow: bool = False) -> Facts:
    """Losses, weights before and after, and the number of process groups by step."""
    engine, replica = start(config, model, ranks, replicas)
    before = _weights(engine)
    data, losses, groups = stream(replica), [], []
    if slow:
        _slow_down(engine)
    for _ in range(steps):
        losses.append(float(engine.train_batch(data)))
        groups.append(len(torch.distributed.distributed_c10d._world.pg_map))
    after = _weights(engine)
    schedule = engine.plan.schedule
    engine.watch.close()
    return {"losses": losses, "before": before, "after": after, "groups": groups, "schedule": schedule}


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().float().cpu().clone() for name, param in engine.module.named_parameters()}


def many(configs: list[Facts], **arguments: Any) -> list[Facts]:
    """Several trainings, one after the other, by the same processes: imports and CUDA contexts are dear."""
    return [train(config, **arguments) for config in configs]


def _slow_down(engine: Any) -> None:
    """Let reductions, and what they read, come late on the device."""
    lane = engine._tail.reduction._side_stream
    behind, post = lane.behind, lane.post

    def late_behind(tensors: Any) -> Any:
        asleep(2.0)
        return behind(tensors)

    def late_post(*arguments: Any) -> None:
        with behind(()):
            asleep(5.0)
        post(*arguments)

    lane.behind, lane.post = late_behind, late_post


def untagged(run: Run) -> Facts:
    """On a backend without tags, as NCCL is one: groups are made, all edges are used, and the training is the same."""
    grid = ((2, 1),) if CPU else ((2, 1), (3, 1), (4, 1), (2, 2))
    model = SIZES | {"blocks": 4, "dense_blocks": 4}
    calls = [
        partial(
            run, ranks * replicas, train, options={"backend": backend, "device": "cpu"}, ranks=ranks, replicas=replicas,
            config=_settings("dualpipev" if ranks % 2 else "dualpipe", 2 * ranks), model=model,
        )
        for ranks, replicas in grid
        for backend in ("gloo", "cpu:gloo")
    ]  # fmt: skip
    results, found = together(calls), {}
    for at, (ranks, replicas) in enumerate(grid):
        tagged, bare = ([rank["losses"] for rank in each] for each in results[2 * at : 2 * at + 2])
        assert tagged == bare, f"{ranks} x {replicas} ranks: {tagged} with tags, {bare} without"
        found[f"{ranks} x {replicas}"] = bare[0]
    return found


def reductions(run: Run) -> Facts:
    """Under the tail of the schedule, with the device late, they give what DeepSpeed's own reduction after the schedule
    gives; of ZeRO-2, which has none that knows of several stages, nearly that of ZeRO-1."""
    found, stages = {}, (1,) if CPU else (0, 1, 2)
    grid = [{"zero": min(zero, 1) if after else zero, "after": after} for zero in stages for after in (False, True)]
    results = together([partial(run, 2, _reduced, **each) for each in grid])
    for at, zero in enumerate(stages):
        ours, plain = results[2 * at : 2 * at + 2]
        for mine, theirs in zip(ours, plain, strict=True):
            assert mine["losses"] == theirs["losses"], f"ZeRO-{zero}: {mine['losses']} and {theirs['losses']}"
            for name, value in mine["after"].items():
                bounds = {"rtol": 0.0, "atol": 0.0} if zero < 2 else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(value, theirs["after"][name], msg=f"ZeRO-{zero}: {name}", **bounds)
        found[f"ZeRO-{zero}"] = ours[0]["losses"]
    return found


def _reduced(zero: int, after: bool) -> Facts:
    from dualpipe_engine.engine.reduction import tail
    from dualpipe_engine.engine.reduction.after_schedule import AfterSchedule

    model = SIZES | {"blocks": 2, "dense_blocks": 2}
    config = _settings("dualpipe", 3, zero)
    if not after:
        return train(config, model, ranks=2, slow=True)
    with patch.object(tail, "choose_reduction", AfterSchedule):
        return train(config, model, ranks=2)


SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev", "zbv")


def schedules(run: Run) -> Facts:
    """Losses are those of one process, in fp32 under ZeRO-1 and in bf16 under ZeRO-2; copies of weights stay equal."""
    ranks, names = (2, ("dualpipe",)) if CPU else (4, SCHEDULES)
    model = SIZES | {"blocks": 2 * ranks, "dense_blocks": 2 * ranks}
    kinds = [("fp32", 1)] if CPU else [("fp32", 1), ("bf16", 2)]
    configs = [
        _settings(name, 2 * ranks, zero, precision, check_twins=1) for name in names for precision, zero in kinds
    ]
    results = run(ranks, many, configs=configs, model=model, ranks=ranks)
    wrong = []
    start_weights = {name: value for rank in results for name, value in rank[0]["before"].items()}
    want, found = _one_process(model, start_weights, 2 * ranks, steps=2), {}
    for index, config in enumerate(configs):
        name, low = config["pipeline"]["schedule"], "bf16" in config
        got = results[0][index]["losses"]
        bound = 1e-2 if low else 1e-5
        error = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
        what = f"{name}, {'bf16' if low else 'fp32'}"
        if error > bound:
            wrong.append(f"{what}: losses {got}, of one process {want}")
        found[what] = error
    assert not wrong, "; ".join(wrong)
    return {"relative_errors": found, "losses": want}


def _one_process(model: Facts, weights: dict[str, torch.Tensor], micros: int, steps: int) -> list[float]:
    from dualpipe_engine.models.config import MoEConfig
    from dualpipe_engine.models.transformer import layers, loss

    net = torch.nn.Sequential(*(spec.build() for spec in layers(MoEConfig(**model))))
    net.load_state_dict({name: value for name, value in weights.items() if "." in name}, strict=False)
    assert {name for name, _ in net.named_parameters()} <= set(weights), "weights are missing"
    net.to(DEVICE)
    optimizer, data, found = torch.optim.Adam(net.parameters(), lr=RATE), stream(), []
    for _ in range(steps):
        losses = []
        for _ in range(micros):
            inputs, labels = (each.to(DEVICE) for each in next(data))
            value = loss(net(inputs), labels)
            (value / micros).backward()
            losses.append(float(value.detach()))
        optimizer.step()
        optimizer.zero_grad()
        found.append(sum(losses) / micros)
    return found


def experts(run: Run) -> Facts:
    """Experts that two replicas share train on the GPU as on the CPU, and no step makes a process group."""
    model = MOE | {"blocks": 2 if CPU else 4}
    ranks = 1 if CPU else 2
    configs = [_settings("1f1b" if CPU else "dualpipe", 2 if CPU else 4)]
    arguments = {"configs": configs, "model": model, "ranks": ranks, "replicas": 2, "steps": 3}
    devices = ("cuda",) if CPU else ("cuda", "cpu")
    calls = [partial(run, 2 * ranks, many, options={"device": device}, **arguments) for device in devices]
    results = together(calls)
    here, there = results[0], results[-1]
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(
            torch.tensor(mine[0]["losses"]), torch.tensor(theirs[0]["losses"]), rtol=1e-4, atol=1e-6
        )
        assert len(set(mine[0]["groups"])) == 1, f"process groups by step: {mine[0]['groups']}"
    return {"losses": here[0][0]["losses"], "groups": here[0][0]["groups"][-1]}


def auto(run: Run) -> Facts:
    """`auto` changes nothing in the model, trains as a start from its file does, and measures what events measure."""
    ranks = run(2, _by_auto)
    for found in ranks:
        measured, from_file = found["losses"]  # sums of rows are made in any order on a GPU
        torch.testing.assert_close(torch.tensor(measured), torch.tensor(from_file), rtol=0.0 if CPU else 1e-2, atol=0.0)
    ratios = {}
    for kind, rank in (("F", 1), ("I", 1), ("W", 0)):  # while these run, the other rank leaves the GPU alone
        ratios[kind] = ranks[rank]["costs"][kind] / ranks[rank]["events"][kind]
        assert CPU or abs(ratios[kind] - 1) <= 0.15, (
            f"{kind} was measured {ratios[kind]:.2f} times as long as its events say: {ranks[rank]}"
        )
    return {"schedule": ranks[0]["schedule"], "measured_over_events": ratios}


def _by_auto() -> Facts:
    """On each rank: two starts of `auto`, the second from the file of the first; and the seconds of its stage's ops."""
    model = MOE | {"blocks": 2, "expert_parallel": 1}
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.broadcast_object_list(shared := [folder])
        found = [_start_auto(model, str(Path(shared[0], "costs.json"))) for _ in range(2)]
        torch.distributed.barrier()
    assert found[0]["dtypes"] == found[1]["dtypes"], f"dtypes of buffers: {found}"
    return _stage_seconds() | {"losses": [each["losses"] for each in found], "schedule": found[0]["schedule"]}


def _start_auto(model: Facts, path: str) -> Facts:
    """A start and three steps."""
    from dualpipe_engine.engine.auto import choose as measuring

    plain, same = measuring.probe_stages, []

    def watched(*arguments: Any, **options: Any) -> Any:
        before = _random_states()
        costs = plain(*arguments, **options)
        same.append(all(torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True)))
        return costs

    with patch.object(measuring, "probe_stages", watched):
        engine, replica = start(_settings("auto", 4, 1, "bf16", costs=path), model, 2, data=Rows())
    assert all(same), "random states have changed"
    dtypes = {name: str(buffer.dtype) for name, buffer in engine.module.named_buffers()}
    data = stream(replica)
    losses = [float(engine.train_batch(data)) for _ in range(3)]
    engine.watch.close()
    return {"dtypes": dtypes, "losses": losses, "schedule": engine.plan.schedule}


def _stage_seconds() -> Facts:
    """Of F, I and W of this rank's stage: as `auto` measures them, and the median of events of a training. One
    micro-batch, so that the ranks take turns on the device that they share."""
    import dualpipe_engine
    from dualpipe_engine.engine.auto.stage_probe import probe_stages
    from dualpipe_engine.engine.placing.grid import Place
    from dualpipe_engine.schedule.placement import LINEAR, Placement

    # On a GPU so much that the device is what takes the time.
    wide = {} if CPU else {"hidden": 4096, "heads": 16, "head": 128, "expert_inner": 2048}
    length, rank = LENGTH if CPU else 8192, torch.distributed.get_rank()
    module, replica = build(MOE | wide | {"blocks": 2, "expert_parallel": 1}, 2)
    for param in module.parameters():
        param.data = param.data.bfloat16()
    data, place = stream(replica, length), Place(module._grid.topology(), Placement(LINEAR, 2), rank)
    costs = probe_stages(
        module, place, data.__next__, 1, device=DEVICE, split_backward=True, overlap=False, timeout_s=60.0,
        sums=torch.float32,
    )  # fmt: skip
    engine, *_ = dualpipe_engine.initialize(model=module, config=_settings("zb1p", 1, 1, "bf16"))
    times: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for step in range(2 if CPU else 6):
        engine.train_batch(data)
        for span in engine.timeline().spans if step else ():
            if span.op.kind in times and span.op.stage == rank:
                times[span.op.kind].append(span.end - span.start)
    engine.watch.close()
    events = {kind: median(seconds) for kind, seconds in times.items()}
    return {"events": events, "costs": {"F": costs.f[rank], "I": costs.i[rank], "W": costs.w[rank]}}


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([] if CPU else [torch.cuda.get_rng_state()])
