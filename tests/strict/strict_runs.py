"""What runs on the ranks of a strict twin: calls that break a rule each, and training of the engine's tests."""

from __future__ import annotations

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import strict_backend
import torch
import torch.distributed as dist

from dualpipe_engine.comm.communicators import beside, rounds_of
from dualpipe_engine.comm.transport import GroupTransport
from dualpipe_engine.schedule.placement import LINEAR, Placement

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
CPU = torch.device("cpu")


def on_twin(address, rules, call, kwargs):
    """Call a function on the strict twin."""
    with strict_backend.installed(address, **rules):
        return call(**kwargs)


def _ready():
    from deepspeed.accelerator import get_accelerator

    get_accelerator().set_device(0)


def on_device(call, given):
    """Call a function that may use groups before the engine sets the device."""
    _ready()
    return call(**given)


def local_synchronization():
    """Edge groups made by their two ends alone, in the order of the edges."""
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = {}
    for edge in [(a, a + 1) for a in range(size - 1)] + [(a + 1, a) for a in range(size - 1)]:
        if rank in edge:
            groups[edge] = dist.new_group(sorted(edge), use_local_synchronization=True)
    for (src, dst), group in groups.items():
        post = group.send if rank == src else group.recv
        post([torch.zeros(1)], dist.get_group_rank(group, dst if rank == src else src), 0).wait()


def other_order():
    """Two groups, made by one rank in another order."""
    pairs = [[0, 1], [1, 2]]
    for pair in pairs[::-1] if dist.get_rank() == 2 else pairs:
        dist.new_group(pair)


def no_device():
    dist.all_gather_object([None] * dist.get_world_size(), dist.get_rank())


def shared_options():
    options = object()
    for pair in ([0, 1], [1, 2]):
        dist.new_group(pair, pg_options=options)


def timeout():
    dist.all_reduce(torch.ones(1), async_op=True).wait(timedelta(seconds=5))


def both_send_first():
    """Neighbours whose first messages cross, on groups that nobody has connected."""
    group = {edge: dist.new_group([0, 1]) for edge in ((0, 1), (1, 0))}
    rank = dist.get_rank()
    sent = group[rank, 1 - rank].send([torch.zeros(1)], 1 - rank, 0)
    group[1 - rank, rank].recv([torch.zeros(1)], 1 - rank, 0).wait()
    sent.wait()


def too_many_in_flight(count=5):
    """Two neighbours that send `count` messages each before they receive."""
    group = {edge: dist.new_group([0, 1]) for edge in ((0, 1), (1, 0))}
    rank = dist.get_rank()
    work = [group[rank, 1 - rank].send([torch.zeros(1)], 1 - rank, 0) for _ in range(count)]
    work += [group[1 - rank, rank].recv([torch.zeros(1)], 1 - rank, 0) for _ in range(count)]
    for each in work:
        each.wait()


def held_by_a_receive():
    """A receive whose peer sends later, and behind it on the same communicator what the peer waits for."""
    rank = dist.get_rank()
    one, two = torch.zeros(1), torch.ones(1)
    if rank == 0:
        dist.group.WORLD.recv([one], 1, 0)
        dist.group.WORLD.send([two], 1, 1)
    else:
        dist.group.WORLD.recv([one], 0, 1).wait()
        dist.group.WORLD.send([two], 0, 0)


def collectives_differ():
    dist.all_reduce(torch.ones(1 + dist.get_rank()))


def transport(messages=20):
    """The transport of a pipeline, lazy or eager: neighbours exchange messages in both directions."""
    _ready()
    rank, size = dist.get_rank(), dist.get_world_size()
    edges = Placement(LINEAR, size).edges()
    assert len(rounds_of(edges)) <= 4
    line = GroupTransport(range(size), rank, dist.group.WORLD, CPU, edges=edges)
    received = []
    for number in range(messages):
        tickets = []
        for peer in (rank - 1, rank + 1):
            if 0 <= peer < size:
                tickets.append(line.send(torch.tensor([float(1000 * rank + number)]), peer, number))
                received.append((peer, number, torch.empty(1)))
                tickets.append(line.recv(received[-1][2], peer, number))
        for ticket in tickets:
            ticket.wait(60.0)
    line.close()
    return all(int(tensor) == 1000 * peer + number for peer, number, tensor in received)


