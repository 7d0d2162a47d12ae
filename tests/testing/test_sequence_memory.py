"""What is computed to be kept of blocks whose ranks share sequences is what autograd keeps."""

from __future__ import annotations

import pytest
import sequence_memory_runs

from dualpipe_engine.schedule.jobs.flows import OWN_RECOMPUTED


@pytest.mark.parametrize("names", [(), OWN_RECOMPUTED], ids=["kept", "recomputed"])
def test_computed_bytes_are_measured(ranks, names):
    for rank in ranks.run(2, sequence_memory_runs.measure, names=names):
        for case, (measured, computed) in rank.items():
            assert measured == pytest.approx(computed, rel=0.05), case
