"""Models with awkward parts, and runs that compare their gradients in float64 with one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn
from training import WIDTH, Block, Embed, cross_entropy, head, scale

from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER


def tied(forward_fn=None):
    return TiedLayerSpec("embed", Embed, forward_fn=forward_fn, tied_weight_attr="weight")


def shared():
    names = [f"{layer}.{kind}" for layer in ("norm", "up", "down") for kind in ("weight", "bias")]
    return TiedLayerSpec("block", Block, tied_weight_attr=names)


def blocks(count):
    return [LayerSpec(Block) for _ in range(count)]


def halve(x):
    return x / 2


def through(module, x):
    return x + head(module, x).softmax(-1) @ module.weight


def plain(count=6):
    return [LayerSpec(Embed), *blocks(count), LayerSpec(nn.Linear, WIDTH, training.VOCABULARY)]


def _freeze(*numbers):
    def freeze(module):
        for number in map(str, numbers):
            if number in module._modules:
                module._modules[number].requires_grad_(False)

    return freeze


def _freeze_vectors(module):
    for param in module.parameters():
        param.requires_grad_(param.dim() > 1)


#: name -> layers; with 4 stages of `uniform` two layers a stage.
LAYERS = {
    "plain": plain,
    "tied to the end": lambda: [tied(), *blocks(6), tied(head)],
    "tied to the twin": lambda: [tied(), *blocks(2), tied(through), *blocks(2), tied(through), tied(head)],
    "tied to a neighbour": lambda: [tied(), *blocks(1), tied(through), *blocks(4), LayerSpec(nn.Linear, 8, 17)],
    "tied twice": lambda: [tied(), shared(), *blocks(2), shared(), *blocks(1), shared(), tied(head)],
    "tied within a stage": lambda: [LayerSpec(Embed), *blocks(1), shared(), shared(), *blocks(3), nn.Linear(8, 17)],
    "a stage without parameters": lambda: [*plain(4)[:2], scale, halve, *plain(4)[2:]],
    "a rank without parameters": lambda: [LayerSpec(Embed), *blocks(1), scale, halve, nn.Tanh(), halve, *plain(1)[1:]],
}
FREEZE = {
    "vectors frozen": _freeze_vectors,
    "input frozen": _freeze(0),
    "a layer frozen": _freeze(3),
    "a stage frozen": _freeze(2, 3),
    "first stage frozen": _freeze(0, 1),
    "last stage frozen": _freeze(6, 7),
    "a rank frozen": _freeze(2, 3, 4, 5),
}


def stream(replica, lengths=(5,)):
    """Micro-batches of one replica, without end; their lengths in turn."""
    generator = torch.Generator().manual_seed(77 + replica)
    while True:
        for length in lengths:
            tokens = torch.randint(0, training.VOCABULARY, (2, length + 1), generator=generator)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def build(layers, ranks, replicas, double=True, freeze=None, reentrant=True, **kwargs):
    torch.manual_seed(7)
    if not reentrant:
        kwargs["activation_checkpoint_func"] = checkpointing.non_reentrant_checkpoint
    module = PipelineModule(
        layers=LAYERS[layers](),
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=cross_entropy,
        partition_method="uniform",
        **kwargs,
    )
    module = module.double() if double else module
    if freeze is not None:
        FREEZE[freeze](module)
    return module


def gradients(
    schedule, ranks, replicas=1, micros=3, first=None, layers="plain", freeze=None, lengths=(5,), compiled="", **kwargs
):
    """The largest difference between the float64 gradients of one batch and those of one process.

    Args:
        first: micro-batches of a batch before that, after which the batch size is changed.

    Returns:
        Relative error of the loss, the same of the gradients, and names that have a gradient on one side only.
    """
    import dualpipe_engine

    module = build(layers, ranks, replicas, freeze=freeze, dynamic_shape=len(set(lengths)) > 1, **kwargs)
    config = training.settings(first or micros, replicas, zero=0, schedule=schedule)
    if compiled == "before":
        module.compile(backend="aot_eager")
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    if compiled == "after":
        engine.module.compile(backend="aot_eager")
    if compiled == "by the engine":
        engine.compile(backend="aot_eager")
    if compiled != "before":  # what a rank builds anew is not compiled with the others
        held = [layer for layer in engine.module.forward_funcs if isinstance(layer, nn.Module)]
        assert all((layer._compiled_call_impl is not None) == bool(compiled) for layer in held)
    start = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    start.pop(PLACEHOLDER, None)
    found = {}

    def capture():
        found.update(
            {n: p.grad.clone() for n, p in engine.module.named_parameters() if n != PLACEHOLDER and p.requires_grad}
        )

    engine._exec_optimizer_step = capture
    if first is not None:
        engine.train_batch(stream(engine.data_rank, lengths))
        engine.zero_grad()
        engine.set_train_batch_size(2 * micros * replicas)
    loss = float(engine.train_batch(stream(engine.data_rank, lengths)))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (start, found))
    oracle = build(layers, 1, dist.get_world_size(), freeze=freeze)
    oracle.load_state_dict({name: value for begin, _ in everyone for name, value in begin.items()})
    total = 0.0
    for replica in range(replicas):
        data = stream(replica, lengths)
        for _ in range(micros):
            inputs, labels = next(data)
            part = cross_entropy(oracle(inputs), labels) / (micros * replicas)
            part.backward()
            total += float(part.detach())
    expected = {name: param.grad for name, param in oracle.named_parameters() if param.grad is not None}
    seen = {name for _, grads in everyone for name in grads}
    worst = max(
        (grad - expected[name]).abs().max().item() / (expected[name].abs().max().item() + 1e-12)
        for _, grads in everyone
        for name, grad in grads.items()
        if name in expected
    )
    engine.destroy()
    return abs(loss - total) / total, worst, sorted(seen ^ expected.keys())


def many(cases):
    """`gradients` of each case; some dozen, because the threads of process groups stay."""
    return {name: gradients(**case) for name, case in cases.items()}


def losses(zero, schedule="dualpipe", ranks=4, steps=3, layers="plain", freeze=None, **config):
    """Losses of a few fp32 steps on one repeated batch."""
    import dualpipe_engine

    module = build(layers, ranks, 1, double=False, freeze=freeze)
    settings = training.settings(3, 1, zero=zero, schedule=schedule) | config
    del settings["scheduler"]
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    data = stream(0)
    batch = [next(data) for _ in range(3)]
    found = [float(engine.train_batch(iter(batch))) for _ in range(steps)]
    engine.destroy()
    return found


def under_zero(cases):
    """Losses under ZeRO-0, 1 and 2."""
    return {name: [losses(zero, **case) for zero in (0, 1, 2)] for name, case in cases.items()}
