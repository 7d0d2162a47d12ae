"""Small models and training runs that the engine tests start on pooled ranks."""

from __future__ import annotations

import copy
import gc
import zlib

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

VOCABULARY, WIDTH, LENGTH = 17, 8, 5


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    @property
    def weight(self):
        return self.table.weight

    def forward(self, tokens):
        return self.table(tokens)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def head(module, x):
    return nn.functional.linear(x, module.weight)


def scale(x):
    return x * 1.5


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_layers(blocks, tied=True):
    """LayerSpec, TiedLayerSpec with forward_fn, nn.Module and a plain callable."""
    first = TiedLayerSpec("embed", Embed, tied_weight_attr="weight") if tied else LayerSpec(Embed)
    last = (
        TiedLayerSpec("embed", Embed, forward_fn=head, tied_weight_attr="weight")
        if tied
        else LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    )
    return [first, scale, *[LayerSpec(Block) for _ in range(blocks)], nn.LayerNorm(WIDTH), last]


def make_module(ranks, blocks, tied=True, replicas=1, **kwargs):
    """Weights depend on the layer alone, not on the ranks that layers are cut among."""
    module = PipelineModule(
        layers=make_layers(blocks, tied),
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=cross_entropy,
        **kwargs,
    )
    for name, part in module.named_modules():
        if hasattr(part, "reset_parameters"):
            torch.manual_seed(zlib.crc32(name.encode()))
            part.reset_parameters()
    return module


def settings(micros, replicas=1, zero=1, precision="fp32", schedule=None, clip=1.0, **pipeline):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0.005, "warmup_num_steps": 5, "warmup_max_lr": 0.01},
        },
        "zero_optimization": {"stage": zero},
        "gradient_clipping": clip,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        if zero:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if schedule:
        config["pipeline"] = {"schedule": schedule, **pipeline}
    return config


def stream(replica, seed=3):
    """Micro-batches of one replica, without end: next-token prediction on a repeating pattern with noise."""
    generator = torch.Generator().manual_seed(1000 * seed + replica)
    while True:
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
        tokens = (tokens // 6) * 6 % VOCABULARY
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def weights(engine):
    return {name: param.detach().float().clone() for name, param in engine.module.named_parameters()}


def digest(tensor):
    return zlib.crc32(tensor.numpy().tobytes())


def optimizer_bytes(engine):
    inner = engine.optimizer
    state = getattr(inner, "optimizer", inner).state
    return sum(
        value.numel() * value.element_size()
        for entry in state.values()
        for value in entry.values()
        if torch.is_tensor(value) and value.numel() > 1
    )


def each(call, cases):
    """What `call` returns for each case, one after another on the same ranks: a start serves them all."""
    found = {}
    for name, case in cases.items():
        try:
            found[name] = call(**case)
        except Exception as error:
            raise RuntimeError(f"in case {name!r}") from error
    return found


def refusals(call, cases):
    """Type and sentence of the error of each case, which all ranks raise."""
    from dualpipe_engine.errors import DualPipeError

    found = {}
    for name, case in cases.items():
        try:
            call(**case)
        except DualPipeError as error:
            found[name] = (type(error).__name__, str(error))
        else:
            raise AssertionError(f"{name!r} is not refused")
    return found


def train(config, ranks, replicas=1, steps=2, blocks=None, tied=True, module_kwargs=None):
    """Train and return what parity tests compare."""
    import dualpipe_engine

    module = make_module(ranks, blocks or 2 * ranks, tied, replicas, **(module_kwargs or {}))
    replica = module._grid.data_parallel_id
    engine, _, _, scheduler = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    data = stream(replica)
    losses, norms, digests = [], [], []
    for _ in range(steps):
        losses.append(float(engine.train_batch(data)))
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
        digests.append({name: digest(value) for name, value in weights(engine).items()})
    evaluated = engine.eval_batch(stream(replica, seed=5), return_logits=True)
    found = {
        "losses": losses,
        "norms": norms,
        "digests": digests,
        "lr": scheduler.get_last_lr(),
        "weights": weights(engine),
        "optimizer_bytes": optimizer_bytes(engine),
        "offloaded": getattr(engine.optimizer, "cpu_offload", False),
        "eval_loss": float(evaluated[0]),
        "logits": None if evaluated[1] is None else evaluated[1].clone(),
        "class": type(engine).__name__,
        "samples": engine.global_samples,
    }
    engine.destroy()
    return found


def gradients(config, ranks, module_kwargs=None):
    """Weights, and the reduced float64 gradients of one batch."""
    import dualpipe_engine

    module = make_module(ranks, 2 * ranks, **(module_kwargs or {})).double()
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    found = {}

    def capture():
        found.update({name: param.grad.clone() for name, param in engine.module.named_parameters()})

    engine._exec_optimizer_step = capture
    loss = engine.train_batch(stream(0))
    share = engine.weight_split.share if engine._store else 0.0
    engine.destroy()
    return {"start": start, "grads": found, "loss": float(loss), "share": share}


def sequential_gradients(ranks, micros, start):
    """The oracle: one process, all layers, micro-batches one after another."""
    module = make_module(1, 2 * ranks).double()
    module.load_state_dict(start)
    data = stream(0)
    total = 0.0
    for _ in range(micros):
        inputs, labels = next(data)
        loss = cross_entropy(module(inputs), labels) / micros
        loss.backward()
        total += float(loss)
    return {"grads": {name: param.grad.clone() for name, param in module.named_parameters()}, "loss": total}


def built_weights(ranks, schedule, seed_layers, method):
    """Weights right after construction and right after the conversion, and the random state in between."""
    import dualpipe_engine

    module = make_module(ranks, 2 * ranks, seed_layers=seed_layers, partition_method=method)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    state = torch.get_rng_state()
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings(4, schedule=schedule))
    assert engine.module is module
    found = {
        "before": before,
        "after": weights(engine),
        "same_random_state": torch.equal(state, torch.get_rng_state()),
        "parts": module.parts,
        "stages": engine.place.stages,
        "names": [name for name, _ in module.named_parameters()],
        "class": type(module).__name__,
    }
    engine.destroy()
    return found


