"""Runs a server and ends it, with all its children, when whoever started the guard is gone.

    python -m pipeline.local.guard COMMAND ...

The starter holds the other end of the guard's standard input. However the starter ends (Ctrl-C, a
crash, kill -9, a closed terminal), that pipe closes, and the guard stops the server's whole group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

SECONDS_TO_STOP = 1.0  # what they hold is thrown away with them


def main(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return its exit status."""
    os.setsid()  # a Ctrl-C or a hang-up in the terminal is the starter's to handle
    # Caught, not ignored: an ignored signal would be ignored by the server too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
    orphaned = threading.Event()
    stopper = threading.Thread(target=_stop_when_orphaned, args=(server, orphaned), daemon=True)
    stopper.start()
    status = server.wait()
    if orphaned.is_set():
        stopper.join()  # children may take longer than the server itself
    os.killpg(0, signal.SIGTERM)  # a server that ended by itself may have left children, too
    return status


def _stop_when_orphaned(server: subprocess.Popen[bytes], orphaned: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    orphaned.set()
    os.killpg(0, signal.SIGTERM)
    try:
        server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        pass
    finally:
        os.killpg(0, signal.SIGKILL)  # this guard too: nothing of the group is left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
