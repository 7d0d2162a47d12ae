"""Functions of tests/gpu on pooled ranks, which know neither the folder nor that it runs on the CPU."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

FOLDER = str(Path(__file__).parent / "gpu")


def on_cpu(module, name, **arguments):
    os.environ["DUALPIPE_GPU_CHECK"] = "cpu"
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    return getattr(importlib.import_module(module), name)(**arguments)
