"""A proxy before S3 that behaves as S3 does on a bad day, or as far away as S3 is.

It forwards bytes as they are, Host header and signature included, on one connection to S3 for
each of the client's, kept alive as long as the client keeps its own. It can hold the answer to
every GET back for a while, answer a share of all requests with 503 SlowDown, never answer another
share, and hold a share back for as long as it likes, so that those behind overtake. It can hold
commits to a Delta table back until several have come, and let them go at once. It runs in a process
of its own and tells at the end what it did, and at which cost.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from urllib.parse import urlsplit

METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


def _answer(status: bytes, body: bytes) -> bytes:
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/xml", b"Connection: close"]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


REFUSAL = _answer(b"503 Slow Down", SLOW_DOWN)
NEWER = (b"x-amz-checksum-", b"x-amz-sdk-checksum-", b"x-amz-trailer:")


def _older_says(request: bytes) -> bytes | None:
    """Return what an S3 answers that is older than Amazon's checksums, None where it has no say."""
    line, *headers = request.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
    if any(header.startswith(NEWER) or b"aws-chunked" in header for header in headers):
        code = b"A header you provided implies functionality that is not implemented"
        body = b"<Error><Code>NotImplemented</Code><Message>%s</Message></Error>" % code
        return _answer(b"501 Not Implemented", body)
    if line.startswith(b"post") and b"?delete " in line and not _has(headers, b"content-md5:"):
        return _answer(b"400 Bad Request", b"<Error><Code>MissingContentMD5</Code></Error>")
    return None


def _has(headers: list[bytes], name: bytes) -> bool:
    return any(header.startswith(name) for header in headers)


@dataclass(frozen=True)
class Behaviour:
    """Seconds added to GETs below a path, and the shares of requests refused and never answered.

    The first `together` commits to a Delta table are held until the last of them has come. GETs
    below `denied_path` are answered with 403 and `denied_code`, until the proxy is hurried. The
    share `held` of all requests waits up to `held_seconds`. With `older` it knows no checksum but
    MD5.
    """

    delay: float = 0.0
    refused: float = 0.0
    hung: float = 0.0
    together: int = 0
    slow_path: str = "/"
    denied_path: str = "-"
    denied_code: str = "AccessDenied"
    held: float = 0.0
    held_seconds: float = 0.0
    seed: int = 0
    older: int = 0


@dataclass
class Told:
    """What a proxy did, known once it has stopped; `hurry` makes it hold nothing back any more."""

    endpoint: str
    hurry: Callable[[], object] = lambda: None
    is_hurried: bool = False
    requests: int = 0
    gets: int = 0
    refused: int = 0
    hung: int = 0
    cpu_seconds: float = 0.0


@contextmanager
def s3_proxy(endpoint: str, behaviour: Behaviour, address: str = "127.0.0.1") -> Iterator[Told]:
    """Run a proxy before `endpoint`, at a free port of `address`."""
    s3 = urlsplit(endpoint)
    given = map(str, astuple(behaviour))
    command = [sys.executable, "-m", __name__, address, str(s3.hostname), str(s3.port), *given]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as proxy:
        assert proxy.stdin and proxy.stdout
        told = Told(f"http://{address}:{int(proxy.stdout.readline())}")
        told.hurry = lambda: print("hurry", file=proxy.stdin, flush=True)
        try:
            yield told
        finally:
            proxy.stdin.close()
            for name, value in json.loads(proxy.stdout.readline()).items():
                setattr(told, name, value)


class _Gate:
    """Holds requests until so many have come, and lets them go on at once."""

    def __init__(self, number: int) -> None:
        self.missing = number
        self.waiting: list[Callable[[], None]] = []

    def come(self, go_on: Callable[[], None]) -> None:
        self.missing -= 1
        self.waiting.append(go_on)
        if self.missing <= 0:
            while self.waiting:
                self.waiting.pop()()


class _FromClient(asyncio.Protocol):
    """The client's side of a connection: requests go on to S3 at once."""

    def __init__(self, host: str, port: int, behaviour: Behaviour, told: Told, gate: _Gate) -> None:
        self.server = (host, port)
        self.behaviour, self.told, self.gate = behaviour, told, gate
        self.held: list[bytes] | None = None
        self.answers = _FromS3(behaviour.delay)
        self.is_hung = False

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
        if self.held is not None:
            self.held.append(data)
            return
        is_commit = data.startswith(b"PUT ") and b"/_delta_log/" in data.partition(b"\r\n")[0]
        if is_commit and self.gate.missing > 0:
            self.held = [data]
            self.gate.come(self._go_on)
            return
        if data.startswith(METHODS) and not self.is_hung:
            self.told.requests += 1
            said = _older_says(data) if self.behaviour.older else None
            if said is not None:
                self.told.refused += 1
                self.transport.write(said)
                self.transport.close()
                return
            fate = random.random()
            if fate < self.behaviour.refused:
                self.told.refused += 1
                self.transport.write(REFUSAL)
                self.transport.close()
                return
            if fate < self.behaviour.refused + self.behaviour.hung:
                self.told.hung += 1
                self.is_hung = True
            if random.random() < self.behaviour.held:
                self.held = [data]
                seconds = random.uniform(0, self.behaviour.held_seconds)
                asyncio.get_running_loop().call_later(seconds, self._go_on)
                return
            if data.startswith(b"GET "):
                self.told.gets += 1
                path = f"GET {self.behaviour.denied_path}".encode()
                if data.startswith(path) and not self.told.is_hurried:
                    code = self.behaviour.denied_code.encode()
                    body = b"<Error><Code>%s</Code><Message>no</Message></Error>" % code
                    self.transport.write(_answer(b"403 Forbidden", body))
                    self.transport.close()
                    return
                is_slow = data.startswith(f"GET {self.behaviour.slow_path}".encode())
                is_slow = is_slow and not self.told.is_hurried
                self.answers.delay_next = is_slow and self.behaviour.delay > 0
        if self.answers.transport and not self.is_hung:
            self.answers.transport.write(data)

    def _go_on(self) -> None:
        if self.answers.transport is not None:  # else the client has gone meanwhile
            self.answers.transport.write(b"".join(self.held or []))
        self.held = None

    def connection_lost(self, _: Exception | None) -> None:
        self.connecting.cancel()
        if self.answers.transport:
            self.answers.transport.close()


class _FromS3(asyncio.Protocol):
    """S3's side of a connection: what comes while an answer is held back waits behind it."""

    client: asyncio.Transport
    transport: asyncio.Transport | None = None

    def __init__(self, delay: float) -> None:
        self.delay = delay
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
            self.loop.call_later(self.delay, self._release)
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
            self.loop.call_later(self.delay, self.client.close)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def _serve(address: str, host: str, port: int, behaviour: Behaviour) -> None:
    random.seed(behaviour.seed)
    told, gate = Told(""), _Gate(behaviour.together)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _FromClient(host, port, behaviour, told, gate), address, 0
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    before = _cpu_seconds()
    while await asyncio.to_thread(sys.stdin.readline):  # until the starter closes it, or is gone
        told.is_hurried = True
    counts = {name: getattr(told, name) for name in ("requests", "gets", "refused", "hung")}
    print(json.dumps({**counts, "cpu_seconds": _cpu_seconds() - before}))


if __name__ == "__main__":
    where, host, port, *given = sys.argv[1:]
    kinds = [type(field.default) for field in fields(Behaviour)]
    behaviour = Behaviour(*(kind(value) for kind, value in zip(kinds, given, strict=True)))
    asyncio.run(_serve(where, host, int(port), behaviour))
