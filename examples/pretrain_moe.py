"""Train a small DeepSeek-V3 on bytes of text, its experts shared by two replicas of the pipeline.

It has what the large one has: latent attention, groups of experts, biases and a sequence-wise loss that keep loads
even, and one block more that predicts the byte after the next.

Started by `quickstart.sh --model moe`, or by hand:

    deepspeed --num_accelerators 4 examples/pretrain_moe.py --deepspeed_config examples/moe.json --schedule dualpipe
"""

from __future__ import annotations

from functools import partial
from typing import Any

from training import expert_loads, parse_arguments, run

from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.transformer import layers, loss

REPLICAS = 2
MTP_WEIGHT = 0.3


def rows(engine: Any) -> list[tuple[str, str]]:
    what = f"with {MTP_WEIGHT} x that of the byte after the next; held out: of the next byte"
    return [("losses in training", what), *expert_loads(engine)]


def main() -> None:
    args = parse_arguments(__doc__, blocks=6)
    config = MoEConfig(
        blocks=args.blocks,
        dense_blocks=1,
        q_rank=64,
        groups=4,
        kept_groups=2,
        expert_parallel=REPLICAS,
        bias_rate=0.01,
        sequence_loss=1e-4,
        mtp_depth=1,
    )
    run(args, lambda replica: layers(config, replica), partial(loss, mtp_weight=MTP_WEIGHT), REPLICAS, "moe-", rows)


if __name__ == "__main__":
    main()
