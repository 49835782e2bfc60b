"""The command `fruits` as processes on a cluster: one that is killed, and the next ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline.local.loopback import Loopback
from tests.conftest import Fruits
from tests.waiting import SECONDS

SMALL = ("--backbone", "efficientnet_lite0", "--input-size", "96")

SMALL_BATCHES = """
import sys
import pipeline.features
pipeline.features.IMAGES_PER_SLOT_AND_BATCH = 8
from pipeline.cli import main
main()
"""


def test_a_killed_driver_loses_one_batch_at_most_and_the_same_job_goes_on(
    cluster: Loopback, fruits: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", SMALL_BATCHES, "features", fruit_pictures, output, *SMALL]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + SECONDS
        while not list(output.glob("features/*/batches/*/_SUCCESS")):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        left = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
    psutil.wait_procs(left, SECONDS)  # its Java may still commit what is done
    committed = len(list(output.glob("features/*/batches/*/_SUCCESS")))
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