def fails(config, ranks=4, blocks=8, replicas=1, alike=False):
    """Initialize with a configuration that cannot work; every rank must raise, and with `alike` know that all do, so
    that none takes another for lost."""
    import dualpipe_engine
    from dualpipe_engine.errors import DualPipeError

    try:
        dualpipe_engine.initialize(model=make_module(ranks, blocks, replicas=replicas), config=config)
    except DualPipeError as error:
        assert error.everywhere or not alike, error
        raise


def grouped(ranks, how):
    """Parameter groups or an optimizer that the user built over the PipelineModule's own parameters."""
    import dualpipe_engine

    module = make_module(ranks, 2 * ranks)
    decayed = [param for name, param in module.named_parameters() if param.dim() > 1]
    others = [param for name, param in module.named_parameters() if param.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    config = settings(4, schedule="dualpipe")
    kwargs = {}
    if how == "groups":
        kwargs["model_parameters"] = groups
    elif how == "list":
        kwargs["model_parameters"] = filter(lambda param: param.requires_grad, module.parameters())
    else:
        del config["optimizer"]
        kwargs["optimizer"] = torch.optim.Adam(groups, lr=0.01)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config, **kwargs)
    names = {id(param): name for name, param in engine.module.named_parameters()}
    bit16 = engine.optimizer.bit16_groups
    losses = [float(engine.train_batch(stream(0))) for _ in range(2)]
    found = {
        "how": how,
        "groups": [sorted(names[id(param)] for param in group) for group in bit16],
        "decay": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "all": sorted(names.values()),
        "losses": losses,
    }
    engine.destroy()
    return found


def odd_ends(ranks):
    """Each end of the pipeline reads other data."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(
        model=make_module(ranks, 2 * ranks), config=settings(4, schedule="dualpipe")
    )
    engine.train_batch(stream(engine.place.rank))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = (torch.arange(LENGTH + 1) * (index % 5 + 1)) % VOCABULARY
        return tokens[:-1], tokens[1:]


def features(ranks, replicas=1):
    """training_data, eval in all its forms, changed batch size, timeline."""
    import dualpipe_engine
    from dualpipe_engine.schedule.op import COMPUTE

    module = make_module(ranks, 2 * ranks, replicas=replicas)
    config = settings(4, replicas, schedule="dualpipe")
    engine, *_ = dualpipe_engine.initialize(model=module, config=config, training_data=Rows())
    found = {"losses": [float(engine.train_batch()) for _ in range(3)]}
    measured = engine.timeline()
    found["ops"] = sorted(str(span.op) for span in measured.spans if span.op.kind in COMPUTE)
    found["simulated"] = engine.simulated(measured).makespan
    data = stream(0, seed=9)
    micro = [next(data) for _ in range(4)]
    found["eval"] = float(engine.eval_batch(iter(micro)))
    found["list"] = engine.eval_batch(iter(micro), reduce_output=None)
    found["logits"] = engine.eval_batch(iter(micro), compute_loss=False, reduce_output=None)
    found["mean_logits"] = engine.eval_batch(iter(micro), compute_loss=False)
    found["only_last"] = engine.eval_batch(iter(micro), bcast_loss=False)
    engine.set_train_batch_size(2 * 6 * replicas)
    found["more"] = float(engine.train_batch())
    found["plan"] = engine.plan.num_micro
    found["ends"] = (engine.reads_inputs, engine.reads_labels)
    engine.data_iterator = engine.training_dataloader = None  # ends the loader's worker processes
    gc.collect()
    return found


def differs(what):
    """Initialize with something else on rank 1; every rank must raise."""
    import dualpipe_engine

    module, config = make_module(4, 4), settings(4, schedule="dualpipe")
    if torch.distributed.get_rank() == 1:
        if what == "key":
            config["optimizer"]["params"]["lr"] = 0.5
        elif what == "absent":
            del config["gradient_clipping"]
        elif what == "layer":
            module._layer_specs[2] = LayerSpec(nn.Linear, WIDTH, WIDTH)
    if what == "frozen":
        place = dualpipe_engine.engine.initialize.place

        def frozen(placed, *args):
            found = place(placed, *args)
            if torch.distributed.get_rank() == 0:
                placed.get_submodule("2").up.weight.requires_grad_(False)
            return found

        dualpipe_engine.engine.initialize.place = frozen
        try:
            dualpipe_engine.initialize(model=module, config=config)
        finally:
            dualpipe_engine.engine.initialize.place = place
    dualpipe_engine.initialize(model=module, config=config)


def tells_ranks_apart():
    """Initialize with the rank in the configuration, as DeepSpeed's own tests do."""
    import dualpipe_engine

    config = settings(4, schedule="dualpipe") | {"local_rank": torch.distributed.get_rank()}
    engine, *_ = dualpipe_engine.initialize(model=make_module(4, 4), config=config)
    return type(engine).__name__


def reads_another(pipeline):
    """Initialize with another "pipeline" section on rank 1, or with none."""
    import dualpipe_engine

    config = settings(4, schedule="dualpipe")
    if torch.distributed.get_rank() == 1:
        config.pop("pipeline")
        config |= {} if pipeline is None else {"pipeline": pipeline}
    dualpipe_engine.initialize(model=make_module(2, 4), config=config)
