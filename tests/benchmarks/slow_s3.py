"""A proxy before S3 that adds a round trip's time to every GET, as S3 itself has and loopback not.

It forwards bytes as they are, Host header and signature included, on one connection to S3 for
each of the client's, kept alive as long as the client keeps its own. The answer to a GET is held
back for the delay from its first byte on; connections do not wait for one another. It runs in a
process of its own and tells at the end how many GETs it delayed and what they cost it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class SlowS3:
    """A running proxy; the counts are known once it has stopped."""

    endpoint: str
    gets: int = 0
    cpu_seconds: float = 0.0


@contextmanager
def slow_s3(endpoint: str, seconds: float) -> Iterator[SlowS3]:
    """Run a proxy before `endpoint` that delays the answer to every GET by `seconds`."""
    s3 = urlsplit(endpoint)
    command = [sys.executable, "-m", __name__, str(s3.hostname), str(s3.port), str(seconds)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stdin and proxy.stdout
        slow = SlowS3(f"http://127.0.0.1:{int(proxy.stdout.readline())}")
        try:
            yield slow
        finally:
            proxy.stdin.close()
            told = json.loads(proxy.stdout.readline())
            slow.gets, slow.cpu_seconds = told["gets"], told["cpu_seconds"]


class _FromClient(asyncio.Protocol):
    """The client's side of a connection: requests go on to S3 at once."""

    gets = 0  # of all connections

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self.server = (host, port)
        self.answers = _FromS3(seconds)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.answers.client = transport
        transport.pause_reading()
        self.connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self.answers, *self.server)
            self.transport.resume_reading()
        except OSError:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET "):
            _FromClient.gets += 1
            self.answers.delay_next = True
        if self.answers.transport:  # there is one: reading began when it was made
            self.answers.transport.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.connecting.cancel()
        if self.answers.transport:
            self.answers.transport.close()


class _FromS3(asyncio.Protocol):
    """S3's side of a connection: what comes while an answer is held back waits behind it."""

    client: asyncio.Transport
    transport: asyncio.Transport | None = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.loop = asyncio.get_running_loop()
        self.delay_next = False
        self.held: list[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.delay_next:
            self.delay_next = False
            self.held = [data]
            self.loop.call_later(self.seconds, self._release)
        elif self.held is not None:
            self.held.append(data)
        else:
            self.client.write(data)

    def _release(self) -> None:
        self.client.write(b"".join(self.held or []))
        self.held = None

    def connection_lost(self, _: Exception | None) -> None:
        if self.held is None:
            self.client.close()
        else:
            self.loop.call_later(self.seconds, self.client.close)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _serve(host: str, port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _FromClient(host, port, seconds), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    before = _cpu_seconds()
    await asyncio.to_thread(sys.stdin.read)  # until the starter closes it, or is gone
    print(json.dumps({"gets": _FromClient.gets, "cpu_seconds": _cpu_seconds() - before}))


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
