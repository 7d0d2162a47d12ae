"""Edges: whole stage outputs and gradients over directed edges.

For each directed edge (source rank -> destination rank) receives are posted in the sender's order, sends are kept alive
until they are done, and a consumer waits for its own receive only. Where each edge has a communicator of its own, one
receive is posted ahead: it lies ready for the transfer, and as none queues behind it on its communicator, it holds
nothing else even where all communicators and the computation share one hardware queue. There a message of several
tensors travels as one block, because its second tensor would be a transfer that nobody has posted a receive for. The
first forward message of a stage is preceded by a header (`meta.encode`), for which the receive is posted ahead in place
of the message's; from then on the receiver allocates by itself. The shapes of a gradient message are those of the
floating-point tensors that went forward, so it needs no header.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import OutputError
from ..schedule.progress import Position
from .meta import HEADER_BYTES, MAKE_IT_KNOWN, MessageMeta, TensorMeta, block_of, decode, encode, flatten, unseen
from .nest import Nest, as_it_is
from .tickets import Ticket
from .transport import Transport

FORWARD = 0
BACKWARD = 1
_MAX_TENSORS = 64
_HEADER = _MAX_TENSORS - 1


def _tag(kind: int, stage: int, micro: int, index: int) -> int:
    """Below 2^30, as a tag has 31 bits; no two messages under way are 8192 micro-batches apart."""
    return ((micro % 8192 * 1024 + stage % 1024) * 2 + kind) * _MAX_TENSORS + index


def _as_it_reads(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own order; what is conjugated or negative only when it is read (`x.conj()`) is so
    there."""
    return tensor.contiguous().resolve_conj().resolve_neg()


