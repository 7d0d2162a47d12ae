"""Attention of models of transformers in pieces, whose exchanges are phases."""

from __future__ import annotations

import phased_attention_runs as runs
import pytest
import torch
from made_bytes import LEAVES

#: A norm before two branches; a gate; experts too.
CASES = [{"name": "gpt_neox"}, {"name": "llama", "gate": True}, {"name": "qwen3_moe", "experts": True}]
MORE = [
    {"name": "llama"},
    {"name": "bert"},  # dropout
    {"name": "gemma3"},
    {"name": "gptj"},
    {"name": "deepseek_v3", "experts": True},
    {"name": "qwen3", "changes": {"num_key_value_heads": 1}},
]


def check(found, cases):
    for rank in found:
        for case, (whole, phased) in zip(cases, rank, strict=True):
            assert torch.equal(whole.output, phased.output), case
            assert whole.grads.keys() == phased.grads.keys()
            for name, grad in whole.grads.items():
                torch.testing.assert_close(phased.grads[name], grad, rtol=1e-6, atol=1e-7, msg=f"{case}: {name}")
            assert 50_000 < phased.behind_forward <= whole.behind_forward + LEAVES, case
            assert phased.behind_backward <= whole.behind_backward, case


def test_pieces_do_and_keep_what_the_whole_does(ranks):
    check(ranks.run(runs.RANKS, runs.each, cases=CASES), CASES)


@pytest.mark.all
def test_more_kinds(ranks):
    check(ranks.run(runs.RANKS, runs.each, cases=MORE, timeout=300), MORE)


def test_what_cannot_be_cut_says_why_and_runs_whole(ranks):
    reasons = [
        ("counts", "it does more around its attention than can be done in pieces"),
        ("hooked", "it has hooks around its attention"),
        ("on one rank", "it has hooks around its attention"),
        ("fails", "it does not run in pieces (ValueError: run again)"),
        ("checkpoints", 'it recomputes activations by itself: set "activation_checkpoint_interval"'),
    ]
    for rank in ranks.run(runs.RANKS, runs.refused, names=[name for name, _ in reasons]):
        for (name, reason), (why, runs_whole) in zip(reasons, rank, strict=True):
            assert why.startswith(reason), (name, why)
            assert runs_whole, name
