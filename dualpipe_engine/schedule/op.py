"""Op: one entry of a rank's program, and its text form.

The text is that of torch.distributed.pipelining: stage, kind, micro-batch. `3F7` is the forward of micro-batch 7 on
stage 3, `(3F7;4B2)FB` one forward and one backward that overlap, `3OFFLOAD7` the end of the copy of what `3F7` has kept
to host memory, `3REDUCE` the gradient reduction of stage 3 and `STEP` the optimizer step.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import PlanError

F = "F"  #: forward
B = "B"  #: full backward, I and W in one
I = "I"  #: backward with respect to the inputs  # noqa: E741
W = "W"  #: backward with respect to the weights
FB = "FB"  #: one forward and one backward of different micro-batches, overlapped
SEND_F = "SEND_F"  #: send the output of `stage` to stage + 1
RECV_F = "RECV_F"  #: receive the input of `stage` from stage - 1
SEND_B = "SEND_B"  #: send the input gradient of `stage` to stage - 1
RECV_B = "RECV_B"  #: receive the output gradient of `stage` from stage + 1
OFFLOAD = "OFFLOAD"  #: let go of what F has kept: its copy to host memory, which began behind F, is done
RELOAD = "RELOAD"  #: begin to copy it back; the backward waits for the end
REDUCE = "REDUCE"  #: reduce the gradients of `stage` over its replicas
STEP = "STEP"  #: optimizer step of the rank

COMPUTE = frozenset((F, B, I, W, FB))
SENDS = frozenset((SEND_F, SEND_B))
RECEIVES = frozenset((RECV_F, RECV_B))
COMM = SENDS | RECEIVES
COPIES = frozenset((OFFLOAD, RELOAD))
STEPS = COMPUTE | COPIES  #: what `lower` adds transfers and the tail to
BESIDE = COMM | COPIES  #: what runs beside the computation of its rank
GRADIENTS = frozenset((B, W))  #: what completes the weight gradient of a micro-batch
NONE = -1  #: "no stage" or "no micro-batch" of REDUCE and STEP

#: Of each transfer the kind at its other end, and how many stages further that is.
_OTHER_END = {SEND_F: (RECV_F, 1), RECV_F: (SEND_F, -1), SEND_B: (RECV_B, -1), RECV_B: (SEND_B, 1)}
_FORWARD = frozenset((F, SEND_F, RECV_F))

_TEXT = re.compile(r"([0-9]{1,9})(SEND_F|RECV_F|SEND_B|RECV_B|OFFLOAD|RELOAD|F|B|I|W)([0-9]{1,9})")
_REDUCE = re.compile(r"([0-9]{1,9})REDUCE")
_PAIR = re.compile(r"\(([^;()]+);([^;()]+)\)FB")


class Op(NamedTuple):
    """One op of a rank's program.

    Args:
        kind: one of the kinds of this module.
        stage: global stage number; that of the forward part for `FB`; `NONE` for `STEP`.
        micro: micro-batch 0..M-1; that of the forward part for `FB`; `NONE` for `REDUCE` and `STEP`.
        parts: the forward op and the backward op (`B` or `I`) of an `FB`, else empty.
    """

    kind: str
    stage: int
    micro: int
    parts: tuple[Op, ...] = ()

    def __str__(self) -> str:
        if self.kind == FB:
            return f"({self.parts[0]};{self.parts[1]})FB"
        if self.kind == STEP:
            return STEP
        if self.kind == REDUCE:
            return f"{self.stage}REDUCE"
        return f"{self.stage}{self.kind}{self.micro}"

    @property
    def is_forward(self) -> bool:
        """Whether it is part of the way from the first stage to the last: an F, or the transfer of an output."""
        return self.kind in _FORWARD

    def send(self) -> Op:
        """The send of what an F, B or I makes: the output of its stage, or the gradient of the stage's input."""
        return Op(SEND_F if self.kind == F else SEND_B, self.stage, self.micro)

    def receive(self) -> Op:
        """The receive of what an F, B or I takes: the input of its stage, or the gradient of the stage's output."""
        return Op(RECV_F if self.kind == F else RECV_B, self.stage, self.micro)

    def other_end(self) -> Op:
        """The receive of a send, or the send of a receive. Its stage may be none of the pipeline's: nothing is passed
        on behind the last stage, nor back from the first."""
        kind, step = _OTHER_END[self.kind]
        return Op(kind, self.stage + step, self.micro)

    @classmethod
    def parse(cls, text: str) -> Op:
        """Read one op.

        Raises:
            PlanError: the text is not an op.
        """
        text = text.strip()
        if match := _TEXT.fullmatch(text):
            return cls(match[2], int(match[1]), int(match[3]))
        if match := _PAIR.fullmatch(text):
            return pair(cls.parse(match[1]), cls.parse(match[2]))
        if match := _REDUCE.fullmatch(text):
            return cls(REDUCE, int(match[1]), NONE)
        if text == STEP:
            return cls(STEP, NONE, NONE)
        raise PlanError(
            f"{text[:60]!r} is not an op: expected text like 3F7, 4B2, 4I2, 4W2, (3F7;4B2)FB, 3SEND_F7, 3OFFLOAD7, "
            "3REDUCE or STEP"
        )


def pair(forward: Op, backward: Op) -> Op:
    """Make the overlapped pair of a forward and a backward op.

    Raises:
        PlanError: the parts are not one F and one B or I.
    """
    if forward.kind != F or backward.kind not in (B, I):
        raise PlanError(f"({forward};{backward})FB: a pair is one F and one B or I")
    return Op(FB, forward.stage, forward.micro, (forward, backward))


def atoms(op: Op) -> tuple[Op, ...]:
    """The ops that `op` stands for: its two parts for an `FB`, else itself."""
    return op.parts or (op,)
