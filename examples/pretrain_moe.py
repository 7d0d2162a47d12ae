"""Train a byte-level mixture-of-experts transformer on text, its experts shared by two replicas of the pipeline.

Started by `quickstart.sh --model moe`, or by hand:

    deepspeed --num_accelerators 4 examples/pretrain_moe.py --deepspeed_config examples/moe.json --schedule dualpipe
"""

from __future__ import annotations

from typing import Any

from training import parse_arguments, run

from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.routing import Router
from dualpipe_engine.models.transformer import layers, loss

REPLICAS = 2


def loads(engine: Any) -> list[tuple[str, str]]:
    """How even the experts of this rank's blocks were used in the last step."""
    found = [part.load for part in engine.module.modules() if isinstance(part, Router)]
    text = ", ".join(f"{float(load.max() / load.mean()):.2f}" for load in found if load.any())
    return [("busiest expert over the mean, blocks of rank 0", text)] if text else []


def main() -> None:
    args = parse_arguments(__doc__, blocks=6)
    config = MoEConfig(blocks=args.blocks, expert_parallel=REPLICAS, bias_rate=0.01)
    run(args, lambda replica: layers(config, replica), loss, REPLICAS, "moe-", loads)


if __name__ == "__main__":
    main()
