"""Compiles what tests load as source, once an environment: DeepSpeed's op for ranks of one machine, and our C++ helper.

One process compiles and the others wait for it, so this may run beside whatever needs the result.
"""

import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"

if __name__ == "__main__":
    importlib.import_module("deepspeed.comm.torch").build_shm_op()  # `deepspeed.comm.torch` names torch itself
    from dualpipe_engine.comm.build import build_helper

    build_helper()
