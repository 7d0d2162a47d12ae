"""Checks of one process: gradients, host waits, memory, and the pair. They need no DeepSpeed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import CPU, DEVICE, ROOT, Facts, Run, synchronize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualpipe_engine.comm.tickets import Transfer
from dualpipe_engine.models.block import DenseBlock, MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.offload import Offload
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install
from dualpipe_engine.schedule.passes.offload import offload
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.timing.simulate import peak_activations

WIDTH = 64


class Layer(nn.Module):
    """One operation on weights of every kind that a layer may own."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.conv = nn.Linear(WIDTH, WIDTH), nn.Conv1d(4, 4, 3, padding=1)
        self.stack = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 8)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return x + self.run(self, x).tanh()


def _grouped(sizes: list[int]) -> Callable[[Any, Tensor], Tensor]:
    def run(layer: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        ends = torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)
        used = torch._grouped_mm(rows[: sum(sizes)].bfloat16(), layer.stack.bfloat16(), offs=ends)
        return torch.cat([used.to(x.dtype), torch.zeros_like(rows[sum(sizes) :])]).view_as(x)

    return run


def _force(layer: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        energy = torch.tanh(layer.linear(x)).pow(2).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


OPERATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda layer, x: layer.linear(x),
    "convolution": lambda layer, x: layer.conv(x),
    "einsum": lambda layer, x: torch.einsum("bnc,nce->bne", x, layer.stack),
    "bmm": lambda layer, x: torch.bmm(x.transpose(0, 1), layer.stack).transpose(0, 1),
    "matmul of a slice": lambda layer, x: F.linear(x, layer.linear.weight[:, : WIDTH // 2].repeat(1, 2)),
    "grouped, odd and empty": _grouped([5, 0, 17, 8]),
    "grouped, all in one": _grouped([0, 0, 32, 0]),
    "checkpoint": lambda layer, x: checkpoint(layer.linear, x, use_reentrant=False),
    "reentrant checkpoint": lambda layer, x: checkpoint(layer.linear, x, use_reentrant=True),
    "gradient in the forward": _force,
}
NEAR = {"gradient in the forward"}  #: of second derivatives the formulas are others than autograd's


def split(run: Run) -> Facts:
    """Gradients of I and W, and of a full backward through installed modules, are those of a plain backward."""
    torch.backends.cudnn.deterministic = True
    found: Facts = {}
    wrong = []
    for name, operation in OPERATIONS.items():
        for dtype in ("float32", "bfloat16", "autocast"):
            if name == "gradient in the forward" and dtype != "float32":
                continue
            plain = _gradients(operation, dtype, "plain")
            for how in ("split", "full"):
                for param, grad in _gradients(operation, dtype, how).items():
                    what = f"{name}, {dtype}, {how}: {param}"
                    if grad is plain[param] or torch.equal(grad, plain[param]):
                        continue
                    if name not in NEAR or not torch.allclose(grad, plain[param], rtol=1e-4, atol=1e-5):
                        wrong.append(f"{what} differs by {(grad - plain[param]).abs().max():.2g}")
            found[name] = "near" if name in NEAR else "bit-equal"
    plain, summed = (_gradients(OPERATIONS["linear"], "autocast", how) for how in ("plain", "main_grad"))
    error = (summed["0.linear.weight"] - plain["0.linear.weight"]).norm() / plain["0.linear.weight"].norm()
    if not error < 1e-2:
        wrong.append(f"main_grad is off by {error:.2g}")
    assert not wrong, "; ".join(wrong)
    return found | {"main_grad_error": float(error)}


def _gradients(operation: Any, dtype: str, how: str) -> dict[str, Any]:
    module = nn.Sequential(Layer(operation), Layer(operation)).to(DEVICE)
    if dtype == "bfloat16":
        module.bfloat16()
    store = DeferredWeightGrads()
    if how != "plain":
        install(module, store)
    if how == "main_grad":
        for param in module.parameters():
            param.main_grad = torch.zeros_like(param, dtype=torch.float32)  # type: ignore[attr-defined]
    torch.manual_seed(5)
    context = torch.autocast(DEVICE.type, torch.bfloat16) if dtype == "autocast" else nullcontext()
    for _ in range(2):
        x = torch.randn(8, 4, WIDTH, device=DEVICE, dtype=next(module.parameters()).dtype, requires_grad=True)
        with context:
            out = module(x)
        with store.defer() if how in ("split", "main_grad") else nullcontext():
            out.float().pow(2).sum().backward()
        for closure in store.take():
            closure()
    found = {"x": x.grad}
    for name, param in module.named_parameters():
        main = getattr(param, "main_grad", None)
        found[name] = main if main is not None and param.dim() > 1 else param.grad
    return found


SIZES = MoEConfig(
    hidden=WIDTH, heads=4, head=16, rotary=8, kv_rank=16, experts=4, top_k=2, expert_inner=64, dense_inner=64, blocks=1
)
LARGE = MoEConfig(
    hidden=1024, heads=8, head=128, rotary=64, kv_rank=256, experts=8, top_k=2, expert_inner=512, dense_inner=2048,
    blocks=1,
)  # fmt: skip


def host_waits(run: Run) -> Facts:
    """How often F, I, W and an F&B pair of a block hold the host: a dense one never, one of experts once at most."""
    found: dict[str, list[str]] = {}
    wrong = []
    for name, block, allowed in (("dense", DenseBlock(SIZES), 0), ("experts", MoEBlock(SIZES), 1)):
        chunk, inputs = _chunk(block)
        grads = [torch.ones_like(inputs)]

        def fresh(inputs: Tensor = inputs) -> Tensor:
            return inputs.detach().requires_grad_()

        def alone(chunk: Any = chunk, grads: Any = grads, fresh: Any = fresh) -> None:
            chunk.forward(0, fresh())
            chunk.input_backward(0, grads)
            chunk.weight_backward(0)

        def pair(chunk: Any = chunk, grads: Any = grads, fresh: Any = fresh) -> None:
            chunk.overlapped(1, fresh(), None, chunk, 0, grads, 1.0)

        alone()
        found[f"{name}, F I W"] = _waits(alone)
        chunk.forward(0, fresh())
        found[f"{name}, pair"] = _waits(pair)
        for what in (f"{name}, F I W", f"{name}, pair"):
            if not CPU and len(found[what]) > allowed:
                wrong.append(f"{what}: the host waits {len(found[what])} times, {allowed} are allowed: {found[what]}")
    assert not wrong, "; ".join(wrong)
    return {what: len(waits) for what, waits in found.items()}


def _waits(body: Callable[[], None]) -> list[str]:
    """Where operations hold the host, as torch sees them on CUDA; on the CPU those that would."""
    if CPU:
        from torch.utils._python_dispatch import TorchDispatchMode

        reads: list[str] = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.ops.aten._local_scalar_dense.default:
                    reads.append(str(func))
                return func(*args, **(kwargs or {}))

        with Count():
            body()
        return reads
    synchronize()
    places: list[str] = []

    def note(message: Any, *_: Any) -> None:
        if "called a synchronizing" in str(message):  # not what torch says of this mode itself
            frames = [each for each in traceback.extract_stack() if "dualpipe_engine" in each.filename][-3:]
            places.append(" < ".join(f"{Path(each.filename).name}:{each.lineno}" for each in reversed(frames)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            body()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def _chunk(block: Any, phased: bool = True) -> tuple[Any, Tensor]:
    config = block.config if hasattr(block, "config") else SIZES
    block.to(DEVICE, torch.float32 if CPU else torch.bfloat16)
    store = DeferredWeightGrads()
    install(block, store)
    shape = (2, 16, WIDTH) if CPU else (2, 1024, config.hidden)
    inputs = torch.randn(shape, device=DEVICE, dtype=next(block.parameters()).dtype)
    if phased:
        return PhasedChunk(block, 0, phases_of([block]), 60.0, is_last=False, store=store), inputs
    return StageChunk(block, 0, is_last=False, store=store), inputs


def memory(run: Run) -> Facts:
    """What a micro-batch keeps between F and its backward, by phases and plainly; after W all of it is free. On the CPU
    only that both ways give the same gradients."""
    slopes, grads, left = {}, {}, {}
    for way in ("plain", "phased"):
        torch.manual_seed(1)
        block = MoEBlock(SIZES if CPU else LARGE)
        chunk, inputs = _chunk(block, way == "phased")
        torch.manual_seed(2)
        outputs = [torch.randn_like(inputs)]

        def turn(micro: int, chunk: Any = chunk, outputs: Any = outputs) -> None:
            chunk.input_backward(micro, outputs)
            chunk.weight_backward(micro)

        chunk.forward(0, inputs.detach().requires_grad_())  # makes the gradients
        turn(0)
        before = _allocated()
        held = [before]
        for micro in range(8):
            chunk.forward(micro, inputs.detach().requires_grad_())
            chunk.release_outputs(micro)
            held.append(_allocated())
        for micro in range(8):
            turn(micro)
        left[way] = _allocated() - before
        slopes[way] = (held[-1] - held[1]) / 7
        grads[way] = {name: param.grad for name, param in block.named_parameters()}
    for name, grad in grads["plain"].items():
        torch.testing.assert_close(grads["phased"][name], grad, msg=f"gradient of {name}")
    if CPU:
        return {}
    ratio = slopes["phased"] / slopes["plain"]
    facts = {"bytes_of_a_micro_batch": slopes, "ratio": ratio, "left_after_w": left}
    assert ratio <= 1.05, f"phases keep {ratio:.2f} times what a plain forward keeps: {facts}"
    assert max(left.values()) <= 1 << 16, f"not all is free after W: {facts}"
    return facts


def _allocated() -> int:
    synchronize()
    return 0 if CPU else torch.cuda.memory_allocated()


def offloaded(run: Run) -> Facts:
    """Activations leave for host memory under the computation and come back: the same gradients to the last bit, in
    less memory of the device."""
    size = {"hidden": 64, "heads": 2, "head": 32} if CPU else {"hidden": 2048, "heads": 16, "head": 128}
    config = MoEConfig(**size, attention="grouped", dense_inner=4 * size["hidden"])
    torch.manual_seed(1)
    block = DenseBlock(config).to(DEVICE, torch.float32 if CPU else torch.bfloat16)
    tokens = (1, 256) if CPU else (2, 4096)
    plan = Plan.from_csv(
        "\n".join(",".join(f"{stage}{kind}{each}" for kind in "FB" for each in range(6)) for stage in (0, 1))
    )
    moved = offload(plan, True)
    results = {}
    for name, each in (("plain", plan), ("offloaded", moved), ("offloaded again", moved)):
        results[name] = _walk(block, each, (*tokens, size["hidden"]))
    plain, there, again = results.values()
    for found in (there, again):
        assert all(torch.equal(one, two) for one, two in zip(plain["made"], found["made"], strict=True))
    most = peak_activations(moved)[1] / peak_activations(plan)[1]
    facts = {
        name: {key: found[key] for key in ("bytes", "seconds", "copied", "waited", "hidden")}
        for name, found in results.items()
    }
    if not CPU:
        assert again["bytes"] < (most + 0.15) * plain["bytes"], facts
        assert again["hidden"] > 0, facts
    return facts


def _walk(block: nn.Module, plan: Plan, shape: tuple[int, ...]) -> dict[str, Any]:
    log: list[Transfer] = []
    moved = Offload(block, DEVICE, 60.0, log)
    moved.begin_batch(plan.programs[1])
    chunk = StageChunk(block, 1, is_last=False, offload=moved)
    made: list[Tensor] = []
    synchronize()
    origin = None if CPU else (time.monotonic(), torch.Event(DEVICE, enable_timing=True))
    if origin is not None:
        origin[1].record()
        torch.cuda.reset_peak_memory_stats()
    before, start = _allocated(), time.monotonic()
    for op in plan.programs[1]:
        if op.kind == "F":
            generator = torch.Generator(DEVICE).manual_seed(op.micro)
            x = torch.randn(shape, device=DEVICE, dtype=next(block.parameters()).dtype, generator=generator)
            made.append(chunk.forward(op.micro, x.requires_grad_()).sum())
            chunk.release_outputs(op.micro)
            moved.leave(1, op.micro)
            del x
        elif op.kind == "OFFLOAD":
            moved.let_go(1, op.micro)
        elif op.kind == "RELOAD":
            moved.bring_back(1, op.micro)
        else:
            moved.await_back(1, op.micro)
            grad = torch.ones(shape, device=DEVICE, dtype=next(block.parameters()).dtype)
            made += [back.sum() for back in chunk.backward(op.micro, [grad])]
    synchronize()
    seconds = time.monotonic() - start
    peak = 0 if CPU else torch.cuda.max_memory_allocated() - before
    made += [param.grad.clone() for param in block.parameters() if param.grad is not None]
    block.zero_grad()
    done = [each.resolved(origin) for each in log]
    return {
        "made": made,
        "bytes": peak,
        "seconds": round(seconds, 4),
        "copied": sum(each.size for each in done),
        "waited": round(sum(each.waited for each in done), 4),
        "hidden": round(sum(each.hidden for each in done), 4),
    }


def overlap(run: Run) -> Facts:
    """`examples/bench/overlap.py --cuda`: the pair against the longest of computation and communication."""
    script = ROOT / "examples" / "bench" / "overlap.py"
    done = subprocess.run([sys.executable, str(script), "--cuda"], capture_output=True, text=True)
    text = done.stdout + done.stderr
    if CPU:
        assert "needs a GPU" in text, text
        return {}
    assert done.returncode == 0, text[-2000:]
    ratios = ratios_of(text)
    assert ratios, f"no ratio in what the bench prints:\n{text[-2000:]}"
    assert max(ratios) <= 1.10, f"{text}\na pair takes {max(ratios):.3f} times the longest of its two parts"
    return {"pair_over_longest": ratios, "printed": done.stdout.splitlines()}


def ratios_of(text: str) -> list[float]:
    """The numbers that the bench calls "pair / longest ...": behind a colon, or in the last column of a table."""
    if found := re.findall(r"pair / long[^:|]*: *([\d.]+)", text):
        return [float(each) for each in found]
    rows = text[max(0, text.find("pair / long")) :].splitlines()[2:]
    return [float(row.split("|")[-2]) for row in rows if re.search(r"\| *[\d.]+ *\|$", row)]
