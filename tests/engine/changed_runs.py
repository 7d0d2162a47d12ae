"""Models that the user changes after the PipelineModule was built, on pooled ranks and in one process."""

from __future__ import annotations

import threading
import zlib

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

WIDTH, BLOCKS, MICROS, STEPS = 4, 4, 4, 2


def mse(output, labels):
    """In the labels' dtype: not every version of torch takes two."""
    return nn.functional.mse_loss(output.to(labels.dtype), labels)


class Block(nn.Module):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.gain * torch.tanh(self.a(x))


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(2, WIDTH))
        self.up = nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Counting(nn.Module):
    """Scales by a buffer that is not saved."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return self.inner(x) * self.scale


def halve(gradient):
    return gradient * 0.5


def blocks(net):
    return [part for part in net.modules() if isinstance(part, Block)]


# -- changes of one block: of structure, of which a block has one at most, and others -------------------------------


def forward_hook(block):
    factor = 0.5
    block.register_forward_hook(lambda module, inputs, output: output * factor)


def gradient_hook(block):
    for param in block.parameters():
        if param.requires_grad:
            param.register_hook(halve)


def attribute(block):
    block.gain = 0.5


def replaced_forward(block):
    block.forward = (lambda module: lambda x: x + 0.5 * torch.tanh(module.a(x)))(block)


def replaced_module(block):
    block.a = Counting(nn.Sequential(block.a, nn.Tanh(), nn.Linear(WIDTH, WIDTH)))


def weight_norm(block):
    nn.utils.parametrizations.weight_norm(block.a)


def lora(block):
    block.a = Lora(block.a)


def peft(block):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["a"], init_lora_weights=False), block)


def frozen(block):
    for param in block.parameters():
        param.requires_grad_(param.dim() > 1 and param.requires_grad)


def double(block):
    block.double()
    block.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    block.register_forward_hook(lambda module, inputs, output: output.float())


def mark(block):
    for param in block.parameters():
        param.factor = 0.5
        if param.requires_grad:
            param.register_hook(lambda gradient, param=param: gradient * param.factor)


STRUCTURE = (replaced_module, weight_norm, lora, peft)
OTHERS = (forward_hook, gradient_hook, attribute, replaced_forward, frozen, double, mark)
CHANGES = {change.__name__: change for change in (*STRUCTURE, *OTHERS)}


def change_all(net, name):
    for block in blocks(net):
        CHANGES[name](block)


def fill(net):
    for name, param in net.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        param.data.copy_(torch.randn(param.shape, generator=generator) * 0.3)


def data(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    while True:
        pair = torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)
        yield pair[0].to(dtype), pair[1].to(dtype)


class Numbered(nn.Module):
    """Layers by number, as in a PipelineModule."""

    def __init__(self, layers):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def by_itself(net, optimizer, steps=STEPS, stream=None, loss_fn=mse):
    """The oracle: one process."""
    stream, losses = stream or data(), []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(MICROS):
            inputs, labels = next(stream)
            loss = loss_fn(net(inputs), labels) / MICROS
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def by_layer(named):
    groups = {}
    for name, param in named:
        groups.setdefault(int(name.split(".")[0]), []).append(param)
    return [{"params": params, "lr": 0.1 * 0.5**number} for number, params in sorted(groups.items())]


def expected(change):
    net = Numbered([Block() for _ in range(BLOCKS)])
    change_all(net, change)
    fill(net)
    losses = by_itself(net, torch.optim.SGD(net.parameters(), lr=0.1))
    return losses, {name: param.detach() for name, param in net.named_parameters()}


def settings(schedule, **more):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "pipeline": {"schedule": schedule, "p2p_timeout_s": 60},
        **more,
    }


def built(layers=None, loss_fn=mse, **kwargs):
    world = torch.distributed.get_world_size()
    layers = layers or [LayerSpec(Block) for _ in range(BLOCKS)]
    return PipelineModule(layers, num_stages=world, loss_fn=loss_fn, partition_method="uniform", **kwargs)


def weights(engine):
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def changed(schedule, changes):
    """Train with each change; change -> (losses, weights)."""
    import dualpipe_engine

    found = {}
    for change in changes:
        net = built([Block() for _ in range(BLOCKS)] if change == "lora" else None)
        change_all(net, change)
        fill(net)
        engine, *_ = dualpipe_engine.initialize(model=net, config=settings(schedule), model_parameters=net.parameters())
        stream = data()
        losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
        found[change] = losses, {name: value for name, value in weights(engine).items() if "nothing" not in name}
    return found


class Holder(nn.Linear):
    """Has a lock from the start, so that it cannot be pickled, and does without."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.lock = threading.Lock()


def log_to(file):
    def log(module, inputs, output):
        file.write(str(output))

    return log


def cannot_be_carried():
    """A layer that is as its LayerSpec builds it can do without pickling; what stands in the way of another is said."""
    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    net = built([LayerSpec(Holder) for _ in range(2)])
    fill(net)
    engine, *_ = dualpipe_engine.initialize(model=net, config=settings("dualpipe"), model_parameters=net.parameters())
    stream = data()
    losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
    net, message = built(), None
    with open("/dev/null", "w") as file:
        for block in blocks(net)[1:]:
            block.register_forward_hook(log_to(file))
        try:
            dualpipe_engine.initialize(model=net, config=settings("dualpipe"), model_parameters=net.parameters())
        except ConfigError as error:
            message = str(error)
    return message, losses, weights(engine)
