"""Runs that ask an engine what clients ask."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

from changed_runs import built, data, fill, settings
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.utils.data import IterableDataset

from dualpipe_engine.engine.methods import REFUSED, REFUSED_ATTRIBUTES
from dualpipe_engine.errors import DualPipeError


def load_tables():
    path = Path(__file__).parents[2] / "docs" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _engine(schedule):
    import dualpipe_engine

    net = built()
    fill(net)
    config = settings(schedule, zero_optimization={"stage": 1}, gradient_clipping=1.0)
    if schedule is None:
        del config["pipeline"]
    engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
    return engine


def answers(schedule, names):
    """What methods without arguments return after a step, and attributes hold; as text."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine, tables = _engine(schedule), load_tables()
    engine.train_batch(data())
    asked = [name for name, method in vars(DeepSpeedEngine).items() if tables.reads_configuration(method)]
    found = {}
    for name in (*asked, *names):
        try:
            value = getattr(engine, name)
            found[name] = repr(value() if callable(value) else value)
        except Exception as error:
            found[name] = type(error).__name__
    return {name: text for name, text in found.items() if " at 0x" not in text}


def refused():
    """What each refused name says."""
    engine, said = _engine("dualpipe"), {}
    for name in (*REFUSED, *REFUSED_ATTRIBUTES):
        try:
            getattr(engine, name)()
        except DualPipeError as error:
            said[name] = str(error)
    return said, hasattr(engine, "pipe_buffers")


def sizes():
    """What sizes of batches that cannot be are answered with, and data that cannot be read."""
    import dualpipe_engine

    engine, said = _engine("dualpipe"), []
    before = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
    calls = [partial(engine.set_train_micro_batch_size, size) for size in (0, -2, 2.0)]
    for call in (*calls, *(partial(engine.set_train_batch_size, size) for size in (0, 7, 8.0))):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    of_data = [
        lambda: dualpipe_engine.initialize(model=built(), config=settings("dualpipe"), training_data=Endless()),
        lambda: engine.train_batch([next(data()) for _ in range(4)]),
    ]
    for call in of_data:
        try:
            call()
        except DualPipeError as error:
            said.append(str(error))
    return said, (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == before


class Endless(IterableDataset):
    def __iter__(self):
        return data()


def seen(schedule):
    """The pipeline as a client sees it, and a step with larger micro-batches."""
    engine = _engine(schedule)
    grid, last = engine.grid, engine.num_stages - 1
    found = {
        "stages": (engine.num_stages, engine.stage_id, engine.prev_stage, engine.next_stage),
        "grid": (grid.get_pipe_parallel_rank(), grid.get_data_parallel_rank(), grid.stage_to_global(last)),
        "ranks": (
            engine.get_pipeline_parallel_rank(),
            (engine if schedule else grid).get_data_parallel_rank(),  # stock asserts that it is no pipeline
            (engine if schedule else grid).get_model_parallel_rank(),
            engine.get_tensor_parallel_rank() if schedule else grid.get_slice_parallel_rank(),
            engine.global_rank,
        ),
        "parallel": (engine.is_pipe_parallel, engine.is_data_parallel, engine.is_model_parallel),
        "ends": (engine.is_first_stage(), engine.is_last_stage()),
        "micro": engine.micro_batch_size,
    }
    found["reads"] = None if schedule is None else (engine.reads_inputs, engine.reads_labels)
    engine.set_train_micro_batch_size(3)
    found["sizes"] = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()
    if schedule is not None:
        engine.set_dataiterator(data())
        found["iterates"] = engine.data_iterator is not None
        engine.set_dataloader([next(data()) for _ in range(engine.micro_batches)])
        found["loss"] = float(engine.train_batch())
    return found


class Counting(PipelineEngine):
    """A client's own engine."""

    def __init__(self, *args, **kwargs):
        self.batches = 0
        super().__init__(*args, **kwargs)

    def train_batch(self, data_iter=None):
        self.batches += 1
        return super().train_batch(data_iter)


def own_engine():
    """A client's engine trains with our schedule; made by the client itself it is refused."""
    import dualpipe_engine
    from dualpipe_engine.engine.initialize import refuse_other_engines

    config, losses = settings("dualpipe"), []
    for engine_class in (None, Counting):
        net = built()
        fill(net)
        engine, *_ = dualpipe_engine.initialize(
            model=net, config=config, model_parameters=net.parameters(), engine_class=engine_class
        )
        losses.append(float(engine.train_batch(data())))
    refuse_other_engines()
    try:
        Counting(args=None, model=built(), config=config, config_class=DeepSpeedConfig(config))
    except DualPipeError as error:
        return losses, engine.batches, type(engine).__mro__[0].__name__, str(error)
