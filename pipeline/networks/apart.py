"""Decodes images in a process of its own, with limits, where a worker may have died of one.

A worker that dies or stands still in an image is tried again by Spark, and then decodes here: only
what fails here alone, twice, is the image's own fault.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError, Reason

SECONDS_TO_START = 60
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Limits:
    """What decoding one image may take.

    Attributes
    ----------
    seconds
        Of a processor; by the clock it may be `patience` times as many.
    memory
        Bytes beyond those of an idle process, the file among them.
    """

    seconds: float = 60.0
    memory: int = 640 << 20
    patience: int = 5


LIMITS = Limits()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let the kernel end this process if what is done inside takes longer, whoever holds what lock.

    A decoder that never returns holds Python's lock: no thread of Python could tell of it.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def go_first(score: int) -> None:
    """Have the kernel end this process rather than others of the host when memory is short."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


@dataclass(frozen=True)
class _Death:
    reason: Reason
    detail: str


class Apart:
    """A decoder in a process of its own, which is started anew after each image it dies of."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self.line: Connection | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop()

    def decode(self, content: bytes, size: int) -> Pixels:
        """Decode an image as `decode` does.

        Raises
        ------
        BadImageError
            When it cannot be decoded, or its decoder fails twice.
        MemoryError
            When the decoder is ended from outside, as the kernel does where memory is short.
        OSError
            When it does not get to work.
        """
        for _ in range(2):
            outcome = self._try(content, size)
            if isinstance(outcome, BadImageError):
                raise outcome
            if not isinstance(outcome, _Death):
                return outcome
            self._stop()
            death = outcome
        raise BadImageError(death.reason, f"{death.detail}, twice, alone")

    def _try(self, content: bytes, size: int) -> Pixels | BadImageError | _Death:
        process, line = self._started()
        try:
            line.send(size)
            line.send_bytes(content)
            if not line.poll(self.limits.patience * self.limits.seconds):
                # From memory to memory: a decoder has nothing to wait for.
                raise OSError("a decoder stood still: its host has no processor or memory for it")
            outcome = line.recv()
        except (EOFError, ConnectionError):
            return self._cause(process.wait())
        if isinstance(outcome, MemoryError):
            megabytes = self.limits.memory / (1 << 20)
            return _Death(Reason.TOO_MUCH_MEMORY, f"more than {megabytes:,.0f} MB")
        found: Pixels | BadImageError = outcome
        return found

    def _cause(self, code: int) -> _Death:
        if code == -signal.SIGKILL:
            raise MemoryError("a decoder was ended from outside: memory is short on this host")
        if code == -signal.SIGPROF:
            return _Death(Reason.TOO_SLOW, f"more than {self.limits.seconds:g} s of a processor")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Death(Reason.CRASHES, how)

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self.process is not None and self.line is not None:
            return self.process, self.line
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    "-m",
                    __name__,
                    str(theirs.fileno()),
                    str(self.limits.seconds),
                    str(self.limits.memory),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        line = Connection(ours.detach())
        try:
            is_ready = line.poll(SECONDS_TO_START) and line.recv()
        except EOFError:
            is_ready = False
        if not is_ready:
            self._stop()
            raise OSError(f"a decoder did not start within {SECONDS_TO_START} s")
        self.line = line
        return self.process, line

    def _stop(self) -> None:
        if self.line is not None:
            self.line.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.line = None


def _serve(line: Connection, seconds: float, memory: int) -> None:
    """Decode what comes until nothing more does."""
    go_first(1000)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # no /proc on macOS: time is limited there, memory is not
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    line.send(True)
    with suppress(EOFError):
        while True:
            size = line.recv()
            content = line.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                outcome: Pixels | BaseException = decode(content, size)
            except (BadImageError, MemoryError) as error:
                outcome = error
            signal.setitimer(signal.ITIMER_PROF, 0)
            line.send(outcome)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
