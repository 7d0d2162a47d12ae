"""Train a small Qwen3-MoE of transformers on bytes of text, its experts shared by two replicas of the pipeline.

The model is transformers' own, cut by its adapter. The section "expert_parallel" of the configuration lets DeepSpeed's
AutoEP take the place of its MoE blocks; the auxiliary loss over all routers keeps their loads even.

Started by `quickstart.sh --model qwen3-moe`, or by hand:

    deepspeed --num_accelerators 4 examples/pretrain_qwen3_moe.py --deepspeed_config examples/qwen3_moe.json
"""

from __future__ import annotations

from typing import Any

import torch
from training import expert_loads, parse_arguments, run
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dualpipe_engine.adapters import get_model_adapter

REPLICAS = 2
AUXILIARY = 0.01  #: weight of the loss over routers


def layers(blocks: int) -> list[Any]:
    """The model as layers, the same on every rank."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=AUXILIARY,
        output_router_logits=True,
    )
    return list(get_model_adapter(Qwen3MoeForCausalLM(config)).to_layer_specs())


def loss(output: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Nats a byte of `(logits, auxiliary loss)`; in training with the auxiliary loss."""
    logits, auxiliary = output
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return nats + AUXILIARY * auxiliary if torch.is_grad_enabled() else nats


def rows(engine: Any) -> list[tuple[str, str]]:
    return [("losses in training", f"with {AUXILIARY} x that over routers; held out: without"), *expert_loads(engine)]


def main() -> None:
    args = parse_arguments(__doc__, blocks=6)
    run(args, lambda replica: layers(args.blocks), loss, REPLICAS, "qwen3-moe-", rows)


if __name__ == "__main__":
    main()
