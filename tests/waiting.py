"""How tests wait for what takes a while."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 300  # many times what is needed: a busy machine may stand still for a minute


def eventually(is_so: Callable[[], bool], seconds: float = SECONDS) -> bool:
    """Ask until it is so; return whether it became so in time.

    To ask may take a start of Python on a host that is at work: the pauses grow to half a second.
    """
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return True
