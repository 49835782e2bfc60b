"""What does a page of a listing cost, and how long do many take when each is a round trip away?

A stand-in renders pages of 1,000 keys, in a process of its own: 40 folders of 5 pages each, every
answer held back for 50 ms. The same client asks for them twice: by boto3's own pages, and by
`pipeline.s3.pages`. `listing_cpu` is the processor time of a page by ours over that by boto3's,
signing and HTTP included; `listing_wall` is boto3's time for all of them over ours.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3

from pipeline.s3.pages import client, pages_of
from tests.benchmarks._common import Setup
from tests.benchmarks.results import Result

FOLDERS, PAGES, KEYS = 40, 5, 1000
SECONDS_AWAY = 0.05
NAME = "Apple Braeburn {}_{:04}_100.jpg"  # of an image within its folder


def measure(_: Setup) -> list[Result]:
    """Return the ratios, and the figures that they are made of."""
    with stand_in(FOLDERS, SECONDS_AWAY) as endpoint:
        options: dict[str, Any] = {
            "endpoint_url": endpoint,
            "region_name": "us-east-1",
            "aws_access_key_id": "key",
            "aws_secret_access_key": "secret",
        }
        boto3_cpu, boto3_wall = _timed(lambda: _boto3(boto3.client("s3", **options)))
        our_cpu, our_wall = _timed(lambda: _ours(client(**options)))
    pages = FOLDERS * PAGES
    return [
        Result("listing_cpu", our_cpu / boto3_cpu, "ratio", "<= 0.143"),
        Result("listing_wall", boto3_wall / our_wall, "times", ">= 8"),
        Result("listing_page_boto3", boto3_cpu / pages * 1000, "CPU ms"),
        Result("listing_page", our_cpu / pages * 1000, "CPU ms"),
    ]


@contextmanager
def stand_in(folders: int, seconds_away: float = 0, gone: int = 0, more: int = 0) -> Iterator[str]:
    """Serve the listing of so many folders, without the first `gone` images of each, or with more.

    Of the images themselves there is none.
    """
    options = map(str, (folders, seconds_away, gone, more))
    command = [sys.executable, "-m", __name__, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def _timed(listed: Callable[[], Iterator[str]]) -> tuple[float, float]:
    """Return the processor's and the wall's seconds of a listing, which must be whole."""
    cpu, wall = time.process_time(), time.monotonic()
    found = set(listed())
    used = time.process_time() - cpu, time.monotonic() - wall
    if len(found) != FOLDERS * PAGES * KEYS:
        raise RuntimeError(f"expected {FOLDERS * PAGES * KEYS} keys, found {len(found)}")
    return used


def _boto3(s3: Any) -> Iterator[str]:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="b", Prefix="images/"):
        yield from (one["Key"] for one in page["Contents"])


def _ours(s3: Any) -> Iterator[str]:
    for page in pages_of(s3, "b", "images/"):
        yield from page.keys


class _Pages(BaseHTTPRequestHandler):
    """S3's ListObjectsV2 of `folders` times PAGES times KEYS rendered objects below `images/`."""

    folders, seconds_away, gone, more = FOLDERS, SECONDS_AWAY, 0, 0
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "prefix" not in asked:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        time.sleep(self.seconds_away)
        if "delimiter" in asked:
            body = self._level() if asked["prefix"] == "images/" else b""
        else:
            body = self._page(asked["prefix"], int(asked.get("continuation-token", 0)))
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _level(self) -> bytes:
        names = "".join(
            f"<CommonPrefixes><Prefix>images/{number:04}/</Prefix></CommonPrefixes>"
            for number in range(self.folders)
        )
        return f"{_HEAD}<IsTruncated>false</IsTruncated>{names}</ListBucketResult>".encode()

    def _page(self, prefix: str, number: int) -> bytes:
        """Render a page; the first of all folders is followed by the others' first to last."""
        folder = prefix.removeprefix("images/").removesuffix("/")
        pages = PAGES if folder else self.folders * PAGES
        name, page = (folder, number) if folder else (f"{number // PAGES:04}", number % PAGES)
        last = KEYS + self.more if page + 1 == PAGES else KEYS
        objects = "".join(
            f"<Contents><Key>images/{name}/{NAME.format(page, key).replace(' ', '+')}</Key>"
            "<LastModified>2026-01-31T12:00:00.000Z</LastModified>"
            f"<ETag>&quot;{key:032x}&quot;</ETag><Size>{4000 + key}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in range(0 if page else self.gone, last)
        )
        is_last = number + 1 == pages
        more = "" if is_last else f"<NextContinuationToken>{number + 1}</NextContinuationToken>"
        told = f"<IsTruncated>{str(not is_last).lower()}</IsTruncated>{more}"
        return f"{_HEAD}{told}{objects}</ListBucketResult>".encode()


_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult '
    'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><EncodingType>url</EncodingType>'
)


if __name__ == "__main__":
    folders, seconds, gone, more = sys.argv[1:]
    _Pages.folders, _Pages.seconds_away = int(folders), float(seconds)
    _Pages.gone, _Pages.more = int(gone), int(more)
    ThreadingHTTPServer.request_queue_size = 128  # a burst that is turned away comes a second later
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _Pages)
    print(listening.server_address[1], flush=True)
    listening.serve_forever()
