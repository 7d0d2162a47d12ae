"""Pytest plugin: shows how far a run is and how long it may take, and holds single tests to a budget.

A test may take 30 times as long as a fixed piece of work, timed right after it in the same process, so that the verdict
depends neither on the machine nor on what else it does. What fixtures take is shown, not judged, and so are tests that
only `--all` runs.
"""

from __future__ import annotations

import time
from collections import defaultdict

import pytest

FACTOR = 30.0
WORTH_TIMING_S = 10.0  #: a shorter test is within the budget on any machine that is fast enough to be worked on
EVERY_S = 15.0  #: seconds between two lines of progress
SHOWN = 10
WORK = "fixed_work_seconds"
CACHED = "budget/seconds"


def fixed_work() -> float:
    """Seconds that a fixed piece of work takes: about a second on a core of 2.4 GHz."""
    start = time.perf_counter()
    rows = [[float(row * column % 7) for column in range(60)] for row in range(60)]
    for _ in range(80):
        columns = list(zip(*rows, strict=True))
        rows = [[sum(a * b for a, b in zip(row, column, strict=True)) % 7.0 for column in columns] for row in rows]
    return time.perf_counter() - start


class Worker:
    """Times the fixed work beside each long test, in the process that runs it."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if report.when == "call" and report.duration > WORTH_TIMING_S:
            report.user_properties.append((WORK, fixed_work()))
        return report


class Budget:
    """Collects what all processes report, shows progress, and judges at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._cache = getattr(config, "cache", None)  # `-p no:cacheprovider` leaves it out
        self._expected: dict[str, float] = self._cache.get(CACHED, {}) if self._cache else {}
        self._running: dict[str, None] = {}
        self._seconds: dict[str, float] = {}
        self._fixtures: dict[str, float] = defaultdict(float)  # of a file
        self._done: set[str] = set()
        self._tests: list[str] = []
        self._start = self._shown = time.monotonic()
        self.over: dict[str, float] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # none where xdist's workers collect
            self._tests = [item.nodeid for item in session.items]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._tests = list(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport):
        """No dot for what passes."""
        return ("passed" if report.when == "call" else "", "", "PASSED") if report.passed else None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._seconds[report.nodeid] = report.duration
            work = dict(report.user_properties).get(WORK)
            if work is not None and report.duration > FACTOR * work and "all" not in report.keywords:
                self.over[report.nodeid] = report.duration / work
        else:
            self._fixtures[report.nodeid.split("::")[0]] += report.duration
        if report.when != "teardown":
            return
        self._running.pop(report.nodeid, None)
        self._done.add(report.nodeid)
        now = time.monotonic()
        if now - self._shown >= EVERY_S:
            self._shown = now
            self._config.get_terminal_writer().line(self._progress(now - self._start))

    def _progress(self, gone: float) -> str:
        done, count = len(self._done), max(len(self._tests), 1)
        known = [self._expected[test] for test in self._tests if test in self._expected]
        usual = sum(known) / len(known) if known else 1.0  # of a test that has not run here before
        whole = sum(self._expected.get(test, usual) for test in self._tests)
        past = sum(self._expected.get(test, usual) for test in self._done)
        left = gone * (whole - past) / past if past else 0.0
        running = ", ".join(self._running) or "the next one"
        return f"{done}/{count} tests, {_clock(gone)} gone, about {_clock(left)} to go, now {running}"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._cache:
            self._cache.set(CACHED, self._expected | {test: round(took, 2) for test, took in self._seconds.items()})
        if self.over and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        folders: dict[str, float] = defaultdict(float)
        for test, seconds in self._seconds.items():
            folders[test.split("::")[0].rpartition("/")[0]] += seconds
        for title, found in (("tests", self._seconds), ("folders", folders), ("files' fixtures", self._fixtures)):
            terminalreporter.section(f"{SHOWN} slowest {title}")
            for name, seconds in sorted(found.items(), key=lambda item: -item[1])[:SHOWN]:
                terminalreporter.write_line(f"{seconds:8.1f} s  {name}")
        if self.over:
            terminalreporter.section(f"over the budget of {FACTOR:.0f} times the fixed work")
            for name, times in self.over.items():
                terminalreporter.write_line(f"{times:8.0f} x  {name}: make it smaller, or mark it with pytest.mark.all")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker())
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget(config))
