"""Bytes that blocks keep whose ranks share sequences, beside those computed; run on pooled ranks."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from dualpipe_engine.models.attention import Attention
from dualpipe_engine.models.block import DenseBlock, MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.runtime.recompute import Recompute
from dualpipe_engine.schedule.jobs.flows import block_flow
from dualpipe_engine.testing.saved_bytes import SavedBytes

TOKENS, BLOCKS, HIDDEN = 64, 4, 96  #: tokens of a rank
COMMON = {"hidden_size": HIDDEN, "num_attention_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 72}
COMMON |= {"intermediate_size": 200, "n_shared_experts": 1}
#: kind -> Hugging Face's fields, and ours; of the first, one head of keys and values for both ranks
ATTENTIONS = {
    "grouped": (
        {"num_key_value_heads": 1, "head_dim": 24},
        {"attention": "grouped", "kv_heads": 1},
    ),
    "latent": (
        {"kv_lora_rank": 40, "q_lora_rank": 56, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 32},
        {"value_head": 32, "rotary": 8, "kv_rank": 40, "q_rank": 56},
    ),
}


def measure(names):
    """(attention, experts, bytes of an element) -> (measured, computed)."""
    found = {}
    for attention, (fields, ours) in ATTENTIONS.items():
        for experts in (0, 4):
            for dtype in (torch.bfloat16, torch.float32):
                torch.manual_seed(0)
                config = MoEConfig(
                    hidden=HIDDEN, heads=4, head=24, dense_inner=200, experts=4, top_k=2, expert_inner=72, **ours
                )
                kind = MoEBlock if experts else DenseBlock
                blocks = torch.nn.ModuleList(kind(config) for _ in range(BLOCKS)).to(dtype)
                flow = block_flow(COMMON | fields, experts, True, dtype.itemsize, dist.get_world_size())
                computed = TOKENS * BLOCKS * sum(flow.kept(names, dtype.itemsize).values())
                found[attention, experts, dtype.itemsize] = _saved(blocks, names, dtype), computed
    return found


def _saved(blocks, names, dtype):
    again = {}
    for name, part in blocks.named_modules():
        if isinstance(part, Attention):
            part.share_sequences(dist.group.WORLD)
        within = any(name.startswith(f"{outer}.") for outer in again)
        if not within and any(re.search(each, name.partition(".")[2]) for each in names):
            again[name] = part
    recompute = Recompute(again)
    recompute.install()
    x = torch.randn(1, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)

    def run():
        state = x
        for block in blocks:
            state = block(state)
        return state

    with SavedBytes([*blocks.parameters(), *blocks.buffers()]) as saved:
        out = recompute.within(run)()
    assert out.shape == x.shape
    return saved.now
