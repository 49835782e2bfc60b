"""How the tests are dealt out to processes, and what is said of them while they run.

A suite is what gets a line of its own: a file of tests, and tests/unit as a whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Generator
from contextlib import suppress

import psutil
import pytest
from _pytest.terminal import TerminalReporter
from xdist.scheduler import LoadScopeScheduling

LONGEST = {"test_site.py"}  # the files that take longest in their folders
FREE_GB = 14  # of which hosts want 8 free once more when they look


def suite_of(nodeid: str) -> str:
    """Return the suite of a test."""
    file = nodeid.split("::")[0]
    return "tests/unit" if file.startswith("tests/unit/") else file


def scope_of(nodeid: str) -> str:
    """Return what stays together in one process with a test."""
    file = nodeid.split("::")[0]
    folder = file.split("/")[1]
    if folder in ("s3", "spark", "cli", "browser"):
        return "loopback"
    # Its hosts are others: they come up beside those that follow one another.
    is_apart = file.endswith("hosts/test_machines.py")
    return folder if folder == "hosts" and not is_apart else file


class Scheduling(LoadScopeScheduling):
    """Deal out the tests in the order in which they were collected, in parts that stay together.

    One process gets tests/hosts, which takes from the beginning to the end and often waits, for a
    host that is lost or an S3 that hangs: so three processes suit two cores. The unit tests come
    first on the others, file by file. Then one gets what needs a cluster on loopback, which is thus
    started once; the files of tests/aws go to whichever has room.
    """

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)


class Meter:
    """Measures, where tests run, what each suite costs: processor time, also of its processes.

    It is the least that was used: executors that outlive their worker for a moment are not seen.
    """

    def __init__(self) -> None:
        self.before = processor_seconds()
        self.is_last = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        self.is_last = nextitem is None or suite_of(nextitem.nodeid) != suite_of(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self.is_last and call.when == "teardown":
            now = processor_seconds()
            report.processor_seconds = now - self.before
            self.before = now
        return report


def processor_seconds() -> float:
    """Return what this process and all below it have used, those that have ended included."""
    used = 0.0
    mine = psutil.Process()
    for process in (mine, *mine.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


class Suites:
    """Says of each suite how it ended once it has, of a failure all that is known, at once."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.to_do: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.processor_seconds: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = {}

    @property
    def reporter(self) -> TerminalReporter:
        return self.config.pluginmanager.getplugin("terminalreporter")

    def pytest_sessionstart(self) -> None:
        free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
        if self.config.args_source is pytest.Config.ArgsSource.TESTPATHS and free < FREE_GB:
            raise pytest.UsageError(
                f"All tests together need {FREE_GB} GB of free disk, and {tempfile.gettempdir()} "
                f"has {free:.0f}. Make room (`make clean` removes what was kept of hosts), or name "
                "another folder in TMPDIR."
            )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.to_do = Counter(suite_of(item.nodeid) for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.to_do = Counter(map(suite_of, ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite = suite_of(report.nodeid)
        self.seconds[suite] += report.duration
        self.processor_seconds[suite] += getattr(report, "processor_seconds", 0)
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(suite, Counter())[report.outcome] += 1
        if report.failed:
            self.reporter.write_line("")
            self.reporter.write_sep("_", f"{report.nodeid} ({report.when})", red=True)
            self.reporter.write_line(report.longreprtext)
        if report.when == "teardown":
            self.done[suite] += 1
            if self.done[suite] == self.to_do[suite]:
                self.reporter.write_line(f"\n{self._line(suite)}")

    def pytest_terminal_summary(self) -> None:
        if not self.outcomes:
            return
        self.reporter.section("suites: seconds of tests, seconds of processors (at least)")
        for suite in self.outcomes:
            self.reporter.write_line(self._line(suite))

    def _line(self, suite: str) -> str:
        outcome = ", ".join(f"{n} {word}" for word, n in sorted(self.outcomes[suite].items()))
        seconds, used = self.seconds[suite], self.processor_seconds[suite]
        return f"{suite:<34} {seconds:>6.0f} s {used:>6.0f} s  {outcome}"
