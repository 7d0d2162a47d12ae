"""The C++ helper, and the folders beside the package that install as parts of it. The rest is in pyproject.toml."""

import warnings

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


PACKAGE = find_packages(include=["dualpipe_engine", "dualpipe_engine.*"])
INTEGRATIONS = ["integrations", *(f"integrations.{part}" for part in find_packages("integrations"))]

setup(
    packages=[*PACKAGE, *(f"dualpipe_engine.{part}" for part in INTEGRATIONS), "dualpipe_engine.csrc"],
    package_dir={"dualpipe_engine.integrations": "integrations", "dualpipe_engine.csrc": "csrc"},
    package_data={"dualpipe_engine": ["py.typed"], "dualpipe_engine.csrc": ["*.cpp", "*.h"]},
    **extension(),
)