def train(**kwargs):
    import training

    found = training.train(**kwargs)
    return {key: found[key] for key in ("losses", "norms", "eval_loss", "class")}


def engine_groups(steps, blocks):
    """Groups after start and after steps, those of edges, and how many are left at the end of those that were made for
    the engine and its module; what DeepSpeed shares between engines is not counted."""
    import training
    from deepspeed.utils import groups

    import dualpipe_engine

    world = dist.distributed_c10d._world.pg_map
    start = set(world)
    module = training.make_module(2, blocks)
    before = len(world)
    engine, *_ = dualpipe_engine.initialize(model=module, config=training.settings(4, schedule="dualpipe"))
    counts = [len(world)]
    for _ in range(steps):
        engine.train_batch(training.stream(0))
        counts.append(len(world))
    edges = len(engine._transport._groups)
    engine.destroy()
    left = set(world) - start - {each for each in vars(groups).values() if isinstance(each, dist.ProcessGroup)}
    return [count - before for count in counts], edges, len(left)


def auto(folder, experts, ranks):
    """`auto` in a folder of its own; the groups that its measurement leaves behind."""
    import moe_runs
    import training

    import dualpipe_engine
    from dualpipe_engine.engine.auto.choose import job_costs
    from dualpipe_engine.engine.config import read_config
    from dualpipe_engine.engine.placing.grid import set_device
    from dualpipe_engine.engine.placing.sequences import Sharing

    world = dist.distributed_c10d._world.pg_map
    settings = training.settings(4, 2 if experts else 1, schedule="auto", costs=f"{folder}/costs.json")
    if experts:
        module = moe_runs.make_module(moe_runs.config(blocks=2 * ranks), ranks, 2)
    else:
        module = training.make_module(ranks, 2 * ranks)
    data = moe_runs.Tokens(16)
    set_device(module)
    plain, config = read_config(settings)
    before = len(world)
    job_costs(module, plain, config, 4, Sharing(), data)
    left = len(world) - before
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings, training_data=data)
    losses = [float(engine.train_batch(training.stream(0))) for _ in range(2)]
    return left, losses


class Pair(torch.nn.Module):
    """A layer that takes and passes on hidden states with a mask and a second tensor that learns."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, given):
        x, mask, extra = given if isinstance(given, tuple) else (given, given > 0, given[:, :3])
        return x + torch.tanh(self.linear(x)) * mask, ~mask, extra * 0.5 + x[:, :3]


def several_tensors(config, ranks, lengths=(2,)):
    """Losses of stages that pass on several tensors of so many rows, by micro-batch; then one of evaluation."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    import dualpipe_engine

    torch.manual_seed(7)
    module = PipelineModule(
        [LayerSpec(Pair) for _ in range(2 * ranks)],
        num_stages=ranks,
        loss_fn=lambda out, y: (out[0] + y).pow(2).mean() + out[2].mean(),
        dynamic_shape=len(lengths) > 1,
    )
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    draw = torch.Generator().manual_seed(3)
    data = (torch.randn(2, rows, 8, generator=draw).unbind() for rows in itertools.cycle(lengths))
    return [float(engine.train_batch(data)) for _ in range(2)] + [float(engine.eval_batch(data))]


def moe_gradients(**kwargs):
    import moe_runs

    return moe_runs.gradients(**kwargs)


def sequence_gradients(**kwargs):
    import sequence_runs

    return sequence_runs.gradients(**kwargs)


def sequence_auto(**kwargs):
    import sequence_runs

    return sequence_runs.auto(**kwargs)


def train_from(**kwargs):
    import checkpoint_runs

    return checkpoint_runs.train_from(**kwargs)


def moe(**kwargs):
    import moe_runs
    from deepspeed.utils import groups

    found = moe_runs.train(**kwargs)
    rows = groups._get_expert_parallel_group("ep_size_2")
    return {key: found.get(key) for key in ("replica", "losses", "norm", "same", "resumed")} | {
        "counts_apart": beside(rows) is not rows
    }


def deepseek():
    sys.path.insert(0, str(Path(__file__).parents[1] / "compat"))
    import deepseek_runs

    _ready()
    return deepseek_runs.subgroup(5)


def part_gradients(**kwargs):
    sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
    import part_runs

    return part_runs.each(**kwargs)


def survived(**kwargs):
    sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
    import failure_runs

    return failure_runs.survived(**kwargs)
