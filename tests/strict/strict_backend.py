"""The strict twin of NCCL: a `torch.distributed` backend for tests, with messages carried by `strict_hub.Hub`.

On CPU the host is the compute stream, so `wait()` holds it. `wait(timeout)`, which on NCCL makes the host poll, is a
fault where `timeouts` is False.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from multiprocessing.connection import Client
from typing import Any

import torch
import torch.distributed as dist
from strict_hub import CONNECTED, DONE, FAULT, MADE
from torch.distributed import distributed_c10d as c10d

from dualpipe_engine.comm import python_stream as twin
from dualpipe_engine.comm import stream as stream_module

NAME = "strict"


class StrictError(RuntimeError):
    """A rule of the twin is broken, or all ranks wait."""


class Line:
    """The connection of this rank to the hub.

    Args:
        address: of the hub.
        rank: global rank.
        in_flight: operations after whose number a further one waits until one is done; None: any number.
        timeouts: whether waits with a timeout pass.
    """

    def __init__(self, address: str, rank: int, eager: bool, in_flight: int | None, timeouts: bool) -> None:
        self.rank, self.eager, self.timeouts = rank, eager, timeouts
        self._in_flight = in_flight
        self._connection = Client(address, family="AF_UNIX")
        self._connection.send(rank)
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._open: dict[int, Any] = {}  # number -> what takes the result
        self._connected: set[str] = set()
        self._asked = self._made = self._posted = 0
        self._fault: str | None = None
        self.device_is_set = False
        self.options: list[Any] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._until(lambda: "" in self._connected)

    def say(self, *message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connection.send(message)

    def fault(self, text: str) -> None:
        caller = [each for each in traceback.extract_stack() if each.filename != __file__][-1]
        self.say("fault", f"{text} ({caller.filename}:{caller.lineno} in {caller.name})")
        self._until(lambda: False)

    def make(self, name: str, members: tuple[int, ...]) -> None:
        self._asked += 1
        self.say("make", name, members)
        self._until(lambda: self._made >= self._asked)

    def post(self, name: str, kind: str, detail: Any, payload: Any, take: Any) -> int:
        if self._in_flight is not None:
            self._until_one_is_done(f"{self._in_flight} operations are in flight, so {kind} {detail} waits")
        with self._changed:
            self._posted += 1
            number = self._posted
            self._open[number] = take
        self.say("post", name, number, kind, detail, payload)
        if not self.eager and name not in self._connected:
            self._until(lambda: name in self._connected)
        return number

    def is_done(self, number: int) -> bool:
        with self._changed:
            if self._fault:
                raise StrictError(self._fault)
            return number not in self._open

    def wait(self, number: int, text: str) -> None:
        if not self.is_done(number):
            self.say("wait", number, text)
            self._until(lambda: number not in self._open)

    def _until_one_is_done(self, text: str) -> None:
        """Where too many operations are in flight."""
        with self._changed:
            before = len(self._open)
        if before >= self._in_flight:
            self.say("full", before, text)
            self._until(lambda: len(self._open) < before)

    def close(self) -> None:
        self.say("bye")

    def _until(self, condition: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fault or condition())
            if self._fault:
                raise StrictError(self._fault)

    def _read(self) -> None:
        while True:
            try:
                what, number, value = self._connection.recv()
            except (EOFError, OSError):
                what, number, value = FAULT, None, self._fault or "the hub is gone"
            with self._changed:
                if what == DONE:
                    try:
                        with torch.inference_mode():  # what was made in that mode takes results too
                            self._open.pop(number)(value)
                    except Exception:
                        self._fault = traceback.format_exc()
                elif what == MADE:
                    self._made = number
                elif what == CONNECTED:
                    self._connected.add(number or "")
                elif what == FAULT:
                    self._fault = value
                self._changed.notify_all()
            if what == FAULT:
                return


class StrictWork(dist._Work):
    def __init__(self, line: Line, number: int, text: str) -> None:
        super().__init__()
        self._line, self._number, self._text = line, number, text

    def wait(self, timeout: Any = None) -> bool:
        if timeout is not None and timeout.total_seconds() > 0 and not self._line.timeouts:
            self._line.fault(f"wait with a timeout for {self._text}: on NCCL it makes the host poll")
        self._line.wait(self._number, f"waits for {self._text}")
        return True

    def is_completed(self) -> bool:
        return self._line.is_done(self._number)

    def exception(self) -> None:
        return None

    def get_future(self) -> Any:
        work = self

        class Future:
            def add_done_callback(self, callback: Any) -> None:
                pass

            def wait(self) -> None:
                work.wait()

        return Future()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fill(tensor: torch.Tensor, payload: bytes) -> None:
    tensor.copy_(_like(tensor, payload))


def _like(tensor: torch.Tensor, payload: bytes) -> torch.Tensor:
    if not payload:
        return torch.empty_like(tensor)
    return torch.frombuffer(bytearray(payload), dtype=tensor.dtype).view(tensor.shape)


_REDUCE = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.PRODUCT: torch.mul,
}


def _op_of(opts: Any) -> Any:
    """The reduction, read while the options are there: they own it."""
    return next(op for op in _REDUCE if opts is None or opts.reduceOp == op)


def _reduced(tensor: torch.Tensor, payloads: list[bytes], op: Any) -> torch.Tensor:
    total, *others = (_like(tensor, payload) for payload in payloads)
    for other in others:
        total = _REDUCE[op](total, other)
    return total / len(payloads) if op == dist.ReduceOp.AVG else total


class StrictGroup(dist.ProcessGroup):
    """A communicator."""

    def __init__(self, line: Line, name: str, ranks: tuple[int, ...]) -> None:
        super().__init__(ranks.index(line.rank), len(ranks))
        self._line, self._name, self._ranks = line, name, ranks
        line.say("open", name, ranks)

    @property
    def group_name(self) -> str:
        return self._name

    def name(self) -> str:
        return NAME

    getBackendName = name

    def _set_group_name(self, name: str) -> None:
        pass

    def _set_group_desc(self, desc: str) -> None:
        pass

    def shutdown(self) -> None:
        self._line.say("shut", self._name)

    abort = shutdown

    def _post(self, kind: str, detail: Any, payload: Any, take: Any) -> StrictWork:
        number = self._line.post(self._name, kind, detail, payload, take)
        return StrictWork(self._line, number, f"{kind} {detail} on communicator {self._name} of {list(self._ranks)}")

    def send(self, tensors: Any, peer: int, tag: int) -> StrictWork:
        payload = _bytes(tensors[0]), tensors[0].nbytes
        return self._post("send", self._ranks[peer], payload, lambda _: None)

    def recv(self, tensors: Any, peer: int, tag: int) -> StrictWork:
        (tensor,) = tensors
        return self._post("recv", self._ranks[peer], tensor.nbytes, lambda payload: _fill(tensor, payload))

    def allreduce(self, tensors: Any, opts: Any = None) -> StrictWork:
        (tensor,) = tensors
        op = _op_of(opts)
        detail = f"{tensor.dtype} {tensor.numel()}"

        def take(payloads: Any) -> None:
            tensor.copy_(_reduced(tensor, payloads, op))

        return self._post("all_reduce", detail, _bytes(tensor), take)

    def broadcast(self, tensors: Any, opts: Any) -> StrictWork:
        (tensor,) = tensors
        root = opts.rootRank
        payload = _bytes(tensor) if root == self.rank() else b""
        detail = f"from {self._ranks[root]} {tensor.nbytes}"
        return self._post("broadcast", detail, payload, lambda payloads: _fill(tensor, payloads[root]))

    def reduce(self, tensors: Any, opts: Any) -> StrictWork:
        (tensor,) = tensors
        root, op = opts.rootRank, _op_of(opts)

        def take(payloads: Any) -> None:
            if root == self.rank():
                tensor.copy_(_reduced(tensor, payloads, op))

        return self._post("reduce", f"to {self._ranks[root]} {tensor.numel()}", _bytes(tensor), take)

    def allgather(self, outputs: Any, tensors: Any, opts: Any = None) -> StrictWork:
        (into,), (tensor,) = outputs, tensors

        def take(payloads: Any) -> None:
            for each, payload in zip(into, payloads, strict=True):
                _fill(each, payload)

        return self._post("all_gather", tensor.nbytes, _bytes(tensor), take)

    def all_gather_single(self, output: Any, tensor: Any, opts: Any = None) -> StrictWork:
        return self._post(
            "all_gather", tensor.nbytes, _bytes(tensor), lambda payloads: _fill(output, b"".join(payloads))
        )

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, output: Any, tensor: Any, opts: Any) -> StrictWork:
        op, mine = _op_of(opts), self.rank()

        def take(payloads: Any) -> None:
            whole = _reduced(tensor.detach(), payloads, op).reshape(-1)
            output.copy_(whole.chunk(len(payloads))[mine].view_as(output))

        return self._post("reduce_scatter", tensor.numel(), _bytes(tensor), take)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any) -> StrictWork:
        return self.reduce_scatter_single(outputs[0], torch.cat([each.reshape(-1) for each in inputs[0]]), opts)

    def all_to_all_single(self, output: Any, tensor: Any, receive: Any, send: Any, opts: Any = None) -> StrictWork:
        size, mine = self.size(), self.rank()
        send = list(send) or [len(tensor) // size] * size
        blocks = [_bytes(block) for block in tensor.split(send)]
        return self._post(
            "all_to_all", "", blocks, lambda payloads: _fill(output, b"".join(blocks[mine] for blocks in payloads))
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> StrictWork:
        return self._post("barrier", "", None, lambda _: None)


class NativeStream(twin.CommStream):
    """Takes a transfer as one on an accelerator: the group orders it, and no thread of ours looks after it."""

    def _post(self, *args: Any, **kwargs: Any) -> twin.PythonTicket:
        ticket = super()._post(*args, **kwargs)
        ticket.native, ticket.by_callback = True, False
        if (work := ticket.work) is not None:  # None: it has failed
            ticket._wait_on_device = work.wait  # the stream that is ordered is the host
        return ticket

    def _keep(self, key: Any, ticket: twin.PythonTicket) -> None:
        pass


@contextlib.contextmanager
def installed(address: str, port: int, eager: bool, in_flight: int | None, timeouts: bool) -> Any:
    """In the body `torch.distributed`, initialized through DeepSpeed, runs on the strict twin.

    Args:
        address: of the hub.
        port: that is free, for the store.
        eager: how groups are made, as the hub has it.
        in_flight: see `Line`.
        timeouts: see `Line`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    line = Line(address, dist.get_rank(), eager, in_flight, timeouts)
    _drop_world()
    os.environ["MASTER_PORT"] = str(port)
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
    global _line
    _line = line
    accelerator = get_accelerator()
    with contextlib.ExitStack() as undo:
        helper = c10d._new_process_group_helper
        _set(undo, c10d, "_new_process_group_helper", lambda *args, **kwargs: _made(line, helper, *args, **kwargs))
        _set(undo, stream_module, "implementation", lambda how: NativeStream)
        _set(undo, accelerator, "set_device", lambda index: setattr(line, "device_is_set", True))
        for name in ("all_gather_object", "broadcast_object_list", "gather_object", "send_object_list"):
            _set(undo, dist, name, _checked(line, name, getattr(dist, name)))
        try:
            deepspeed.init_distributed(dist_backend=NAME, verbose=False)
            yield line
        finally:
            _drop_world()
            line.close()


_line: Line | None = None


def _create(options: Any, _: Any) -> StrictGroup:
    assert _line is not None
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return StrictGroup(_line, options.group_id, ranks)


def _made(line: Line, helper: Any, *args: Any, **kwargs: Any) -> Any:
    """What torch calls on every rank for a group, members or not."""
    _, _, ranks, backend, _, name = args
    options = kwargs.get("backend_options")
    if options is not None:
        if any(options is each for each in line.options):
            line.fault(f"one options object is given to two groups, the second of ranks {list(ranks)}")
        line.options.append(options)
    if ranks and NAME in str(backend):  # the world itself is made without the others' help
        line.make(name, tuple(ranks))
    return helper(*args, **kwargs)


def _checked(line: Line, name: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not line.device_is_set and dist.get_backend(kwargs.get("group")) == NAME:
            line.fault(f"{name} before set_device: the tensors of all ranks of a node go to its first device")
        return function(*args, **kwargs)

    return call


def _set(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _drop_world() -> None:
    import deepspeed

    if dist.is_initialized():
        deepspeed.comm.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
