"""Cutting a block into phases keeps nothing alive that its backward does not need."""

from __future__ import annotations

import phase_memory_runs
from made_bytes import LEAVES


def test_phases_keep_no_more_than_the_whole_block(ranks):
    for rank in ranks.run(2, phase_memory_runs.alive_after_forward):
        for name, (whole, by_phases) in rank.items():
            assert whole > 10_000, name
            assert by_phases <= whole + LEAVES, f"{name}: {by_phases} bytes by phases, {whole} whole"
