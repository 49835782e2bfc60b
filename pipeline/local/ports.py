"""Free TCP ports for servers of this machine."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from pipeline.errors import ClusterError

LOWEST = 20_000  # below it are ports that people know
LINUX_SAYS = Path("/proc/sys/net/ipv4/ip_local_port_range")
ELSEWHERE = 49_152  # where the ports of connections begin by RFC 6335

_given: set[int] = set()  # by this process: their servers may still be on the way to them


def free_ports(host: str, count: int) -> list[int]:
    """Find ports at an address of this machine that nothing listens on, nor a connection takes.

    A server of Java takes seconds to get to its port. Meanwhile, one of those that the system gives
    to connections may have gone to one: on a busy machine, that is one start in a hundred. For the
    same reason no port is given twice.

    Raises
    ------
    ClusterError
        When there are not so many.
    """
    ports = range(LOWEST, _first_of_connections())
    left = [port for port in ports if port not in _given]
    with ExitStack() as stack:
        found: list[int] = []
        for port in secrets.SystemRandom().sample(left, len(left)):
            probe = stack.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((host, port))
                found.append(port)
            if len(found) == count:
                _given.update(found)
                return found
    raise ClusterError(
        f"expected {count} free ports from {ports.start} to {ports.stop - 1} on {host}, found "
        f"{len(found)}. End other servers, or raise the first number in {LINUX_SAYS}."
    )


def _first_of_connections() -> int:
    return int(LINUX_SAYS.read_text().split()[0]) if LINUX_SAYS.exists() else ELSEWHERE
