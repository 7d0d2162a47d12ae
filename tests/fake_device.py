"""An accelerator that computes on the CPU: its tensors, and a count of what makes the host wait.

`setup` changes torch for the whole process, so tests use it in a process of their own (`run_alone`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
#: ops whose result or shape the host has to read
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.bincount,
    aten.unique_dim,
    aten._unique2,
    aten.unique_consecutive,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
}
waits: list[str] = []  #: what has made the host wait
DEVICE = torch.device("privateuseone", 0)


class Tensor(torch.Tensor):
    """A tensor on the device; `raw` is where it lives."""

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, raw.size(), device=DEVICE, **layout)
        self.raw = raw
        return self

    def tolist(self):  # torch has none for a subclass
        waits.append("tolist")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    packet = func.overloadpacket
    if packet is aten.record_stream:
        return None
    _note(func, packet, args, kwargs)
    here = kwargs.get("device", None)
    if here is not None:
        kwargs = kwargs | {"device": "cpu"}
    kwargs = {key: value for key, value in kwargs.items() if not (key == "pin_memory" and value)}
    out = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if func._schema.name.endswith("_") and not func._schema.name.endswith("__"):
        return args[0]
    if packet is aten._to_copy and here is not None and torch.device(here).type == "cpu":
        return out
    return tree_map(lambda value: Tensor(value) if isinstance(value, torch.Tensor) else value, out)


def _raw(value):
    return value.raw if isinstance(value, Tensor) else value


def _note(func, packet, args, kwargs):
    if packet in READS:
        waits.append(str(packet))
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        waits.append("repeat_interleave")
    if packet is aten.index and any(each is not None and each.dtype == torch.bool for each in args[1]):
        waits.append("index by a mask")
    if packet is aten.copy_:
        asynchronous = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and all(
            isinstance(each, Tensor) or getattr(each, "pinned", False) for each in args[:2]
        )
        if isinstance(args[0], Tensor) != isinstance(args[1], Tensor) and not asynchronous:
            waits.append("copy_")
    if packet is aten._to_copy and kwargs.get("device") is not None:
        source = args[0]
        crosses = isinstance(source, Tensor) != (torch.device(kwargs["device"]).type == DEVICE.type)
        if crosses and not (kwargs.get("non_blocking") and getattr(source, "pinned", False)):
            waits.append("to")


def setup():
    """Register the device in this process."""
    _setup_privateuseone_for_python_backend("fake")
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    return library


def on_device(module):
    """Move the parameters and buffers of a module."""
    for part in module.modules():
        for name, param in part._parameters.items():
            part._parameters[name] = None if param is None else torch.nn.Parameter(Tensor(param.detach()))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else Tensor(buffer)
    return module


def pinned_empty(shape, dtype):
    out = torch.empty(shape, dtype=dtype)
    out.pinned = True
    return out


class Stream:
    """A stream whose events are counted when the host waits for them."""

    def record_event(self):
        return SimpleNamespace(synchronize=lambda: waits.append("event"))


def run_alone(script, *args):
    """Run a script of the tests; returns what it gives to `answer`."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    found = subprocess.run([sys.executable, str(script), *args], env=env, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def answer(found):
    """End a script, at once: autograd's threads of a device written in Python would outlive what they need."""
    print(json.dumps(found), flush=True)
    os._exit(0)
