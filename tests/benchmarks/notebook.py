"""How much faster is the whole job than the notebook that is usually written for this case?

`job_over_usual_notebook`: images/s of `pipeline.job.Job` (list, features, PCA with 50 components,
matrix, report) divided by the images/s of usual_notebook.py (which says what it does), on the same
images, S3, cluster and settings (the loopback cluster's, but for USUAL_JAVA in _common.py). Each
runs once in a fresh application that has just started; the start is not timed for either. The
job's LiteRT model is in the user's cache, and the notebook's imports and its model on the driver
are not timed. At few images, the start of Python workers and the many small Spark jobs of a whole
job weigh more: the ratio is that of this number of images, not a law.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.benchmarks._common import (
    BUCKET,
    MANY,
    USUAL_JAVA,
    Place,
    Setup,
    application,
    images_on_s3,
)
from tests.benchmarks.results import Result

COMPONENTS = 50


def measure(setup: Setup) -> list[Result]:
    """Return the ratio and both speeds."""
    count = min(setup.notebook_images, setup.images or setup.notebook_images)
    with images_on_s3(setup, MANY, count) as place:
        job_seconds, features_seconds = _job_seconds(place)
        ours = len(place.files) / job_seconds
        seconds = _notebook_seconds(place)
        usual = len(place.files) / seconds["total"]
    return [
        Result("job_over_usual_notebook", ours / usual, "ratio", ">= 8"),
        Result("job_images_per_second", ours, "images/s"),
        Result("job_features_seconds", features_seconds, "s"),
        Result("job_other_seconds", job_seconds - features_seconds, "s"),
        Result("usual_notebook_images_per_second", usual, "images/s"),
        Result("usual_notebook_features_seconds", seconds["features"], "s"),
        Result("usual_notebook_pca_seconds", seconds["pca"], "s"),
    ]


def _job_seconds(place: Place) -> tuple[float, float]:
    """Return the seconds of the whole job, and those of its features."""
    with application(place.cluster, USUAL_JAVA) as spark:
        job = place.job("ours", spark, COMPONENTS)
        began = time.monotonic()
        run = job.run()
        seconds = time.monotonic() - began
    if run["counts"]["features"] != len(place.files):
        raise RuntimeError(f"expected features of {len(place.files)} images: {run['counts']}")
    return seconds, run["timings"]["features"]


def _notebook_seconds(place: Place) -> dict[str, float]:
    addresses = [str(place.images), f"s3a://{BUCKET}/usual", str(place.weights), str(COMPONENTS)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.usual_notebook", *addresses],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(f"the usual notebook failed: {run.stderr[-2000:]}")
    told: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    if told["rows"] != len(place.files):
        raise RuntimeError(f"expected {len(place.files)} rows of the usual notebook: {told}")
    return told
