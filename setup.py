"""Packaging. `integrations/` and `csrc/` lie beside the package and install as parts of it."""

import warnings
from pathlib import Path

from setuptools import find_packages, setup

SOURCES = ["csrc/ticket.cpp", "csrc/stream.cpp", "csrc/module.cpp"]


def extension():
    """Arguments for the C++ helper, where torch is there at install; else it is built on first use (comm/stream.py)."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                warnings.warn(f"dualpipe_engine._comm was not built: {error}", stacklevel=1)

    flags = ["-O2", "-g0", "-Wall", "-Wextra", *(f"-isystem{path}" for path in include_paths())]
    helper = CppExtension("dualpipe_engine._comm", SOURCES, extra_compile_args=flags, optional=True)
    return {"ext_modules": [helper], "cmdclass": {"build_ext": OptionalBuild}}


INTEGRATIONS = [f"dualpipe_engine.integrations{part}" for part in ("", ".lightning", ".transformers")]
HF = ["transformers>=5", "accelerate", "peft", "safetensors"]
PYTEST = ["pytest", "pytest-xdist", "pytest-randomly"]
LIGHTNING = ["lightning>=2.6"]

setup(
    name="dualpipe_engine",
    version="0.1.0",
    description="DualPipe, DualPipeV and zero-bubble pipeline schedules for DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dualpipe_engine", "dualpipe_engine.*"]), *INTEGRATIONS, "dualpipe_engine.csrc"],
    package_dir={"dualpipe_engine.integrations": "integrations", "dualpipe_engine.csrc": "csrc"},
    package_data={"dualpipe_engine": ["py.typed"], "dualpipe_engine.csrc": ["*.cpp", "*.h"]},
    **extension(),
    # The engine overrides methods of DeepSpeed's PipelineEngine, which change between minor versions.
    install_requires=["torch>=2.8", "deepspeed>=0.19.8,<0.20", "pybind11", "numpy", "rich", "matplotlib"],
    extras_require={
        "hf": HF,
        "lightning": LIGHTNING,
        "test": [*PYTEST, "hypothesis", "ruff", "mypy", "tensorboard", *HF, *LIGHTNING],
    },
    entry_points={"console_scripts": ["dualpipe = dualpipe_engine.cli:main"]},
)
