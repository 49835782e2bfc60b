"""What the benchmarks share: images and weights, a loopback cluster with the images on its S3."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pyspark.sql import SparkSession

from pipeline.engine.session import make_session
from pipeline.features import Progress
from pipeline.job import Job
from pipeline.listing.images import is_image
from pipeline.local.given import open_images
from pipeline.local.loopback import Loopback, loopback_cluster
from pipeline.local.place import CLUSTERS
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import Model, flatbuffer, identify
from pipeline.record import PCAOptions
from pipeline.storage import Address, BucketStore, open_store
from pipeline.table.feature_table import FeatureTable
from tests.benchmarks.results import Result

MANY = "fruits-360-3body-test.tar"  # 13,810 images, for speed
SAMPLE = "fruits-360-sample.tar"  # 600 images of 20 varieties, for correctness

BUCKET = "fruits"

# The loopback cluster leaves out Java's optimising compiler for a quick start. Where MLlib takes
# part in a comparison, both sides have it back: MLlib's arithmetic is in Java.
USUAL_JAVA = {"spark.driver.extraJavaOptions": "", "spark.executor.extraJavaOptions": ""}


@dataclass(frozen=True)
class Setup:
    """What a benchmark is given.

    Attributes
    ----------
    source
        FRUITS_IMAGES: a folder of images, a .tar archive, or a folder of the two archives.
    weights
        A Keras file of MobileNetV2.
    images
        At most so many images; None takes all.
    notebook_images
        At most so many images for the usual notebook, which is slow.
    rows
        Rows of the features on which PCA is timed.
    """

    source: Path
    weights: Path
    images: int | None = None
    notebook_images: int = 4000
    rows: int = 40_000


@dataclass(frozen=True)
class Place:
    """A running cluster whose S3 holds images; `files` are the same images on this machine."""

    cluster: Loopback
    model: Model
    weights: Path
    files: list[Path]
    images: Address = Address(BUCKET, "images")  # noqa: RUF009

    def flatbuffer(self) -> bytes:
        """Return the LiteRT model."""
        return flatbuffer(self.model, self.weights)

    def table(self, output: str) -> FeatureTable:
        """Return a feature table below an OUTPUT of this name, with its model in place."""
        address = Address(BUCKET, output)
        table = FeatureTable(open_store(address, self.cluster.s3), self.model, self.cluster.s3)
        table.open(self.flatbuffer)
        return table

    def job(self, output: str, spark: SparkSession, components: int) -> Job:
        """Return the whole job from the images to an OUTPUT of this name."""
        return Job(
            images=self.images,
            output=Address(BUCKET, output),
            model=self.model,
            flatbuffer=self.flatbuffer,
            spark=lambda: spark,
            s3=self.cluster.s3,
            observer=Silent(),
            pca=PCAOptions(components, None),
        )

    def upload(self, keys: Mapping[str, Path]) -> None:
        """Put files below the images' address."""
        store = open_store(self.images, self.cluster.s3)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(store.upload, keys.keys(), keys.values()))


class Silent:
    """An observer that shows nothing."""

    def stage(self, name: str) -> None:
        """Do nothing."""

    def progress(self, progress: Progress) -> None:
        """Do nothing."""


@contextmanager
def images_on_s3(setup: Setup, archive: str, count: int | None) -> Iterator[Place]:
    """Start a cluster and bring images to its S3, evenly chosen if `count` is less than all."""
    model = identify(NETWORKS["mobilenet_v2"], setup.weights, 224)
    flatbuffer(model, setup.weights)  # into the user's cache, before anything is timed
    with (
        open_images(source_of(setup, archive)) as (folder, _),
        loopback_cluster(CLUSTERS) as cluster,
    ):
        found = (file for file in folder.rglob("*") if is_image(str(file)) and file.is_file())
        files = spread(sorted(found, key=str), count)  # in the order of their keys on S3
        BucketStore(Address(BUCKET, ""), cluster.s3).create_bucket()
        place = Place(cluster, model, setup.weights, files)
        place.upload({str(file.relative_to(folder)): file for file in files})
        yield place


def source_of(setup: Setup, archive: str) -> Path:
    """Return the archive of a name, or whatever images there are."""
    named = setup.source / archive
    return named if named.exists() else setup.source


def spread(files: list[Path], count: int | None) -> list[Path]:
    """Choose `count` files, evenly spaced, or all."""
    if count is None or count >= len(files):
        return files
    return [files[number * len(files) // count] for number in range(count)]


@contextmanager
def application(
    cluster: Loopback, settings: Mapping[str, str] | None = None
) -> Iterator[SparkSession]:
    """Start an application and stop it at the end."""
    spark = make_session("benchmark", settings=settings, log=cluster.conf.parent / "driver.log")
    try:
        yield spark
    finally:
        spark.stop()


def measure_by_name(name: str, setup: Setup) -> list[Result]:
    """Run the benchmark of this name; here, where a new process finds it."""
    results: list[Result] = import_module(f"tests.benchmarks.{name}").measure(setup)
    return results


def stop_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does, so that clusters are stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
