"""Packaging. `integrations/` lies beside the package and installs as `dualpipe_engine.integrations`."""

from pathlib import Path

from setuptools import find_packages, setup

INTEGRATIONS = ["dualpipe_engine.integrations", "dualpipe_engine.integrations.lightning"]

setup(
    name="dualpipe_engine",
    version="0.1.0",
    description="DualPipe, DualPipeV and zero-bubble pipeline schedules for DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["dualpipe_engine", "dualpipe_engine.*"]), *INTEGRATIONS],
    package_dir={"dualpipe_engine.integrations": "integrations"},
    package_data={"dualpipe_engine": ["py.typed"]},
    # The engine overrides methods of DeepSpeed's PipelineEngine, which change between minor versions.
    install_requires=["torch>=2.8", "deepspeed>=0.19.8,<0.20", "pybind11", "numpy", "rich", "matplotlib"],
    extras_require={
        "hf": ["transformers>=5", "accelerate", "peft"],
        "lightning": ["lightning>=2.6"],
        "test": ["pytest", "hypothesis", "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["dualpipe = dualpipe_engine.cli:main"]},
)