def _unsendable(tensor: torch.Tensor) -> str | None:
    """What a tensor is that is more than one block of memory."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantized"
    return type(tensor).__name__ if is_traceable_wrapper_subclass(tensor) else None


@dataclass(slots=True)
class Inbound:
    """A receive that was asked for. `tickets` is None until it could be posted."""

    kind: int
    stage: int
    micro: int
    src: int
    made_by: int  # the stage that sends it, and names it
    metas: tuple[TensorMeta, ...] = ()
    header: tuple[torch.Tensor, Ticket] | None = None  # which tells the shapes
    message: MessageMeta | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    tickets: list[Ticket] | None = None


class Edges:
    """Transfers of one rank of a pipeline.

    Args:
        transport: moves single tensors.
        device: where received tensors are allocated.
        timeout_s: seconds after which a wait gives up.
        dynamic_shape: send a header with every forward message, so that shapes may change between micro-batches.
        position: told what is waited for; None: nobody wants to know.
    """

    def __init__(
        self,
        transport: Transport,
        device: torch.device,
        timeout_s: float = 600.0,
        dynamic_shape: bool = False,
        position: Position | None = None,
    ) -> None:
        self.position = Position() if position is None else position
        self._transport = transport
        self._device = device
        self._timeout_s = timeout_s
        self._dynamic = dynamic_shape
        self._sent: dict[int, MessageMeta] = {}
        self._owed: dict[tuple[int, int], tuple[TensorMeta, ...]] = {}  # gradients that are to come back
        self._taken: dict[tuple[int, int], MessageMeta] = {}  # inputs whose gradients are to be sent
        self._known: dict[int, MessageMeta] = {}
        self._waiting: dict[int, deque[Inbound]] = defaultdict(deque)
        self._posted: dict[int, int] = defaultdict(int)  # receives that nobody has waited for yet, by their source
        self._inbound: dict[tuple[int, int, int], Inbound] = {}
        self._outbound: deque[tuple[Ticket, torch.Tensor]] = deque()

    def reset_shapes(self) -> None:
        """Forget all shapes; the next forward message of each stage brings a header again. Call it on all ranks."""
        self._sent.clear()
        self._known.clear()

    def send_forward(self, stage: int, micro: int, output: Nest, dst: int) -> None:
        """Send the output of `stage` for `micro` (any nest, see `meta`; cut off from autograd) to pipeline rank `dst`.

        Raises:
            OutputError: shapes, dtypes or constants differ from the first message without `dynamic_shape`.
        """
        before = self._sent.get(stage)
        tag = _tag(FORWARD, stage, micro, 0)
        if before is not None and not self._dynamic and before.is_of(output):
            self._owed[stage, micro] = before.differentiable
            self._post_send(_as_it_reads(output), dst, tag)
            return
        tensors = self._announce(stage, micro, output, dst)
        self._owed[stage, micro] = self._sent[stage].differentiable
        self._send_all(tensors, dst, tag)

    def _announce(self, stage: int, micro: int, output: Nest, dst: int) -> list[torch.Tensor]:
        """The tensors of an output, after a header where the receiver cannot know them."""
        tensors, meta = flatten(output)
        if len(tensors) > _HEADER:
            raise OutputError(
                f"stage {stage} passes on {len(tensors)} tensors in micro-batch {micro}, a message holds {_HEADER}: "
                "let its last layer join some of them"
            )
        if kind := next(filter(None, map(_unsendable, tensors)), None):
            raise OutputError(
                f"stage {stage} passes on a {kind} tensor in micro-batch {micro}, and only dense ones travel: pass the "
                "plain tensors that it is made of, and make it in the layer that uses it"
            )
        before = self._sent.get(stage)
        if self._dynamic or before is None:
            header = encode(meta).to(self._device)
            _ = meta.looks  # now
            self._sent[stage] = meta
            self._post_send(header, dst, _tag(FORWARD, stage, micro, _HEADER))
        elif not before.is_like(meta):
            if name := unseen(before.changed(meta)):
                raise OutputError(f"stage {stage} passes on another {name} in micro-batch {micro}, {MAKE_IT_KNOWN}")
            raise OutputError(
                f"stage {stage} made ({meta.describe()}) for micro-batch {micro} after ({before.describe()}): build "
                "the PipelineModule with dynamic_shape=True, or call engine.reset_activation_shape() on all ranks, or "
                'leave out the last batch of a dataset where only that is smaller ("dataloader_drop_last": true)'
            )
        return tensors

    def send_backward(self, stage: int, micro: int, grads: list[torch.Tensor], dst: int) -> None:
        """Send the input gradients of `stage` for `micro`, one for each floating-point input, to rank `dst`."""
        self._taken.pop((stage, micro), None)
        tag = _tag(BACKWARD, stage, micro, 0)
        if len(grads) == 1:
            self._post_send(_as_it_reads(grads[0]), dst, tag)
        else:
            self._send_all(grads, dst, tag)

    def send_no_output(self, stage: int, micro: int, dst: int) -> None:
        """Send zeros in place of the output of `stage` for `micro`, or word that there is no tensor, if the receiver
        does not know the shapes."""
        known = None if self._dynamic else self._sent.get(stage)
        tensors = [] if known is None else [meta.zeros(self._device) for meta in known.tensors]
        if known is None:
            tensors = self._announce(stage, micro, (), dst)
        self._owed[stage, micro] = self._sent[stage].differentiable
        self._send_all(tensors, dst, _tag(FORWARD, stage, micro, 0))

    def send_no_grads(self, stage: int, micro: int, dst: int) -> None:
        """Send zeros in place of the input gradients of `stage` for `micro`."""
        message = self._taken.pop((stage, micro))
        zeros = [meta.zeros(self._device) for meta in message.differentiable]
        self._send_all(zeros, dst, _tag(BACKWARD, stage, micro, 0))

    def drop_forward(self, stage: int, micro: int) -> None:
        """Take the input of `stage` for `micro`, unless that has been done."""
        if (FORWARD, stage, micro) in self._inbound:
            self._finish((FORWARD, stage, micro))

    def drop_backward(self, stage: int, micro: int) -> None:
        """Take the output gradients of `stage` for `micro`, unless that has been done."""
        if (BACKWARD, stage, micro) in self._inbound:
            self._finish((BACKWARD, stage, micro))

    def post_forward(self, stage: int, micro: int, src: int) -> None:
        """Ask for the input of `stage` for `micro` from pipeline rank `src`."""
        self._ask(Inbound(FORWARD, stage, micro, src, stage - 1))

    def post_backward(self, stage: int, micro: int, src: int) -> None:
        """Ask for the output gradients of `stage` for `micro` from pipeline rank `src`."""
        self._ask(Inbound(BACKWARD, stage, micro, src, stage + 1))

    def wait_forward(self, stage: int, micro: int, enter: Callable[[Nest], Nest] = as_it_is) -> Nest:
        """The input of `stage` for `micro`, in the sender's nest, as `enter` makes it ready.

        Args:
            enter: gets the tensors before the message is there, unless their shapes are still to come, so that what it
                does costs no time. It must neither read nor write to their memory, or take it away.
        """
        key = (FORWARD, stage, micro)
        inbound = self._inbound[key]
        if inbound.message is None or inbound.tickets is None:
            self._finish(key)
            assert inbound.message is not None
            return enter(inbound.message.build(inbound.tensors))
        entered = enter(inbound.message.build(inbound.tensors))
        self._finish(key)
        return entered

    def wait_backward(self, stage: int, micro: int) -> list[torch.Tensor]:
        """The output gradients of `stage` for `micro`, one for each floating-point tensor that was sent forward."""
        return self._finish((BACKWARD, stage, micro)).tensors

    def flush(self) -> None:
        """Wait until all sends are done."""
        while self._outbound:
            ticket, _ = self._outbound.popleft()
            ticket.wait(self._timeout_s)
        self._owed.clear()
        self._taken.clear()

    def message_bytes(self, stage: int) -> int:
        """Bytes that `stage` passed on for a micro-batch; 0 where it sent nothing from this rank."""
        meta = self._sent.get(stage)
        return 0 if meta is None else sum(tensor.size for tensor in meta.tensors)

    @property
    def idle(self) -> bool:
        """Whether every receive that was asked for has been consumed and every send is done."""
        return not self._inbound and not self._outbound

    def under_way(self) -> list[torch.Tensor]:
        """The tensors of sends that are not known to be done, and of receives that are posted and not consumed."""
        coming = [tensor for inbound in self._inbound.values() for tensor in inbound.tensors]
        return [tensor for _, tensor in self._outbound] + coming

    def _send_all(self, tensors: list[torch.Tensor], dst: int, tag: int) -> None:
        if self._transport.whole and len(tensors) > 1:
            metas = [TensorMeta(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
            block, places = block_of(metas, self._device)
            with torch.no_grad():
                for place, tensor in zip(places, tensors, strict=True):
                    place.copy_(tensor)
            tensors = [block]
        for index, tensor in enumerate(tensors):
            self._post_send(_as_it_reads(tensor), dst, tag + index)

    def _post_send(self, tensor: torch.Tensor, dst: int, tag: int) -> None:
        self._outbound.append((self._transport.send(tensor, dst, tag), tensor))
        while len(self._outbound) > 1 and self._outbound[0][0].done():  # behind the send, for which the peer waits
            self._outbound.popleft()

    def _ask(self, inbound: Inbound) -> None:
        self._inbound[inbound.kind, inbound.stage, inbound.micro] = inbound
        waiting = self._waiting[inbound.src]
        waiting.append(inbound)
        if len(waiting) == 1:
            self._advance(waiting)

    def _advance(self, waiting: deque[Inbound]) -> None:
        """Post what may be posted of one source; of a message whose shapes are not known its header."""
        ahead = self._transport.ahead
        while waiting and (ahead is None or self._posted[waiting[0].src] < ahead):
            if not self._give_shapes(waiting[0]):
                if waiting[0].kind == FORWARD:
                    self._post_header(waiting[0])
                return
            self._post(waiting.popleft())

    def _give_shapes(self, inbound: Inbound) -> bool:
        """Give a message its shapes; whether they are known. A gradient has those of the output that it is owed for,
        which are used up."""
        if inbound.kind == BACKWARD:
            owed = self._owed.pop((inbound.stage, inbound.micro), None)
            inbound.metas = owed or ()
            return owed is not None
        if not self._dynamic and inbound.stage in self._known:
            inbound.message = self._known[inbound.stage]
            inbound.metas = inbound.message.tensors
            return True
        return False

    def _post(self, inbound: Inbound) -> None:
        tag = _tag(inbound.kind, inbound.made_by, inbound.micro, 0)
        self._posted[inbound.src] += 1
        if self._transport.whole and len(inbound.metas) > 1:
            block, inbound.tensors = block_of(inbound.metas, self._device)
            blocks = [block]
        else:
            blocks = inbound.tensors = []
            for meta in inbound.metas:
                blocks.append(torch.empty(meta.shape, dtype=meta.dtype, device=self._device))
        inbound.tickets = []
        for block in blocks:
            inbound.tickets.append(self._transport.recv(block, inbound.src, tag))
            tag += 1

    def _post_header(self, inbound: Inbound) -> None:
        if inbound.header is None:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._device)
            tag = _tag(inbound.kind, inbound.made_by, inbound.micro, _HEADER)
            inbound.header = header, self._transport.recv(header, inbound.src, tag)

    def _read_header(self, inbound: Inbound) -> None:
        self._post_header(inbound)
        assert inbound.header is not None
        header, ticket = inbound.header
        ticket.wait(self._timeout_s)
        inbound.message = self._known[inbound.stage] = decode(header)
        inbound.metas = inbound.message.tensors

    def _finish(self, key: tuple[int, int, int]) -> Inbound:
        inbound = self._inbound[key]
        self.position.awaits = (inbound.src, inbound.made_by, inbound.micro, inbound.kind == BACKWARD)
        waiting = self._waiting[inbound.src]
        # Receives of one edge are posted in the sender's order, so headers of earlier messages are read first.
        while inbound.tickets is None:
            first = waiting.popleft()
            if not self._give_shapes(first):
                self._read_header(first)
            self._post(first)
        for ticket in inbound.tickets:
            ticket.wait(self._timeout_s)
        self.position.awaits = None
        self._posted[inbound.src] -= 1
        if waiting:
            self._advance(waiting)
        del self._inbound[key]
        if inbound.message is not None:
            self._taken[inbound.stage, inbound.micro] = inbound.message
        return inbound
