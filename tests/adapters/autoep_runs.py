"""Runs of models of transformers whose experts are shared by replicas, started on pooled ranks."""

from __future__ import annotations

import copy
import logging
import sys
from unittest import mock

import models
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from deepspeed.utils import logger

MICROS = 4
EPS = 1e-3  #: of Adam: no gradient that is zero but for rounding takes a step


def settings(schedule, replicas=2, zero=0, section=None, **pipeline):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "eps": EPS, "adam_w_mode": False, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "pipeline": {"schedule": schedule, **pipeline},
        "expert_parallel": {"enabled": True, "autoep_size": 2} | (section or {}),
    }


def config_of(name, blocks=2, **changes):
    config = models.config_of(name)
    config.num_hidden_layers = blocks
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def built(name, ranks, replicas, changes=None, cut=None, **kwargs):
    """The whole model as a PipelineModule."""
    from dualpipe_engine.adapters import get_model_adapter

    adapter = get_model_adapter(skewed(models.model_of(config_of(name, **(changes or {}))), name))
    return PipelineModule(
        adapter.to_layer_specs() if cut is None else cut(adapter),
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=adapter.loss_fn,
        **kwargs,
    )


def skewed(model, name):
    """Routers that tell experts apart, since those of some models start at zero, and give the last one no token."""
    generator = torch.Generator().manual_seed(17)
    for part in model.modules():
        if type(part).__name__.endswith("Router"):
            part.weight.data = torch.randn(part.weight.shape, generator=generator) * 0.5
            if hasattr(part, "e_score_correction_bias"):
                part.e_score_correction_bias.copy_(torch.randn(len(part.weight), generator=generator) * 0.1)
                part.e_score_correction_bias[-1] = -9.0
    return model


def streams(replicas):
    return [models.stream(seed) for seed in range(3, 3 + replicas)]


def gradients(name, schedule, ranks=2, replicas=2, overlap="auto", section=None, changes=None, recompute=False):
    """The loss and all reduced gradients of one batch, under the names of the model."""
    import dualpipe_engine

    kwargs = {"activation_checkpoint_interval": 1} if recompute else {}
    module = built(name, ranks, replicas, changes, **kwargs)
    more = {"use_reentrant": False} if recompute else {}
    config = settings(schedule, replicas, section=section, overlap=overlap, **more)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    grads = {}

    def capture():
        grads.update({name: param.grad.clone() for name, param in engine.module.named_parameters()})

    engine._exec_optimizer_step = capture
    loss = float(engine.train_batch(streams(replicas)[engine.place.replica]))
    with torch.no_grad():
        for key, param in engine.module.named_parameters():
            param.copy_(grads[key])
    found = {
        "loss": loss,
        "grads": named(engine.module),
        "transfers": sorted({transfer.name for transfer in engine._transfers}),
        "pairs": [span.op.kind for span in engine._observer.spans()].count("FB"),
        "unphased": dict(engine.module.dualpipe_unphased),
        "split": engine.weight_split.not_deferred if engine._store else [],
    }
    engine.destroy()
    return found


def named(module):
    """Weights of this rank under the names of the model, experts of all ranks together."""
    from dualpipe_engine.adapters.gather import named_weights
    from dualpipe_engine.engine.placing.experts import whole_experts

    with whole_experts(module, keep=True):
        return {name: tensor.clone() for name, tensor in named_weights(module).items()}


def whole(name, replicas=2, changes=None):
    """The oracle: the whole model in one process."""
    model = skewed(models.model_of(config_of(name, **(changes or {}))), name)
    total = 0.0
    for data in streams(replicas):
        for _ in range(MICROS):
            inputs, labels = next(data)
            loss = model(**inputs, labels=labels).loss / (MICROS * replicas)
            loss.backward()
            total += loss.item()
    return total, {name: param.grad for name, param in model.named_parameters()}


def each(cases):
    return [gradients(**copy.deepcopy(case)) for case in cases]


def grouped(module):
    """Experts learn at another rate."""
    experts = [param for name, param in module.named_parameters() if ".experts." in name]
    others = [param for name, param in module.named_parameters() if ".experts." not in name]
    return [{"params": experts, "lr": 0.02}, {"params": others}]


def train(name, folder, steps=2, replicas=2, precision="fp32"):
    """Train, save, train on; again from the saved state; and from its weights without sharing experts."""
    import dualpipe_engine
    from dualpipe_engine.adapters import gather_state_dict

    def start(schedule, section=True):
        module = built(name, 2, replicas)
        config = settings(schedule, zero=1)
        if precision == "bf16":
            config["bf16"] = {"enabled": True}
        if not section:
            del config["expert_parallel"]
        engine, *_ = dualpipe_engine.initialize(model=module, config=config, model_parameters=grouped(module))
        return engine

    engine = start("dualpipe")
    data = streams(replicas)[engine.place.replica]
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    engine.save_checkpoint(folder)
    weights = gather_state_dict(engine)
    evaluated = float(engine.eval_batch(models.stream(9)))
    losses += [float(engine.train_batch(data)) for _ in range(steps)]
    experts = {number: len(layer.mlp.experts.w1) for number, layer in blocks_of(engine.module)}
    engine.destroy()

    again = start("dualpipe")
    with torch.no_grad():
        for param in again.module.parameters():
            param.fill_(0.5)
    again.load_checkpoint(folder)
    data = streams(replicas)[again.place.replica]
    for _ in range(steps * MICROS):
        next(data)
    resumed = [float(again.train_batch(data)) for _ in range(steps)]
    again.destroy()

    other = start("zb1p", section=False)
    other.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    moved = float(other.eval_batch(models.stream(9)))
    other.destroy()
    return {
        "losses": losses,
        "weights": weights,
        "resumed": resumed,
        "evaluated": evaluated,
        "moved": moved,
        "experts": experts,
    }


