"""What one process takes apart, another puts together."""

from __future__ import annotations

import torch
from torch import nn

from dualpipe_engine.engine.placing.portable import LocalObjects, pack, unpack

HERE = LocalObjects({}, torch.device("cpu"))


def there(*values):
    """The values as another process has them, and which of them brings each block."""
    packed = pack(values, HERE)
    return unpack(packed.data, packed.shapes, [block.clone() for block in packed.blocks], HERE), packed


def test_what_values_share_stays_one_object():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.name = first.name = ["shared"]
    (one, other), packed = there(first, second)
    assert one.weight is other.weight
    assert one.name is other.name
    assert one.bias is not other.bias
    assert packed.owners == [0, 0, 1]
    assert torch.equal(one.weight, first.weight)


def test_views_of_one_memory_stay_views():
    table = torch.arange(24.0).reshape(4, 6)
    (rows, column, whole), packed = there(table[1:3], table[:, 2], table)
    assert packed.owners == [0]
    rows.zero_()
    assert whole[1:3].sum() == 0
    assert column.tolist() == [2.0, 0.0, 0.0, 20.0]


def test_a_slice_brings_no_more_than_itself():
    (column,), packed = there(torch.arange(24.0).reshape(4, 6)[:, 2])
    assert column.tolist() == [2.0, 8.0, 14.0, 20.0]
    assert sum(block.numel() for block in packed.blocks) == 4 * 4


def test_functions_without_a_name_travel_with_what_they_close_over():
    factor = torch.tensor(2.0)
    (doubled, kept), _ = there(lambda x: factor * x, factor)
    assert doubled(3) == 6
    kept.fill_(4.0)
    assert doubled(3) == 12
