"""CPU seconds of every test and shared fixture, beside what `budget.toml` allows them.

CPU seconds (user and system, of the test's process and of those that it started and waited for) rather than seconds on
the clock, which depend on what else the machine does. A fixture that several tests share is counted by itself, not with
the test that happened to come first. Nothing fails here: the summary at the end names what takes more than it may, and
`.ci/budget.py` compares the totals.
"""

import json
import os
import resource
import tomllib
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("budget.toml")
SLOWEST = 20


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended and were waited for."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(p.ru_utime + p.ru_stime for p in parts)


class Budget:
    """A plugin of pytest, of every process of pytest-xdist and of the one that they report to."""

    def __init__(self) -> None:
        allowed = tomllib.loads(FILE.read_text())
        self.default: float = allowed["default"]
        self.left_out: set[str] = set(allowed["thorough"])
        self.allowed: dict[str, float] = {**allowed["thorough"], **allowed["tests"]}
        self.totals: dict[str, float] = allowed["totals"]
        self.last = cpu_seconds()
        #: CPU seconds spent in the fixtures that are being set up, one below the other.
        self.nested: list[float] = []
        self.fixtures: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.workers = 0.0
        self.thorough = 0.0

    # ---- in the process that runs a test

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        """Mark what `make test` leaves out, before pytest looks at marks."""
        for item in items:
            if not self.left_out.isdisjoint((item.nodeid, item.nodeid.split("[")[0], item.nodeid.split("::")[0])):
                item.add_marker("thorough")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        """Count a shared fixture by itself: without those that it asked for, and not with the test."""
        if fixturedef.scope == "function":
            return (yield)
        start = cpu_seconds()
        self.nested.append(0.0)
        try:
            return (yield)
        finally:
            whole = cpu_seconds() - start
            name = f"{fixturedef.baseid}::{fixturedef.argname} (fixture)"
            self.fixtures[name] = self.fixtures.get(name, 0.0) + whole - self.nested.pop()
            if self.nested:
                self.nested[-1] += whole
            else:
                self.last += whole

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Send the seconds of a phase with its report, which pytest-xdist carries as it is."""
        report = yield
        now = cpu_seconds()
        report.cpu_seconds = {item.nodeid: now - self.last, **self.fixtures}
        report.is_thorough = item.get_closest_marker("thorough") is not None
        self.last = now
        self.fixtures = {}
        return report

    @pytest.hookimpl
    def pytest_sessionfinish(self, session):
        """Send what this worker took in all, imports and collection included."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu_seconds"] = cpu_seconds()

    # ---- in the process that prints

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Add what a worker took in all: none of it if it died."""
        self.workers += getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0)

    def pytest_runtest_logreport(self, report):
        """Add up the phases of each test."""
        for name, seconds in report.cpu_seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if report.is_thorough:
            self.thorough += report.cpu_seconds[report.nodeid]

    def pytest_terminal_summary(self, terminalreporter):
        """Print the slowest, those above their budget, and the total."""
        if not self.seconds:
            return
        out = terminalreporter
        out.section("CPU seconds")
        slowest = sorted(self.seconds.items(), key=lambda entry: -entry[1])
        for name, seconds in slowest[:SLOWEST]:
            out.write_line(f"{seconds:8.1f}  {name}")
        over = [(name, seconds) for name, seconds in slowest if seconds > self.budget(name)]
        for name, seconds in over:
            out.write_line(f"above its budget of {self.budget(name):g} ({FILE.name}): {name}, {seconds:.1f}")
        # Workers of pytest-xdist are children of this process, which may not have waited for them yet.
        total = max(cpu_seconds(), self.workers)
        # What shared fixtures, imports and collection took counts as if `make test` needed all of it.
        totals = {"make test": total - self.thorough}
        if self.thorough:
            totals["make test-all"] = total
        for what, seconds in totals.items():
            out.write_line(f"{seconds:8.1f}  {what}, of {self.totals[what]} that it may take")
        if where := os.environ.get("CPU_SECONDS_JSON"):
            Path(where).write_text(json.dumps({"totals": totals, "tests": dict(slowest)}, indent=1))

    def budget(self, name: str) -> float:
        """CPU seconds that a test, or each of its cases if they have no own line, may take."""
        return self.allowed.get(name, self.allowed.get(name.split("[")[0], self.default))
