"""Bytes that operations make: what lives counts once, what was there and what has no memory does not."""

from __future__ import annotations

import warnings

import torch

from dualpipe_engine.runtime.held import HeldBytes


def test_what_lives_counts_once():
    weight = torch.ones(8, requires_grad=True)
    with HeldBytes() as held:
        made = torch.ones(4)
        view = made.view(2, 2)
        nowhere = torch.empty_like(weight, device="meta")
        (weight * 2).sum().backward()
        assert held.but([weight]) == made.nbytes and nowhere.nbytes
        assert held.but([]) == made.nbytes + weight.grad.nbytes
        del made
        assert held.but([weight]) == view.nbytes
        del view
        assert held.but([weight]) == 0


def test_tensors_within_a_graph_are_no_leaves_and_count_as_ones_own():
    weight = torch.ones(8, requires_grad=True)
    with HeldBytes() as held, warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = weight * 2
        assert held.but([]) == inner.nbytes
        assert held.but([inner]) == 0
