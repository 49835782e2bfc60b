"""Whoever starts a server under the guard cannot leave it behind, however the starter ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.waiting import SECONDS, eventually

GUARD = [sys.executable, "-m", "pipeline.local.guard"]

# A server with a child; both write their process id. {0} is what the server does on SIGTERM, {1}
# what its child does.
SERVER = """
import signal, subprocess, sys, time
{0}
child = subprocess.Popen([sys.executable, "-c", '''
import os, signal, time
{1}
open("child.new", "w").write(str(os.getpid()))
os.rename("child.new", "child")
time.sleep(600)
'''])
import os
open("server.new", "w").write(str(os.getpid()))
os.rename("server.new", "server")
time.sleep(600)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
STARTER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run under nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
guard = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
time.sleep(600)
"""


def gone(process: psutil.Process) -> bool:
    """Tell whether a process has ended; one that nobody has asked for its status has, too."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Guarded:
    """A starter (or a guard of its own), and the server and child that came of it."""

    def __init__(self, folder: Path, command: list[str], server: str) -> None:
        self.starter = subprocess.Popen(
            [*command, sys.executable, "-c", server], stdin=subprocess.PIPE, cwd=folder
        )
        files = [folder / "server", folder / "child"]
        assert eventually(lambda: all(file.exists() for file in files)), "the server did not start"
        self.server, self.child = (psutil.Process(int(file.read_text())) for file in files)

    def all_gone(self) -> bool:
        return eventually(lambda: gone(self.server) and gone(self.child))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Guarded]]:
    started: list[Guarded] = []

    def run(command: list[str] = GUARD, on_term: str = "", childs_on_term: str = "") -> Guarded:
        started.append(Guarded(tmp_path, command, SERVER.format(on_term, childs_on_term)))
        return started[-1]

    yield run
    for one in started:
        one.starter.kill()
        one.starter.communicate()
        for process in (one.server, one.child):
            if not gone(process):
                process.kill()


BY_A_STARTER = [sys.executable, "-c", STARTER, *GUARD]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_ends_with_its_children_when_its_starter_does(
    start: Callable[..., Guarded], ending: signal.Signals
) -> None:
    running = start(BY_A_STARTER)
    guards = psutil.Process(running.starter.pid).children()
    running.starter.send_signal(ending)
    running.starter.wait(SECONDS)
    assert running.all_gone()
    assert len(guards) == 1
    assert eventually(lambda: gone(guards[0]))


@pytest.mark.parametrize(
    ("on_term", "childs_on_term"),
    [("", ""), (DEAF, ""), ("", DEAF), (DEAF, DEAF)],
    ids=["both listen", "a deaf server", "a deaf child", "both deaf"],
)
def test_a_server_ends_with_its_children_when_standard_input_closes(
    start: Callable[..., Guarded], on_term: str, childs_on_term: str
) -> None:
    running = start(on_term=on_term, childs_on_term=childs_on_term)
    assert running.starter.stdin is not None
    running.starter.stdin.write(b"what is said there does not matter")
    running.starter.stdin.close()
    assert running.all_gone()
    assert running.starter.wait(SECONDS) != 0


def test_the_children_of_a_server_that_crashed_end_too(start: Callable[..., Guarded]) -> None:
    running = start()
    running.server.kill()
    assert running.all_gone()
    assert running.starter.wait(SECONDS) != 0


def test_a_guard_that_is_told_to_end_does_not_leave_its_server_behind(
    start: Callable[..., Guarded],
) -> None:
    running = start()
    running.starter.terminate()
    time.sleep(0.5)
    assert running.starter.poll() is None
    assert not gone(running.server)
    running.starter.communicate()
    assert running.all_gone()


def test_a_server_may_end_in_its_own_way(start: Callable[..., Guarded], tmp_path: Path) -> None:
    tidy = "signal.signal(signal.SIGTERM, lambda *_: (open('tidied', 'w').close(), sys.exit()))"
    patient = (
        "import sys; from pipeline.local import guard; guard.SECONDS_TO_STOP = 60\n"
        "sys.exit(guard.main(sys.argv[1:]))"
    )
    running = start([sys.executable, "-c", patient], on_term=tidy)
    running.starter.communicate()
    assert running.all_gone()
    assert (tmp_path / "tidied").exists()


def test_a_ctrl_c_in_the_terminal_is_not_the_servers_to_handle(
    start: Callable[..., Guarded],
) -> None:
    running = start()
    guard = running.starter.pid
    assert os.getpgid(running.server.pid) == os.getpgid(running.child.pid) == guard
    assert os.getpgid(guard) != os.getpgid(0)


@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_of_the_server_is_passed_on(status: int) -> None:
    command = [*GUARD, sys.executable, "-c", f"raise SystemExit({status})"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert guard.wait(SECONDS) == status
    guard.communicate()


def test_a_server_reads_nothing_of_what_the_guard_is_told() -> None:
    command = [*GUARD, sys.executable, "-c", "import sys; sys.exit(len(sys.stdin.read()))"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert guard.wait(SECONDS) == 0
    guard.communicate()
