import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings
from ranks import Ranks

pytest_plugins = ["budget"]

settings.register_profile("short", max_examples=40, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked `all` too, which take long")
    parser.addoption("--twin", action="store_true", help="let ranks talk by NCCL's rules (tests/strict), not over gloo")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Files that start ranks take the longest: first, so that the last ones are short and both workers end together.
    start_ranks = {item.path for item in items if "ranks" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in start_ranks)
    marks = [] if config.getoption("--all") else ["all"]
    marks += ["gloo"] if config.getoption("--twin") else []
    left_out = {item for item in items if any(map(item.get_closest_marker, marks))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart(session: pytest.Session) -> None:
    """A process that was killed while DeepSpeed built its shared-memory op has left a lock, on which all would wait."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > 180:
        lock.unlink()


@pytest.fixture(scope="session")
def deepspeed_op() -> None:
    """What DeepSpeed compiles at its first start on a CPU is there, for tests whose processes start by themselves."""
    subprocess.run([sys.executable, Path(__file__).with_name("compile_first.py")], check=True)


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Ranks:
    if pytestconfig.getoption("--twin"):
        from strict_ranks import TwinRanks

        found: Ranks = TwinRanks()
    else:
        found = Ranks()
    found.run(1, os.getpid)  # the imports belong to no test
    return found
