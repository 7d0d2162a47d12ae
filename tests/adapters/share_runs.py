"""Runs that read experts by share, with what is read and held counted."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import autoep_runs
import safetensors
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """The most bytes of tensors that are there at one time, of those that are made in the body."""

    def __init__(self):
        super().__init__()
        self.most, self._known = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.note(found)
        return found

    def note(self, value):
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._known = {key: each for key, each in self._known.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._known.values()))


@contextmanager
def counted(held=None):
    """Bytes read of each entry of safetensors."""
    read, opening = Counter(), safetensors.safe_open

    class Slice:
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __getitem__(self, key):
            return noted(self.name, self.inner[key])

    class Opened:
        def __init__(self, *args, **kwargs):
            self.inner = opening(*args, **kwargs)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *args):
            self.inner.__exit__(*args)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, name):
            return noted(name, self.inner.get_tensor(name))

        def get_slice(self, name):
            return Slice(name, self.inner.get_slice(name))

    def noted(name, tensor):
        read[name] += tensor.nbytes
        if held is not None:
            held.note(tensor)
        return tensor

    with patch.object(safetensors, "safe_open", Opened):
        yield read


def own_bytes(module):
    return sum(tensor.nbytes for tensor in {*module.parameters(), *module.buffers()})


def build(folder, ranks=2, replicas=2):
    from dualpipe_engine.adapters import get_model_adapter

    adapter = get_model_adapter(folder=folder)
    return PipelineModule(
        adapter.to_layer_specs(), topology=PipeDataParallelTopology(ranks, replicas), loss_fn=adapter.loss_fn
    )


def read_by_share(folder):
    """What a rank reads and holds until it has its share."""
    from dualpipe_engine.engine.placing.param_groups import name_parameters
    from dualpipe_engine.engine.placing.shared_blocks import read_rest, share_blocks
    from dualpipe_engine.models.autoep.layer import SharedMoE
    from dualpipe_engine.models.autoep.section import read_section

    with Held() as held, counted(held) as read:
        module = build(folder)
        before = sum(read.values())
        name_parameters(module)
        share_blocks(module, read_section({"enabled": True, "autoep_size": 2}))
        read_rest(module)
    blocks = [part for part in module.modules() if isinstance(part, SharedMoE)]
    return {
        "read": read,
        "before": before,
        "most": held.most,
        "own": own_bytes(module),
        "block": max(own_bytes(block.experts) for block in blocks),
        "experts": sum(own_bytes(block.experts) for block in blocks),
    }


def train(folder, schedule, section=True, steps=2):
    """Losses of a model from a folder."""
    import dualpipe_engine

    config = autoep_runs.settings(schedule, zero=1)
    if not section:
        del config["expert_parallel"]
    engine, *_ = dualpipe_engine.initialize(model=build(folder), config=config)
    data = autoep_runs.streams(2)[engine.place.replica]
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    engine.destroy()
    return losses


def train_built(name, schedule, steps=2):
    """Losses of the model that the folder was made of."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(
        model=autoep_runs.built(name, 2, 2), config=autoep_runs.settings(schedule, zero=1)
    )
    data = autoep_runs.streams(2)[engine.place.replica]
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    engine.destroy()
    return losses


def together(folder, name):
    """All of the above, on the same ranks."""
    return {
        "counts": read_by_share(folder),
        "built": train_built(name, "dualpipe"),
        "folder": train(folder, "dualpipe"),
        "whole": train(folder, "dualpipe", section=False),
    }
