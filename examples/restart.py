"""Training that goes on from its last checkpoint when it is started again; restart.sh takes a rank away from it.

The data of a step depend on the step alone, so a run that was interrupted sees what it would have seen.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.utils import logger
from gpt import layers, loss
from text import Windows, read_folder
from torch.utils.data import DataLoader

import dualpipe_engine
from dualpipe_engine.schedule.plain_json import read_settings

LENGTH = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="results and checkpoints; a run in it goes on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--lose-rank", type=int, default=-1, help="kill this rank, unless the run goes on from before")
    parser.add_argument("--lose-at", type=int, default=0, help="after so many steps")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON")
    return parser.parse_args()


def batch_of_step(text: np.ndarray, step: int, engine: Any) -> Iterator[Any]:
    """The micro-batches of one step; both ends of a pipeline read the same ones, replicas read others."""
    micro, count = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    seed = step * engine.data_replicas + engine.data_rank
    return iter(DataLoader(Windows(text, LENGTH, micro * count, seed), batch_size=micro))


def main() -> None:
    args = parse_arguments()
    logger.setLevel("ERROR")
    settings = read_settings(args.deepspeed_config)
    settings["steps_per_print"] = None
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(1)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    module = PipelineModule(layers(2 * ranks, hidden=32, heads=2, length=LENGTH), num_stages=ranks, loss_fn=loss)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    checkpoints, text = args.folder / "checkpoint", read_folder(None)
    resumed = (checkpoints / "latest").is_file()
    if resumed:
        engine.load_checkpoint(str(checkpoints))
        if rank == 0:
            print(f"goes on from the checkpoint after {engine.global_steps} steps", flush=True)
    with open(args.folder / "losses.jsonl", "a") as log:
        while engine.global_steps < args.steps:
            step = engine.global_steps
            if rank == args.lose_rank and step == args.lose_at and not resumed:
                print(f"rank {rank} is killed after {step} steps", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            found = float(engine.train_batch(batch_of_step(text, step, engine)))
            if rank == 0:
                log.write(json.dumps({"step": step, "loss": found}) + "\n")
                log.flush()
            if engine.global_steps % args.save_every == 0:
                engine.save_checkpoint(str(checkpoints))


if __name__ == "__main__":
    main()
