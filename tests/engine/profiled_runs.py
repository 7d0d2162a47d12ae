"""Profiled training runs that tests start on pooled ranks."""

from __future__ import annotations

import json

import pytest
import torch
from training import make_module, settings, stream

from dualpipe_engine.errors import ProfileError


def profiled(folder, schedule="dualpipe", ranks=4, late=False, replicas=1):
    """Train with profiling on; returns the first rank's summary text and file, None elsewhere."""
    import io
    from contextlib import redirect_stdout

    import dualpipe_engine
    from dualpipe_engine.utils import disable_profiling, enable_profiling, get_profiler

    if not late:
        enable_profiling(log_dir=folder, steps=3)
    module = make_module(ranks, 2 * ranks, replicas=replicas)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings(8, replicas, schedule=schedule))
    data = stream(engine.data_rank)
    engine.train_batch(data)
    if late:
        enable_profiling(log_dir=folder, steps=3)
    for _ in range(4):
        engine.train_batch(data)
    out = io.StringIO()
    with redirect_stdout(out):
        get_profiler().print_summary()
    path = get_profiler().save_to_file("dualpipe_profile.json")
    profiler = get_profiler()
    disable_profiling()
    engine.train_batch(data)
    first = torch.distributed.get_rank() == 0
    return out.getvalue(), str(path), len(profiler._batches), json.loads(path.read_text()) if first else None


def ranges():
    """Names that torch.profiler sees while an engine trains."""
    from torch.profiler import ProfilerActivity, profile

    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(model=make_module(2, 4), config=settings(4, schedule="dualpipe"))
    data = stream(0)
    engine.train_batch(data)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        engine.train_batch(data)
    program = [str(op) for op in engine.plan.programs[engine.place.rank]]
    return {event.key for event in found.key_averages()}, program


def alone(folder):
    """Only the first rank asks for the summary."""
    import dualpipe_engine
    from dualpipe_engine.utils import disable_profiling, enable_profiling, get_profiler

    with pytest.raises(ProfileError, match="enable_profiling"):
        get_profiler()
    enable_profiling(log_dir=folder, steps=1, timeout_s=3)
    with pytest.raises(ProfileError, match="no step"):
        get_profiler().print_summary()
    engine, *_ = dualpipe_engine.initialize(model=make_module(2, 4), config=settings(4, schedule="dualpipe"))
    engine.train_batch(stream(0))
    text = ""
    try:
        if torch.distributed.get_rank() == 0:
            get_profiler().collect()
    except dualpipe_engine.PipelineRuntimeError as error:
        text = str(error)
    finally:
        disable_profiling()
    return text


def offsets():
    """Clock offsets with this rank's clock put forward by known seconds."""
    import time

    from dualpipe_engine.profiling.clocks import clock_offset

    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    real = clock_offset(group)
    return real, clock_offset(group, lambda: time.monotonic() + 100.0 * rank)
