"""Runs the tests of S3 on servers of other makers.

    python -m tests.s3.servers versitygw|minio [pytest's arguments]

They come as Go modules, so Go is needed, and kept in the user's cache once they are built; a server
listens on loopback, and stops with the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from pipeline.local import seaweed
from pipeline.local.ports import free_ports
from pipeline.s3.access import S3Settings
from tests.hosts.image import CACHE

BUILT = CACHE / "s3-servers"
MODULES = {
    "versitygw": "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
    "minio": "github.com/minio/minio@latest",
}
SECONDS_TO_START = 60
# What is not this project's to mend, by words of the tests' names.
LEFT_OUT = {
    "versitygw": {
        "answers_to_its_keys_only": "looks into the stand-in's own folder",
        "many_pages_of_odd_keys": "keeps objects as files: none ends with a slash and has content",
        "what_a_bucket_keeps": "has no rules that delete old versions",
        "each_object_that_s3_does_not_give": "takes no customer's key, and gives the object",
    },
    "minio": {
        "answers_to_its_keys_only": "looks into the stand-in's own folder",
        "many_pages_of_odd_keys": "takes no names with // or control characters in them",
        "each_object_that_s3_does_not_give": "takes a customer's key over TLS alone",
    },
}


def built(name: str) -> Path:
    """Return a server's program; build it if it is not at hand."""
    program = BUILT / name
    if not program.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["go", "install", MODULES[name]], env=os.environ | {"GOBIN": str(BUILT)}, check=True
        )
    return program


def versitygw(program: Path, s3: S3Settings, folder: Path) -> tuple[list[str], dict[str, str]]:
    address = str(s3.endpoint).removeprefix("http://")
    command = [str(program), "--port", address, "--region", str(s3.region), "--quiet", "posix"]
    keys = {"ROOT_ACCESS_KEY": str(s3.access_key), "ROOT_SECRET_KEY": str(s3.secret_key)}
    objects, versions = folder / "objects", folder / "versions"
    for place in (objects, versions):
        place.mkdir()
    return [*command, "--versioning-dir", str(versions), str(objects)], keys


def minio(program: Path, s3: S3Settings, folder: Path) -> tuple[list[str], dict[str, str]]:
    address = str(s3.endpoint).removeprefix("http://")
    (console,) = free_ports("127.0.0.1", 1)
    command = [str(program), "server", "--address", address]
    keys = {
        "MINIO_ROOT_USER": str(s3.access_key),
        "MINIO_ROOT_PASSWORD": str(s3.secret_key),
        "MINIO_REGION_NAME": str(s3.region),
        "MINIO_UPDATE": "off",
    }
    return [*command, "--console-address", f"127.0.0.1:{console}", str(folder)], keys


Server = Callable[[Path, S3Settings, Path], tuple[list[str], dict[str, str]]]
SERVERS: dict[str, Server] = {"versitygw": versitygw, "minio": minio}


@contextmanager
def running(name: str) -> Iterator[S3Settings]:
    """Run a server for as long as needed."""
    program = built(name)
    s3 = seaweed.new_settings("127.0.0.1")
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    command, environment = SERVERS[name](program, s3, folder)
    with (folder.with_suffix(".log")).open("wb") as log:
        server = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not answers(s3):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start: {folder.with_suffix('.log').read_text()}")
            time.sleep(0.2)
        yield s3
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink()


def answers(s3: S3Settings) -> bool:
    """Tell whether a server speaks, whatever it says to who has no keys."""
    try:
        urllib.request.urlopen(f"{s3.endpoint}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def main(name: str, *arguments: str) -> int:
    with running(name) as s3:
        given = {name: value for name, value in asdict(s3).items() if value is not None}
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", *(arguments or ["tests/s3", "tests/spark"])),
                *("-k", " and ".join(f"not {word}" for word in LEFT_OUT[name])),
            ],
            env=os.environ | {"FRUITS_TEST_S3": json.dumps(given)},
        ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
