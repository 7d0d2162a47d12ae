"""The quick start of the interface of DeepSeek's `dualpipe`: one training and one inference step, checked.

    python examples/example.py                  # all GPUs if there are two or more, else 4 CPU processes
    python examples/example.py --ranks 2 --chunks 7

Every process holds its two stages of a small float64 model. Losses must equal, bit for bit, those of one process that
runs the micro-batches in turn, and gradients to 1e-13.
"""

from __future__ import annotations

import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from dualpipe_engine import DualPipe, DualPipeV
from dualpipe_engine.compat.weight_grad_store import WeightGradStore, run_backward

HIDDEN, LENGTH, MICRO_BATCH = 64, 16, 3


class SplitLinear(torch.autograd.Function):
    """A linear layer whose weight gradient can wait. (`nn.Linear` does this by itself under `DualPipe`.)"""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors

        def weight_gradient():
            found = grad.flatten(0, -2).T @ x.flatten(0, -2)
            weight.grad = found if weight.grad is None else weight.grad + found

        if WeightGradStore.enabled:
            WeightGradStore.put(weight_gradient)
        else:
            weight_gradient()
        return grad @ weight, None


class Stage(nn.Module):
    """One pipeline stage: x `[batch, length, HIDDEN]` -> the same shape."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(F.gelu(SplitLinear.apply(x, self.up)))

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        """Where a forward and a backward run together; a real model interleaves their communication here."""
        outputs0 = module0(*inputs0)
        loss0 = criterion0(outputs0, *labels0) if criterion0 is not None else None
        if loss1 is not None:
            loss1.backward()
        else:
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


def sequential(model, x, y, chunks):
    """Losses `[chunks]` and outputs of one process; gradients stay in `model`."""
    losses, outputs = [], []
    for inputs, labels in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        output = model(inputs)
        loss = F.mse_loss(output, labels)
        loss.backward()
        losses.append(loss.detach())
        outputs.append(output.detach())
    return torch.stack(losses), torch.cat(outputs)


def run(name, rank, ranks, chunks):
    """Train and infer with one of the two classes; returns the largest relative error of a gradient of this rank."""
    torch.manual_seed(0)
    num_stages = ranks if name == "DualPipe" else 2 * ranks
    whole = nn.Sequential(*(Stage() for _ in range(num_stages)))
    x, y = torch.randn(2, chunks * MICRO_BATCH, LENGTH, HIDDEN).unbind()
    losses, outputs = sequential(whole, x, y, chunks)

    stages = (rank, num_stages - 1 - rank)
    mine = nn.ModuleList([Stage(), Stage()])
    for module, stage in zip(mine, stages, strict=True):
        module.load_state_dict(whole[stage].state_dict())

    # Which micro-batches enter here, and which leave: under DualPipe each end feeds half and gets the other half.
    entering = leaving = slice(0, chunks if rank == 0 else 0)
    if name == "DualPipe":
        halves = slice(0, (chunks + 1) // 2), slice((chunks + 1) // 2, chunks)
        nothing = slice(0, 0)
        entering = {0: halves[0], ranks - 1: halves[1]}.get(rank, nothing)
        leaving = {0: halves[1], ranks - 1: halves[0]}.get(rank, nothing)
    pipe = (DualPipe if name == "DualPipe" else DualPipeV)(mine)
    batch = {
        "num_chunks": chunks,
        "criterion": F.mse_loss,
        "labels": (torch.cat([*y.chunk(chunks)[leaving], y[:0]]),),
    }
    inputs = torch.cat([*x.chunk(chunks)[entering], x[:0]])

    loss, _ = pipe.step(inputs, **batch)
    assert loss is None or torch.equal(loss, losses[leaving]), "training losses differ"
    if name == "DualPipe":
        pipe.sum_mirrored_gradients()  # each stage has two copies
    errors = [
        float((param.grad - of.grad).norm() / of.grad.norm())
        for module, stage in zip(mine, stages, strict=True)
        for param, of in zip(module.parameters(), whole[stage].parameters(), strict=True)
    ]
    assert max(errors) < 1e-13, f"gradients differ by {max(errors):.1e}"

    with torch.no_grad():
        loss, output = pipe.step(inputs, **batch, return_outputs=True)
    assert loss is None or torch.equal(loss, losses[leaving]), "losses of inference differ"
    assert output is None or torch.equal(output, torch.cat(outputs.chunk(chunks)[leaving])), "outputs differ"
    return max(errors)


def work(rank, ranks, chunks, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    on_gpu = torch.cuda.device_count() >= ranks
    torch.set_default_dtype(torch.float64)
    if on_gpu:
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    for name in ("DualPipe", "DualPipeV"):
        start = time.perf_counter()
        error = torch.tensor(run(name, rank, ranks, chunks))
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        if rank == 0:
            print(
                f"{name} on {ranks} {'GPUs' if on_gpu else 'CPU processes'}, {chunks} micro-batches: "
                f"losses and outputs bit-equal to one process, gradients to {float(error):.0e} "
                f"({time.perf_counter() - start:.1f} s)",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count() // 2 * 2
    parser.add_argument("--ranks", type=int, default=gpus or 4, help="processes, an even number")
    parser.add_argument("--chunks", type=int, default=20, help="micro-batches of the step")
    args = parser.parse_args()
    if args.ranks < 2 or args.ranks % 2:
        parser.error(f"DualPipe needs an even number of ranks, got {args.ranks}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(args.ranks, args.chunks, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
