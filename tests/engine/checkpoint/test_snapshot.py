"""What is held for a thread to write is what was there, with its sharing, and follows nothing."""

from __future__ import annotations

import io
from collections import OrderedDict, namedtuple

import torch
from torch import nn

from dualpipe_engine.engine.checkpoint.snapshot import snapshot

Pair = namedtuple("Pair", "first second")


class Scaler:
    def __init__(self):
        self.scale = 4.0


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def state():
    module = nn.Linear(3, 4)
    flat = torch.arange(12.0)
    return {
        "module": module.state_dict(),
        "views": [flat[:4], flat[4:].view(2, 4)],
        "parameter": module.weight,
        "plain": (1, "a", None, torch.bfloat16, torch.Size([2])),
        "pair": Pair(torch.ones(1), 2),
        "transposed": torch.arange(6).view(2, 3).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "loss": (module.weight * 2).sum(),
        "scaler": Scaler(),
        "empty": torch.empty(0),
    }


def test_a_file_of_the_copy_is_that_of_the_original():
    value = {key: each for key, each in state().items() if key not in ("sparse", "conjugate", "loss")}
    assert saved(snapshot(value)) == saved(value)


def test_nothing_that_happens_later_shows():
    value = state()
    copied = snapshot(value)
    before = saved(copied)
    for each in (value["views"][0], value["half"], value["transposed"], value["module"]["weight"]):
        each.zero_()
    value["module"]["more"] = 1
    value["views"].append(1)
    value["scaler"].scale = 0.0
    assert saved(copied) == before
    assert isinstance(copied["module"], OrderedDict) and copied["module"]._metadata == value["module"]._metadata


def test_what_shares_memory_shares_it_in_the_copy():
    flat = torch.arange(8.0)
    row = [flat[:2]]
    copied = snapshot({"a": flat[2:], "b": row, "c": row})
    assert copied["a"].untyped_storage().data_ptr() == copied["b"][0].untyped_storage().data_ptr()
    assert copied["b"] is copied["c"]


def test_rows_and_dicts_that_hold_themselves():
    value = {}
    value["self"] = [value]
    copied = snapshot(value)
    assert copied["self"][0] is copied and copied is not value
