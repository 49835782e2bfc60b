"""How much faster is the whole job than the notebook that is usually written for this case?

Images/s of `pipeline.job.Job` (list, features, PCA with 50 components, matrix, report) divided by
the images/s of usual_notebook.py (which says what it does), on the same S3, cluster and settings
(but for USUAL_JAVA in _common.py), in fresh applications whose start is not timed:

- `job_over_usual_notebook`: against the notebook as it was published. That is so slow
  that it gets 640 of the images, evenly spaced: one full batch of 32 for each of its 20 partitions.
- `job_over_mended_notebook`: against the same without its three faults, on the images of ours.

The job's LiteRT model is in the user's cache, and the notebook's imports and its model on the
driver are not timed. At few images, the start of Python workers and the many small Spark jobs of a
whole job weigh more: the ratios are those of this number of images, not a law.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

from pipeline.storage import Address
from tests.benchmarks._common import (
    BUCKET,
    MANY,
    USUAL_JAVA,
    Place,
    Setup,
    application,
    images_on_s3,
    spread,
)
from tests.benchmarks.results import Result

COMPONENTS = 50
FULL_BATCHES = 20 * 32


def measure(setup: Setup) -> list[Result]:
    """Return the ratio and both speeds."""
    count = min(setup.notebook_images, setup.images or setup.notebook_images)
    with images_on_s3(setup, MANY, count) as place:
        files = spread(place.files, FULL_BATCHES)
        few = replace(place, files=files, images=Address(BUCKET, "few"))
        few.upload({str(file.relative_to(file.parents[1])): file for file in few.files})
        job_seconds, features_seconds = _job_seconds(place)
        mended = _notebook_seconds(place, "mended")
        published = _notebook_seconds(few, "published")
    ours = len(place.files) / job_seconds
    mended_speed = len(place.files) / mended["total"]
    published_speed = len(few.files) / published["total"]
    return [
        Result("job_over_usual_notebook", ours / published_speed, "ratio", ">= 8"),
        Result("job_over_mended_notebook", ours / mended_speed, "ratio"),
        Result("job_images_per_second", ours, "images/s"),
        Result("job_features_seconds", features_seconds, "s"),
        Result("job_other_seconds", job_seconds - features_seconds, "s"),
        Result("usual_notebook_images_per_second", published_speed, "images/s"),
        Result("mended_notebook_images_per_second", mended_speed, "images/s"),
        Result("mended_notebook_features_seconds", mended["features"], "s"),
        Result("mended_notebook_pca_seconds", mended["pca"], "s"),
    ]


def _job_seconds(place: Place) -> tuple[float, float]:
    """Return the seconds of the whole job, and those of its features."""
    with application(place.cluster, USUAL_JAVA) as spark:
        job = place.job("ours", spark, COMPONENTS)
        began = time.monotonic()
        run = job.run()
        seconds = time.monotonic() - began
    if run.counts.features != len(place.files):
        raise RuntimeError(f"expected features of {len(place.files)} images: {run.counts}")
    return seconds, run.timings["features"]


def _notebook_seconds(place: Place, way: str) -> dict[str, float]:
    output = f"s3a://{BUCKET}/{way}"
    arguments = [way, str(place.images), output, str(place.weights), str(COMPONENTS)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.usual_notebook", *arguments],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(f"the usual notebook failed: {run.stderr[-2000:]}")
    told: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    if told["rows"] != len(place.files):
        raise RuntimeError(f"expected {len(place.files)} rows of the usual notebook: {told}")
    return told
