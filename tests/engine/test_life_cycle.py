"""Engines come and go: what they hold is given back, and a signal that ends the job costs no work."""

from __future__ import annotations

import life_cycle_runs as runs
import pytest

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError


def check_flat(held):
    """One file more or less is a connection that the other end is about to close; a file a cycle would be two more."""
    files, *others = zip(*held[2:], strict=True)
    assert all(len(set(each)) == 1 for each in others), held
    assert max(files) <= min(files) + 1, held


def test_destroy_gives_everything_back(ranks):
    for found in ranks.run(2, runs.cycles, ranks=2, count=5):
        check_flat([held for held, _ in found])


@pytest.mark.all
def test_200_cycles_cost_nothing(ranks):
    """Resident memory may settle: the last hundred cycles are looked at."""
    for found in ranks.run(2, runs.cycles, timeout=900, ranks=2, count=200):
        check_flat([held for held, _ in found])
        memory = [size for _, size in found]
        assert memory[-1] < memory[100] * 1.02, memory[::20]


def test_two_engines_beside_each_other(ranks):
    for alone, (first, second) in ranks.run(2, runs.beside_each_other, ranks=2):
        assert second == alone and first == alone[:2]


def test_layers_of_an_engine_that_is_given_back(ranks):
    for expected, found, said in ranks.run(2, runs.one_after_another, ranks=2):
        assert found == expected
        assert "make one anew" in said


def test_layers_of_stock_deepspeeds_engine(ranks):
    for said, losses in ranks.run(2, runs.of_stock_deepspeed, ranks=2):
        assert "cannot be carried to pipeline rank" in said and "call the destroy() of one that had the layer" in said
        assert losses[1] < losses[0]


@pytest.mark.faults_all
@pytest.mark.parametrize("sent_to", [(0, 1), (1,)])
def test_a_signal_saves_and_ends_all_ranks(ranks, tmp_path, sent_to):
    found = ranks.run(2, runs.ended_by_signal, ranks=2, folder=str(tmp_path), sent_to=sent_to)
    for rank, (code, heard, restored, path, client, steps) in enumerate(found):
        assert code == 143 and restored and steps == 2 and client["seen"] == 16
        assert heard == [15] * (rank in sent_to)  # the program's own handler was called, too
        assert path.endswith("global_step2/mp_rank_00_model_states.pt")


def test_a_signal_without_a_folder_is_refused(ranks):
    assert all('set "save_folder"' in text for text in ranks.run(2, runs.no_folder, ranks=2))


@pytest.mark.faults_all
def test_signals_of_others_arrive_and_no_file_is_spoilt(ranks, tmp_path):
    for loss, heard, written, main in ranks.run(2, runs.other_handlers, ranks=2, folder=str(tmp_path)):
        assert loss > 0 and heard == [1] and written == b"" and main


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"schedule": "zbv", "save_on_signal": "SIGKILL"}, "no signal that a program can take"),
        ({"schedule": "zbv", "save_on_signal": "TERM"}, "no signal that a program can take"),
        ({"schedule": "zbv", "save_folder": "x"}, 'is for "save_on_signal"'),
        ({"save_on_signal": "SIGTERM"}, "does nothing under DeepSpeed's own schedule"),
        ({"schedule": "1f1b-deepspeed", "check_finite": True}, "does nothing under DeepSpeed's own schedule"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(section, text):
    with pytest.raises(ConfigError, match=text):
        read_config({"train_batch_size": 4, "pipeline": section})
