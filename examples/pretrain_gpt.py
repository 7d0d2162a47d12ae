"""Train a byte-level GPT on text with the schedule that the DeepSpeed configuration names.

Started by quickstart.sh, or by hand:

    deepspeed --num_accelerators 4 examples/pretrain_gpt.py --deepspeed_config examples/gpt.json --schedule dualpipe
"""

from __future__ import annotations

from gpt import layers, loss
from training import LENGTH, parse_arguments, run


def main() -> None:
    args = parse_arguments(__doc__, blocks=8)
    run(args, lambda replica: layers(args.blocks, length=LENGTH), loss)


if __name__ == "__main__":
    main()