def stages_of_zero(cases):
    """Losses and the last norm of two clipped steps, for each of (schedule, ZeRO stage, keys of the section)."""
    import dualpipe_engine

    found = []
    for schedule, zero, section in cases:
        module = built("qwen3_moe" + models.ROUTERS, 2, 2)
        config = settings(schedule, zero=zero, section=section, check_twins=1) | {"gradient_clipping": 0.5}
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
        data = streams(2)[engine.place.replica]
        losses = [float(engine.train_batch(data)) for _ in range(2)]
        found.append([*losses, float(engine.get_global_grad_norm())])
        engine.destroy()
    return found


def blocks_of(module):
    """Number and decoder layer of each layer of this rank that has experts."""
    from dualpipe_engine.models.autoep.layer import SharedMoE

    for number in module.dualpipe_layers:
        for part in module._modules[str(number)].modules() if str(number) in module._modules else ():
            if isinstance(getattr(part, "mlp", None), SharedMoE):
                yield number, part


def train_whole(name, steps=2, replicas=2):
    """The oracle: the whole model in one process; the losses, and the weights half way."""
    model = skewed(models.model_of(config_of(name)), name)
    optimizer = torch.optim.Adam(grouped(model), lr=0.01, eps=EPS)
    data, losses, weights = streams(replicas), [], {}
    for step in range(2 * steps):
        if step == steps:
            weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        total = 0.0
        for each_stream in data:
            for _ in range(MICROS):
                inputs, labels = next(each_stream)
                loss = model(**inputs, labels=labels).loss / (MICROS * replicas)
                loss.backward()
                total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, weights


def other_gate(block):
    """A router of another kind under its name."""
    block.gate = torch.nn.Sequential(block.gate)


def hooked(block):
    block.register_forward_hook(lambda *_: None)


def fails(name="mixtral", section=None, changes=None, model_parallel=1, libraries=(), change=None):
    """Initialize with what cannot work, where these packages are there; every rank must raise."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    import dualpipe_engine

    if model_parallel > 1:
        topology = PipeModelDataParallelTopology(2, model_parallel, 1)
        module = PipelineModule([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)], topology=topology)
    else:
        module = built(name, 2, 2, changes)
    for part in list(module.modules()) if change else ():
        if hasattr(part, "gate") and hasattr(part, "experts"):
            globals()[change](part)
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in libraries}):
        dualpipe_engine.initialize(model=module, config=settings("dualpipe", 2 // model_parallel, section=section))


class Said(logging.Handler):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


class Own(torch.nn.Module):
    """A layer of a user's own around a decoder layer of transformers.

    Args:
        after: what it does to the output of that.
    """

    def __init__(self, config, number, after=None):
        super().__init__()
        from transformers.models.mixtral import modeling_mixtral as mixtral

        self.block = mixtral.MixtralDecoderLayer(config, number)
        self.rotary = mixtral.MixtralRotaryEmbedding(config)
        self.after = after

    def forward(self, x):
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        x = self.block(x, position_embeddings=positions)
        return x if self.after is None else self.after(x)


def doubled(x):
    return 2 * x


def own_layers(overlap="auto"):
    """A PipelineModule of a user's own layers, of which one does more than add the residual stream."""
    from deepspeed.pipe import LayerSpec

    import dualpipe_engine

    config = config_of("mixtral")
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    layers = [
        LayerSpec(torch.nn.Embedding, models.VOCABULARY, config.hidden_size),
        LayerSpec(Own, config, 0),
        LayerSpec(Own, config, 1, doubled),
        LayerSpec(torch.nn.Linear, config.hidden_size, models.VOCABULARY),
    ]
    module = PipelineModule(layers, topology=PipeDataParallelTopology(2, 2), loss_fn=cross_entropy)
    for number, layer in enumerate(module.forward_funcs):
        torch.manual_seed(40 + number + module._local_start)
        for param in layer.parameters():
            torch.nn.init.normal_(param, std=0.3)
    section = {"moe_layer_pattern": r"model\.layers\.\d+\.block\.mlp"}
    engine, *_ = dualpipe_engine.initialize(
        model=module, config=settings("dualpipe", section=section, zero=1, overlap=overlap)
    )
    stream = ((inputs["input_ids"], labels) for inputs, labels in streams(2)[engine.place.replica])
    said = Said()
    logger.addHandler(said)
    losses = [float(engine.train_batch(stream)) for _ in range(2)]
    logger.removeHandler(said)
    unphased = dict(engine.module.dualpipe_unphased)
    found = {"losses": losses, "unphased": unphased, "transfers": len(engine._transfers), "said": said.texts}
    engine.destroy()
    return found


def own_layers_both():
    return [own_layers(), own_layers(overlap=False)]


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
