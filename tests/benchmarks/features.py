"""Does the whole feature job keep the cores as busy with the network as the network alone would?

`features_over_network`: images/s of `compute_features` (from images on S3 to a committed feature
table on S3, the listing's way there included), divided by the images/s of the network alone on the
same cores (see network_alone.py), measured directly before and directly after; the machine's own
speed changes with the hour, the ratio does not. The job runs twice in one application: `_cold` is
the first (Java and Python workers start, code is compiled), the other is the second, into another
OUTPUT. Starting the cluster and the application is not timed, nor is the listing. `commit_seconds`
is what the largest commit of the second takes on the driver: its state, and the table's log, on S3.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pyspark.sql import SparkSession

from pipeline.engine.session import task_slots
from pipeline.features import compute_features
from pipeline.listing.images import list_images
from pipeline.reading import ImageReader
from pipeline.storage import open_store
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import FeatureTable, Known
from pipeline.table.parts import Parts
from tests.benchmarks._common import MANY, Place, Setup, application, images_on_s3
from tests.benchmarks.network_alone import NetworkAlone
from tests.benchmarks.results import Result

GOAL = ">= 0.75"


def measure(setup: Setup) -> list[Result]:
    """Return the ratio of the first and of the second job, and what they are made of."""
    with ExitStack() as stack:
        place = stack.enter_context(images_on_s3(setup, MANY, setup.images))
        spark = stack.enter_context(application(place.cluster))
        reader = ImageReader(place.images, place.cluster.s3)
        network = network_alone(place, spark, stack)
        alone = [network.images_per_second()]
        speeds = []
        for output in ("cold", "warm"):
            with timed_commits() as commits:
                speeds.append(features_per_second(place, spark, reader, output))
            alone.append(network.images_per_second())
    cold, warm = speeds
    return [
        Result("features_over_network_cold", cold / mean(alone[:2]), "ratio"),
        Result("features_over_network", warm / mean(alone[1:]), "ratio", GOAL),
        Result("features_images_per_second", warm, "images/s"),
        Result("network_alone_images_per_second", mean(alone[1:]), "images/s"),
        Result("commit_seconds", max(commits), "s", "<= 0.6"),
    ]


def network_alone(place: Place, spark: SparkSession, stack: ExitStack) -> NetworkAlone:
    """Prepare the network alone, with as many processes as the cluster runs tasks at once."""
    size = place.model.input_size
    return NetworkAlone(place.flatbuffer(), place.files, size, task_slots(spark), stack)


def features_per_second(
    place: Place, spark: SparkSession, reader: ImageReader, output: str
) -> float:
    """Run the feature job into a new OUTPUT."""
    table = place.table(output)
    with tempfile.TemporaryDirectory(prefix="fruits-") as folder:
        listing = list_images(open_store(place.images, place.cluster.s3), Path(folder))
        work = Parts(table.output.address / "_work", place.cluster.s3)
        began = time.monotonic()
        for part, _ in listing.parts:
            open_store(work.address, work.s3).upload(part.name, part)
        done = compute_features(spark, table, None, listing, reader, place.flatbuffer(), work)
        seconds = time.monotonic() - began
    if not done.computed == done.known.features == listing.count:
        raise RuntimeError(f"expected features of {listing.count} images, all new; got {done}")
    return done.computed / seconds


@contextmanager
def timed_commits() -> Iterator[list[float]]:
    """Yield the seconds that commits take meanwhile."""
    seconds: list[float] = []
    commit = FeatureTable.commit

    def timed(*arguments: Any) -> tuple[Snapshot, Known]:
        began = time.monotonic()
        try:
            return commit(*arguments)
        finally:
            seconds.append(time.monotonic() - began)

    with patch.object(FeatureTable, "commit", timed):
        yield seconds


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)
