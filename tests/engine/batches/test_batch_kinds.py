"""What a micro-batch may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dualpipe_engine.engine.batches.evaluation import Evaluation
from dualpipe_engine.engine.batches.feed import BatchFeed
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.placement import LINEAR, Placement


class OnlyRank:
    placement = Placement(LINEAR, 1)
    rank = 0
    feeds = True


def feed(batch):
    return BatchFeed(OnlyRank, 1, lambda: batch, torch.device("cpu"))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"x": torch.ones(2), "y": torch.ones(2)}, r"micro-batch 0 is a dict of 2, .*set_batch_fn"),
        ((torch.ones(2),), r"micro-batch 0 is a tuple of 1, .*set_batch_fn"),
        (None, "micro-batch 0 is a NoneType, "),
        (torch.ones(2, 3), "micro-batch 0 is a Tensor of 2, "),
        ((torch.ones(2).numpy(), torch.ones(2)), "the inputs of micro-batch 0 are an array of numpy"),
    ],
)
def test_what_is_no_pair_is_refused(batch, text):
    with pytest.raises(ConfigError, match=text):
        feed(batch).inputs(0)


@pytest.mark.parametrize("labels", [None, {"y": torch.ones(2), "weight": 2.0}, torch.ones(2).numpy(), "a name"])
def test_labels_may_be_anything(labels):
    found = feed(({"x": torch.ones(2), "name": "s"}, labels, "more"))
    assert found.inputs(0)["name"] == "s"
    assert type(found.labels(0)) is type(labels)


def test_means_of_outputs_are_those_of_each_tensor():
    one_replica = SimpleNamespace(place=SimpleNamespace(replicas=1))
    outputs = [({"logits": torch.full((2, 3), number)}, torch.tensor(2 * number), "name") for number in (1.0, 4.0)]
    means, scale, name = Evaluation._mean_of(one_replica, outputs)
    assert torch.equal(means["logits"], torch.full((2, 3), 2.5)) and scale == 5.0 and name == "name"
