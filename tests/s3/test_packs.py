"""Hosts bring packed environments to the bucket and fetch them by addresses that are signed."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.storage import BucketStore
from tests.unit.test_pack import run

KEY = "packs/1234-worker-x86_64-5678.tar.zst"


@pytest.fixture
def packs(bucket: BucketStore) -> Callable[..., str]:
    """The command that the playbooks call, for a bucket of the test's own."""
    place = json.dumps({"bucket": bucket.address.bucket, **asdict(bucket.s3)})

    def call(verb: str, key: str = KEY) -> str:
        command = [sys.executable, "-m", "pipeline.cluster.packs", verb, key]
        done = subprocess.run(command, input=place, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    return call


def send(address: str, content: bytes) -> int:
    request = urllib.request.Request(address, data=content, method="PUT")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status


def test_a_pack_goes_through_the_bucket(packs: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment/jar").write_bytes(bytes(2_000_000))
    packed = tmp_path / "packed"
    sha256 = run(folder=str(tmp_path / "environment"), file=str(packed))["sha256"]

    assert packs("look") == "missing"
    assert send(packs("bring"), packed.read_bytes()) == 200
    assert packs("look") == "there"
    told = run(folder=str(tmp_path / "copy"), url=packs("fetch"), sha256=sha256)
    assert told["changed"], told
    assert (tmp_path / "copy/jar").read_bytes() == bytes(2_000_000)

    # Something else in its place is not believed.
    send(packs("bring"), b"somebody else's")
    assert run(folder=str(tmp_path / "other"), url=packs("fetch"), sha256=sha256)["failed"]
    assert not (tmp_path / "other").exists()


def test_an_address_is_for_one_object_and_one_way(packs: Callable[..., str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        send(packs("fetch"), b"x")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        send(packs("bring").replace("1234", "4321"), b"x")
