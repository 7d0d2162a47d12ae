"""Train a small Hugging Face model, built from a configuration, under DualPipe.

    python examples/transformer_example.py --num-gpus 2        # CPU processes where there are no GPUs
    python examples/transformer_example.py --num-gpus 4 --model gpt2 --schedule dualpipev

Needs the extra: pip install "dualpipe_engine[hf]"
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import torch
import torch.multiprocessing as mp

MODELS = ("llama", "gpt2", "qwen3", "mixtral")


def make_model(name: str, blocks: int) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": blocks, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 128, "num_key_value_heads": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=blocks, n_head=4, n_positions=64),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, head_dim=16),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_local_experts=4),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[name]())


def batches(size: int, length: int = 32) -> Any:
    """Endless micro-batches of arithmetic sequences of bytes, which a model can learn; the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    while True:
        start, step = (torch.randint(1, 16, (size, 1), generator=generator) for _ in range(2))
        tokens = (start + step * torch.arange(length)) % 256
        yield {"input_ids": tokens}, tokens


def train(rank: int, args: argparse.Namespace, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.num_gpus))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from rich.progress import track

    import dualpipe_engine
    from dualpipe_engine.adapters import get_model_adapter

    deepspeed.init_distributed(verbose=False)
    adapter = get_model_adapter(make_model(args.model, args.blocks))
    module = PipelineModule(adapter.to_layer_specs(), num_stages=args.num_gpus, loss_fn=adapter.loss_fn)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": args.micro_batches,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": None,
        "pipeline": {"schedule": args.schedule},
    }
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    data = batches(4)
    losses = [
        float(engine.train_batch(data))
        for _ in track(range(args.steps), f"{args.model}, {args.schedule}", disable=rank != 0)
    ]
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-gpus", type=int, default=2, help="pipeline ranks, one process each (default 2)")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks (default 8)")
    parser.add_argument("--schedule", default="dualpipe", help="default: dualpipe")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default 8)")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if torch.cuda.device_count() < args.num_gpus:
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(train, (args, port), args.num_gpus)


if __name__ == "__main__":
    main()
