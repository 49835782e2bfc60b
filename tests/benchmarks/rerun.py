"""What does a second run cost when nothing is new, and does it compute only what is new?

`rerun_nothing_new`: wall time of the command `fruits run IMAGES OUTPUT`, as a process from its
start to its end, the second time divided by the first, images and OUTPUT on S3, on a cluster that
is up. `rerun_nothing_new_calls`: images that this second run put through the network, by its own
run.json. `rerun_one_percent_calls`: the same after 1 % more images were added.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.storage import Address, open_store
from tests.benchmarks._common import BUCKET, MANY, Place, Setup, images_on_s3
from tests.benchmarks.results import Result

OUTPUT = Address(BUCKET, "rerun")


def measure(setup: Setup) -> list[Result]:
    """Return the ratio of the times, and the counts of both reruns."""
    with images_on_s3(setup, MANY, setup.images) as place:
        first, _ = _run(place)
        second, unchanged = _run(place)
        added = place.files[: max(1, len(place.files) // 100)]
        place.upload({f"{file.parent.name}/added-{file.name}": file for file in added})
        third, grown = _run(place)
    return [
        Result("rerun_nothing_new", second / first, "ratio", "<= 0.1"),
        Result("rerun_nothing_new_calls", unchanged["computed"], "images", "== 0"),
        Result("rerun_one_percent_calls", grown["computed"], "images", f"== {len(added)}"),
        Result("run_seconds", first, "s"),
        Result("rerun_nothing_new_seconds", second, "s"),
        Result("rerun_one_percent_seconds", third, "s"),
    ]


def _run(place: Place) -> tuple[float, dict[str, Any]]:
    """Return the seconds of one run as a process, and the counts of its run.json."""
    fruits = str(Path(sys.executable).with_name("fruits"))
    options = ["--weights", str(place.weights)]
    began = time.monotonic()
    run = subprocess.run(
        [fruits, "run", str(place.images), str(OUTPUT), *options], capture_output=True, text=True
    )
    seconds = time.monotonic() - began
    if run.returncode != 0:
        raise RuntimeError(f"fruits run failed: {run.stderr[-2000:]}")
    told = open_store(OUTPUT, place.cluster.s3).read("run.json")
    return seconds, json.loads(told or b"{}")["counts"]
