"""State that "auto" counts: of experts by the copies of a share, and without what is offloaded."""

from __future__ import annotations

import auto_memory_runs


def test_state_of_experts_and_on_the_host(ranks):
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases = [
        {"zero": {"stage": 1}},
        {"zero": {"stage": 1} | offload},
        {"zero": {"stage": 0} | offload},
        {"zero": {"stage": 1} | offload, "device": "cpu"},
    ]
    partitioned, on_host, whole, same_memory = ranks.run(2, auto_memory_runs.each, cases=cases)[0]
    gradients = {"linear": 110 * 4, "bidirectional": 2 * 110 * 4 + 110 * 4}  # with the second copy of the weights
    adam = {"linear": 100 * 8 // 4 + 10 * 8 // 2, "bidirectional": 200 * 8 // 8 + 20 * 8 // 4}
    assert partitioned == ({name: gradients[name] + adam[name] for name in adam}, 900)
    assert on_host == (gradients, 900)
    assert whole[0] == {"linear": gradients["linear"] + 110 * 8, "bidirectional": gradients["bidirectional"] + 220 * 8}
    assert same_memory == (partitioned[0], 450)
