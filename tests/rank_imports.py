# ruff: noqa: F401
"""What processes that play ranks have imported before they are forked; importing it takes seconds, a fork milliseconds.

No thread may be alive after it: a fork takes along only the one that calls it.
"""

import gc
import importlib
import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1")

import deepspeed
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.zero.muon.muon_optimizer
import hypothesis
import pytest
import torch
import torch._dynamo.variables
import torch._inductor.compile_fx  # DeepSpeed's choice of an optimizer imports it
import torch.utils.cpp_extension
import transformers.modeling_utils

import dualpipe_engine.adapters.adapter
import dualpipe_engine.engine.auto.choose
import dualpipe_engine.engine.initialize

torch.set_num_threads(1)

# Ranks of one machine would share memory by an op that is compiled at first use, and that a killed test leaves locked.
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # `deepspeed.comm.torch` names torch itself

# Half precision is slow on most CPUs, and right on all.
type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True

gc.freeze()  # a collection in a rank would go through all of this, and copy its memory
