"""A cluster on loopback at work for hours: nothing grows or is left, and every result is right."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest

from pipeline.local.loopback import Loopback
from tests.conftest import Fruits
from tests.s3.test_loopback_safety import processes_of

MINUTES = float(os.environ.get("FRUITS_SOAK_MINUTES", "60"))
SMALL = ("--backbone", "efficientnet_lite0", "--input-size", "96", "--components", "4")
ROUNDS_TO_SETTLE = 5  # in which a JVM has loaded and compiled what it needs

pytestmark = [pytest.mark.soak, pytest.mark.timeout(60 * MINUTES + 900)]


def megabytes(servers: list[psutil.Process]) -> float:
    return sum(server.memory_info().rss for server in servers) / 1e6


def test_run_after_run_while_photos_come_and_go(
    cluster: Loopback, fruits: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(fruit_pictures, photos)
    spare = sorted(photos.rglob("*.jpg"))[:8]
    servers = processes_of(cluster.conf.parent)
    settled, files, end, number = 0.0, 0, time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < end or number < ROUNDS_TO_SETTLE + 2:
        for file in spare[number % 8 :: 3]:  # some go, and those that had gone come back
            file.unlink() if file.exists() else shutil.copy(sorted(photos.rglob("*.jpg"))[-1], file)
        there = len(list(photos.rglob("*.jpg")))
        done = fruits("run", photos, "output", *SMALL)
        assert done.returncode == 0, done.stderr
        counts = json.loads((tmp_path / "output/run.json").read_text())["counts"]
        assert counts["listed"] == counts["features"] == there
        number += 1
        if number == ROUNDS_TO_SETTLE:
            settled = megabytes(servers)
            files = sum(1 for _ in (cluster.conf.parent / "scratch").rglob("*"))
    print(f"{number} runs; servers had {settled:.0f} MB, and have {megabytes(servers):.0f}")
    assert all(server.is_running() for server in servers)
    assert megabytes(servers) < 1.3 * settled
    assert sum(1 for _ in (cluster.conf.parent / "scratch").rglob("*")) <= files + 10
