"""What is packed on one host is unpacked on another: the same, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from tests.conftest import PROJECT

pytestmark = pytest.mark.skipif(which("zstd") is None, reason="needs zstd, as hosts have it")
MODULE = PROJECT / "ansible/library/pack.py"


def run(**options: object) -> dict:
    """Run the module as Ansible does on a host."""
    done = subprocess.run(
        [sys.executable, MODULE],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": options}),
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/tool").write_text("#!/bin/sh\n")
    (folder / "bin/tool").chmod(0o755)
    (folder / "bin/python").symlink_to("/usr/bin/python3")
    (folder / "jar").write_bytes(os.urandom(3_000_000))
    os.utime(folder / "jar", (1_000_000_000, 1_000_000_000))
    return folder


def test_a_folder_comes_out_as_it_went_in(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar.zst"
    sha256 = run(folder=str(folder), file=str(packed))["sha256"]
    assert sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()

    copy = tmp_path / "copy"
    assert run(folder=str(copy), file=str(packed), sha256=sha256)["changed"]
    assert (copy / "jar").read_bytes() == (folder / "jar").read_bytes()
    assert (copy / "jar").stat().st_mtime == 1_000_000_000  # an archive of classes is tied to it
    assert (copy / "bin/tool").stat().st_mode == (folder / "bin/tool").stat().st_mode
    assert (copy / "bin/python").readlink() == Path("/usr/bin/python3")
    assert not run(folder=str(copy), file=str(packed), sha256=sha256)["changed"]


@pytest.mark.parametrize("harm", ["cut off", "another", "no pack"])
def test_what_is_damaged_leaves_nothing_and_says_what_to_do(
    folder: Path, tmp_path: Path, harm: str
) -> None:
    packed = tmp_path / "packed.tar.zst"
    sha256 = run(folder=str(folder), file=str(packed))["sha256"]
    content = packed.read_bytes()
    harmed = {"cut off": content[:1_000_000], "another": content + b"\0", "no pack": b"<html>"}
    packed.write_bytes(harmed[harm])
    told = run(folder=str(tmp_path / "copy"), file=str(packed), sha256=sha256)
    assert told["failed"]
    assert "cluster_packs" in told["msg"]
    assert not list(tmp_path.glob("copy*"))
