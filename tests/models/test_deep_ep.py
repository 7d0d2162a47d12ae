"""The dispatcher on DeepEP against stand-ins for its two interfaces: DeepEP itself needs several GPUs."""

from __future__ import annotations

from pathlib import Path

import fake_device
import pytest


@pytest.fixture(scope="module")
def found():
    return fake_device.run_alone(Path(__file__).parent / "deep_ep_runs.py")


@pytest.mark.parametrize("interface", ["Buffer", "ElasticBuffer", "EPBuffer"])
def test_blocks_equal_those_of_one_rank_with_one_buffer_and_one_wait_each(found, interface):
    assert found[interface]["buffers"] == 1, "all layers of a group share a buffer"
    assert found[interface]["waits"] == ["deep_ep"] * 2, "its own counts are used"


def test_experts_of_other_ranks_are_left_out(found):
    rows, sizes, known = found["arranged"]
    assert rows == [2.0, 3.0, 0.0, 2.0] and sizes == known == [2, 2]


def test_done_is_what_the_device_says(found):
    answers, moments = found["asked"]
    assert answers == [False, True] and moments == [True] * 4


def test_layers_of_autoep_equal_those_of_one_rank(found):
    """With weights before and after the experts, by a buffer of the size and shares that the section says."""
    assert found["autoep buffers"] == 2
    for score_apply in ("post", "pre"):
        assert "10 tokens to dispatch, but comm_max_tokens_per_rank is 9" in found[f"autoep {score_apply}"]
