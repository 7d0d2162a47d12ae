"""The sentence that says who is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dualpipe_engine.faults.lifeline import GONE, SILENT
from dualpipe_engine.faults.watch import describe


def report(section="train_batch", op="1F0", awaits=None, waiting=True):
    return {"where": section or "outside", "op": op, "section": section, "awaits": awaits, "waiting": waiting, "age": 1}


@pytest.mark.parametrize(
    ("last", "reports", "expected"),
    [
        # who waits for it says so
        (report(op="0F7"), {1: report(op="1F3", awaits=(0, "0F3")), 2: report(awaits=(1, "1F3"))}, "0F3"),
        # a collective that all take part in
        (report(op="2B1"), {1: report(op="1REDUCE"), 2: report(awaits=(1, "1F3"))}, "1REDUCE"),
        # only its own report tells
        (report(op="0F7"), {2: report(awaits=(1, "1F3"))}, "0F7"),
        # nobody can name an op: its last report is older than the section that the others are in
        (report(section=None, op=None), {2: report(awaits=(1, "1F3"))}, "train_batch"),
        (report(section="save_checkpoint", op=None), {2: report(awaits=(1, "1F3"))}, "train_batch"),
        # nobody waits
        (report(section="save_checkpoint", op=None), {2: report(waiting=False)}, "save_checkpoint"),
    ],
)
def test_the_expected_op(last, reports, expected):
    text = describe({"kind": GONE, "rank": 0, "at": last}, reports)
    assert text.startswith("rank 0 is lost: its process ended")
    assert f"It was expected to run {expected} " in text + " "


def test_waiting_ranks_are_listed_up_to_a_limit():
    reports = {rank: report(awaits=(rank - 1, "1F3")) for rank in range(1, 12)}
    text = describe({"kind": SILENT, "rank": 0, "at": report()}, reports)
    assert "Waiting: rank 1 in train_batch for 1F3 of rank 0; rank 2 " in text
    assert text.endswith("and 3 more")


LOADER = """
import gc
from datetime import timedelta

import torch.distributed as dist
from torch.utils.data import DataLoader

import dualpipe_engine.faults.watch


class Dataset:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        gc.collect()
        return index


gc.disable()
cycle = [dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=30))]
cycle.append(cycle)
del cycle
print([batch.item() for batch in DataLoader(Dataset(), num_workers=1, timeout=20)], flush=True)
"""


def test_workers_of_a_data_loader_do_not_collect_process_groups():
    """One that waits to be collected in the process that they are forked from has threads that they do not have."""
    done = subprocess.run([sys.executable, "-c", LOADER], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[0, 1]"], done.stderr[-2000:]
