"""Edges between two threads: order, headers, shapes, lifetimes, time-outs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing._internal.two_tensor import TwoTensor

from dualpipe_engine.comm.meta import HEADER_BYTES, block_of, decode, encode, flatten
from dualpipe_engine.comm.p2p import BACKWARD, FORWARD, Edges, _tag
from dualpipe_engine.comm.transport import LocalHub, LocalTransport
from dualpipe_engine.errors import ConfigError, PipelineRuntimeError

CPU = torch.device("cpu")


class Masked(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


@dataclass
class Known:
    x: torch.Tensor
    times: int


@dataclass
class Unknown:
    x: torch.Tensor


torch.export.register_dataclass(Known)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3),
        torch.zeros((), dtype=torch.bfloat16),
        (torch.ones(2), torch.ones(1, dtype=torch.bool)),
        [torch.ones(2), {"a": torch.arange(3), "b": None}, ("text", 4)],
        (torch.empty(0, 5),),
        {"both": Masked(torch.ones(2), torch.ones(2, dtype=torch.bool))},
        (Known(torch.ones(2), 3), 1),
        [(torch.ones(2), torch.ones(2))] * 30,
    ],
)
def test_meta_round_trip(value):
    tensors, meta = flatten(value)
    header = encode(meta)
    assert header.shape == (HEADER_BYTES,)
    assert decode(header) == meta
    rebuilt = decode(header).build(tensors)
    assert type(rebuilt) is type(value)
    assert flatten(rebuilt)[1] == meta


def test_meta_too_large_or_unpicklable():
    with pytest.raises(PipelineRuntimeError, match="fewer tensors"):
        encode(flatten((torch.ones(1), "x" * 5000))[1])
    with pytest.raises(PipelineRuntimeError, match="cannot travel"):
        encode(flatten((torch.ones(1), lambda: 0))[1])


@pytest.mark.parametrize("around", [lambda value: value, lambda value: (torch.ones(2), value)])
def test_tensors_that_no_gradient_would_reach(around):
    flatten(around(Unknown(torch.ones(2))))
    with pytest.raises(ConfigError, match=r"holds a Unknown, .*register_dataclass"):
        flatten(around(Unknown(torch.ones(2, requires_grad=True))))


def test_tensors_of_a_class_that_torch_does_not_know():
    """They are pickled with their object, as a constant; a mask of flex_attention is one."""
    left, _ = two_ends()
    masks = [create_block_mask(causal, None, None, 16, 16, device="cpu") for _ in range(2)]
    for mask in (masks[0], masks[0]):
        left.send_forward(0, 0, (torch.ones(2), mask), dst=1)
    with pytest.raises(PipelineRuntimeError, match=r"another BlockMask in micro-batch 1, .* in the layer that"):
        left.send_forward(0, 1, (torch.ones(2), masks[1]), dst=1)
    with pytest.raises(PipelineRuntimeError, match="dynamic_shape=True"):
        left.send_forward(0, 1, (torch.ones(3), masks[0]), dst=1)
    large, _ = two_ends(dynamic_shape=True)
    with pytest.raises(PipelineRuntimeError, match=r"holds a Unknown, whose .*register_dataclass"):
        large.send_forward(0, 0, (torch.ones(2), Unknown(torch.ones(2000))), dst=1)


def causal(batch, head, query, key):
    return query >= key


def two_ends(whole=False, **kwargs):
    hub = LocalHub(2)
    transports = [LocalTransport(hub, rank) for rank in range(2)]
    for each in transports:
        each.whole = whole
    return [Edges(each, CPU, timeout_s=0.3, **kwargs) for each in transports]


@pytest.mark.parametrize("whole", [False, True])
def test_forward_and_backward_share_an_edge(whole):
    left, right = two_ends(whole)
    for micro in range(3):
        right.post_forward(1, micro, src=0)
    left.post_backward(0, 1, src=1)  # before its forward was sent: posted as soon as the shape is known
    for micro in range(3):
        left.send_forward(0, micro, (torch.full((2,), float(micro)), torch.tensor([micro])), dst=1)
    for micro in (2, 0, 1):  # consumed in another order than sent
        value, number = right.wait_forward(1, micro)
        assert value.tolist() == [micro, micro]
        assert number.tolist() == [micro]
    right.send_backward(1, 1, [torch.tensor([5.0, 6.0])], dst=0)
    assert [grad.tolist() for grad in left.wait_backward(0, 1)] == [[5.0, 6.0]]
    left.flush()
    right.flush()
    assert left.idle
    assert right.idle


@pytest.mark.parametrize("micro", [16_383, 16_384, 10**9])
def test_any_number_of_micro_batches_has_tags(micro):
    """A tag of gloo has 31 bits, and those under way at a time differ."""
    near = range(micro, micro + 50)
    tags = [
        _tag(kind, stage, each, index)
        for kind in (FORWARD, BACKWARD)
        for stage in (0, 1, 1023)
        for each in near
        for index in (0, 63)
    ]
    assert len(set(tags)) == len(tags) and all(0 <= tag < 2**31 - 1 for tag in tags)


def test_messages_of_several_tensors_travel_whole():
    """Of every dtype and number of elements, not contiguous ones too; one op each, forward and backward."""
    left, right = two_ends(whole=True)
    sent = []
    post = left._transport.send
    left._transport.send = lambda tensor, dst, tag: sent.append(tensor) or post(tensor, dst, tag)
    value = {
        "rows": torch.randn(3, 5).t(),
        "mask": torch.tensor([True, False, True]),
        "number": torch.tensor(7),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "complex": torch.randn(2, dtype=torch.complex64),
        "half": torch.randn(1, dtype=torch.float16),
    }
    for micro in range(2):
        right.post_forward(1, micro, src=0)
        left.send_forward(0, micro, value, dst=1)
        got = right.wait_forward(1, micro)
        assert got.keys() == value.keys()
        for name, tensor in value.items():
            assert got[name].dtype == tensor.dtype and got[name].is_contiguous()
            assert torch.equal(got[name], tensor), name
    assert len(sent) == 3, "a header and two messages"
    left.post_backward(0, 1, src=1)
    grads = [torch.randn_like(tensor) for tensor in value.values() if tensor.is_floating_point() or tensor.is_complex()]
    right.send_backward(1, 1, grads, dst=0)
    assert all(map(torch.equal, left.wait_backward(0, 1), grads))


def test_a_tensor_of_a_block_may_be_written_to():
    """Autograd does not take it for a change of the others."""
    _, (rows, mask) = block_of(flatten((torch.ones(3), torch.ones(3, dtype=torch.bool)))[1].tensors, CPU)
    rows.copy_(torch.arange(3.0)).requires_grad_()
    out = (rows * rows).sum()
    mask.fill_(False)
    out.backward()
    assert rows.grad.tolist() == [0.0, 2.0, 4.0]


def test_changed_shape():
    left, _ = two_ends()
    left.send_forward(0, 0, torch.ones(2), dst=1)
    with pytest.raises(PipelineRuntimeError, match=r"made \(\[3\] float32\) .* after \(\[2\] float32\)"):
        left.send_forward(0, 1, torch.ones(3), dst=1)
    left.reset_shapes()
    left.send_forward(0, 1, torch.ones(3), dst=1)


class Counter:
    def __init__(self):
        self.count = 0


@pytest.mark.parametrize(
    "make", [lambda: np.arange(3), lambda: math.nan, lambda: {1, 2}, Counter, lambda: Known([], 1)]
)
def test_constants_that_stay(make):
    left, _ = two_ends()
    constant = make()
    for micro in range(3):
        again = make() if micro == 1 and not isinstance(constant, Counter) else constant
        left.send_forward(0, micro, (torch.ones(2), again), dst=1)


def count(counter):
    counter.count += 1


@pytest.mark.parametrize(
    ("constant", "change"),
    [
        (np.arange(3), lambda array: array.fill(7)),
        ({1, 2}, lambda numbers: numbers.add(3)),
        (Counter(), count),
    ],
)
def test_a_constant_that_changes_and_stays_the_same_object(constant, change):
    """Its receiver has it from the first message."""
    left, _ = two_ends()
    left.send_forward(0, 0, (torch.ones(2), constant), dst=1)
    change(constant)
    with pytest.raises(PipelineRuntimeError, match="dynamic_shape=True"):
        left.send_forward(0, 1, (torch.ones(2), constant), dst=1)


def test_dynamic_shapes_and_dtypes():
    left, right = two_ends(dynamic_shape=True)
    for micro, value in enumerate((torch.ones(2), torch.ones(3, 1, dtype=torch.float64))):
        right.post_forward(1, micro, src=0)
        left.send_forward(0, micro, value, dst=1)
        got = right.wait_forward(1, micro)
        assert got.dtype == value.dtype
        assert torch.equal(got, value)


def test_what_is_conjugated_when_it_is_read_travels_so(monkeypatch):
    sent, send = [], LocalTransport.send

    def noting(self, tensor, dst, tag):
        sent.append(tensor)
        return send(self, tensor, dst, tag)

    monkeypatch.setattr(LocalTransport, "send", noting)
    left, _ = two_ends()
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    for micro in range(2):  # with a header, and without
        left.send_forward(0, micro, numbers.conj(), dst=1)
    left.send_forward(1, 0, (numbers.conj().imag, numbers), dst=1)
    left.send_backward(1, 0, [numbers.conj()], dst=1)
    tensors = [each for each in sent if each.dtype != torch.uint8]
    assert not any(each.is_conj() or each.is_neg() for each in tensors)
    conjugated = [1 - 2j, 3 + 4j]
    assert [each.tolist() for each in tensors] == [conjugated] * 2 + [[-2.0, 4.0], numbers.tolist(), conjugated]


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "nested"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "TwoTensor"),
    ],
)
def test_what_is_no_block_of_memory_does_not_travel(tensor, kind):
    left, _ = two_ends()
    with pytest.raises(
        PipelineRuntimeError, match=f"stage 0 passes on a {kind} tensor in micro-batch 3, .*pass the plain"
    ):
        left.send_forward(0, 3, (torch.ones(2), tensor), dst=1)


def test_time_out_names_the_peer():
    _, right = two_ends()
    right.post_forward(1, 0, src=0)
    with pytest.raises(PipelineRuntimeError, match="receive from pipeline rank 0 failed"):
        right.wait_forward(1, 0)
