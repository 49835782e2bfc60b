"""The command `fruits` as processes on a cluster: one that is killed, and the next ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest

from pipeline.local.loopback import Loopback
from tests.conftest import Fruits
from tests.waiting import SECONDS

SMALL = ("--backbone", "efficientnet_lite0", "--input-size", "96")

SMALL_COMMITS = """
import sys
import pipeline.features
pipeline.features.IMAGES_PER_SLOT_AND_COMMIT = 8
from pipeline.cli import main
main()
"""


def commits(output: Path) -> int:
    """Count the commits of rows; the first entry of the log makes the table."""
    return max(0, len(list(output.glob("features/*/table/_delta_log/*.json"))) - 1)


def test_a_killed_driver_loses_one_commit_at_most_and_the_same_job_goes_on(
    cluster: Loopback, fruits: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", SMALL_COMMITS, "features", fruit_pictures, output, *SMALL]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + SECONDS
        while not commits(output):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        left = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
    psutil.wait_procs(left, SECONDS)  # its Java may still commit what is done
    committed = commits(output)
    assert 1 <= committed < 3

    done = fruits("run", fruit_pictures, output, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "48 listed, 0 quarantined" in done.stdout
    assert f"{48 - 16 * committed} computed, {16 * committed} reused" in done.stdout
    assert "spark" in json.loads((output / "run.json").read_text())["timings"]

    done = fruits("run", fruit_pictures, output, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "0 computed, 48 reused" in done.stdout
    assert "spark" not in json.loads((output / "run.json").read_text())["timings"]


@pytest.mark.soak
def test_drivers_killed_at_any_moment_leave_what_a_run_from_scratch_equals(
    cluster: Loopback, fruits: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    output, random = tmp_path / "output", Random(7)
    command = [sys.executable, "-c", SMALL_COMMITS, "run", fruit_pictures, output, *SMALL]
    began = time.monotonic()
    subprocess.run([*command[:5], tmp_path / "scratch", *SMALL], cwd=tmp_path, check=True)
    whole = time.monotonic() - began
    for turn in range(12):
        if turn in (4, 8):  # images go and change between the deaths
            gone, changed = sorted(fruit_pictures.rglob("*.jpg"))[turn : turn + 2]
            shutil.copy(changed, gone.with_name(f"new-{turn}.jpg"))
            gone.unlink()
            os.utime(changed, (turn, turn))
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as driver:
            time.sleep(random.uniform(0.1, 1) * whole)
            left = psutil.Process(driver.pid).children(recursive=True)
            driver.kill()
        psutil.wait_procs(left, SECONDS)
    for place in (output, tmp_path / "scratch-again"):
        done = fruits("run", fruit_pictures, place, *SMALL)
        assert done.returncode == 0, done.stderr
    found, expected = ((tmp_path / name / "matrix.csv") for name in ("output", "scratch-again"))
    rows, same = ([line.split(",")[0] for line in file.open()] for file in (found, expected))
    assert rows == same
    numbers = (
        np.loadtxt(file, delimiter=",", skiprows=1, usecols=range(2, 7))
        for file in (found, expected)
    )
    np.testing.assert_allclose(*numbers, atol=1e-6)
