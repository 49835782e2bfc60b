"""What does the driver carry when a million images, and four million, are known?

A stand-in lists them, rendered; the feature table is written directly, with 64 features an image
(the driver never sees them). Then the whole job runs: listing, comparison, PCA, matrix of two
components, report. `driver_memory_4m_over_1m` is the largest resident memory of the driver, its
Java included, at four million over that at one million. At one million, one image of each folder
is then gone: `one_gone_1m_pca_seconds` and `one_gone_1m_seconds` are the time of the PCA and of the
whole run. At last one in a hundred is new, and none of these can be read: `grown_1m_seconds` is the
run but for its matrix.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.features import answers_of
from pipeline.job import Choices, Job
from pipeline.local.loopback import Loopback, loopback_cluster
from pipeline.local.place import CLUSTERS
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import Model, find_weights, flatbuffer, identify
from pipeline.record import PCAOptions
from pipeline.s3.access import S3Settings
from pipeline.storage import Address
from pipeline.table.feature_table import DECODER, RUNTIME, TABLE, written
from pipeline.table.parts import Parts
from tests.benchmarks._common import Setup, Silent, application
from tests.benchmarks.listing import KEYS, NAME, PAGES, stand_in
from tests.benchmarks.results import Result

DIMENSIONS = 64
MODEL = Model("scale", "scale", 32, DIMENSIONS, "as it is", "none", "0" * 64)
NEW = PAGES * KEYS // 100  # images of each folder
MILLION = 1_000_000 // (PAGES * KEYS)  # folders


def measure(_: Setup) -> list[Result]:
    """Return the driver's memory and the times, at one and at four million images."""
    with TemporaryDirectory(prefix="fruits-scale-") as folder:
        one = _measure(Path(folder) / "one", MILLION)
        four = _measure(Path(folder) / "four", 4 * MILLION)
    return [
        Result("driver_memory_4m_over_1m", four.memory / one.memory, "ratio", "<= 1.15"),
        Result("driver_memory_1m", one.memory, "MB"),
        Result("driver_memory_4m", four.memory, "MB"),
        Result("ready_table_1m_seconds", one.first, "s", "<= 180"),
        Result("ready_table_4m_over_1m", four.first / one.first, "ratio", "<= 4"),
        Result("nothing_new_1m_seconds", one.nothing_new, "s"),
        Result("listing_1m_seconds", one.listing, "s"),
        *one.changes,
    ]


@dataclass(frozen=True)
class Measured:
    """Seconds of runs, and the driver's peak in MB."""

    first: float
    listing: float
    nothing_new: float
    memory: float
    changes: list[Result]


def _measure(folder: Path, folders: int) -> Measured:
    with loopback_cluster(CLUSTERS, S3Settings()) as cluster, application(cluster) as spark:
        job = _job(folder, spark, cluster, "http://127.0.0.1:1")
        _fill(job, spark, folders)
        with stand_in(folders) as endpoint:
            first, told, memory = _timed(replace(job, s3=_s3(endpoint)))
            nothing, _, _ = _timed(replace(job, s3=_s3(endpoint)))
        changes = _changes(job, folders) if folders == MILLION else []
    if told["computed"]:
        raise RuntimeError(f"expected nothing new, found {told}")
    return Measured(first, told["list"], nothing, memory, changes)


def _changes(job: Job, folders: int) -> list[Result]:
    """Take one image of each folder away; then bring it back, with others that are new."""
    with stand_in(folders, gone=1) as endpoint:
        gone, told, _ = _timed(replace(job, s3=_s3(endpoint), choices=Choices(allow_removals=True)))
    with stand_in(folders, more=NEW) as endpoint:
        grown, of_grown, _ = _timed(replace(job, s3=_s3(endpoint)))
    if (told["dropped"], of_grown["computed"]) != (folders, folders * (NEW + 1)):
        raise RuntimeError(f"expected {folders} gone, then more; found {told}, {of_grown}")
    return [
        Result("one_gone_1m_pca_seconds", told["pca"], "s", "<= 10"),
        Result("one_gone_1m_seconds", gone, "s", "<= 200"),
        Result("grown_1m_seconds", grown - of_grown["matrix"], "s", "<= 60"),
    ]


def _timed(job: Job) -> tuple[float, dict[str, float], float]:
    """Run a job; return its seconds, its counts and timings, and the driver's peak in MB."""
    mine = os.getpid(), job.spark().sparkContext._gateway.proc.pid
    for process in mine:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    began = time.monotonic()
    run = job.run()
    seconds = time.monotonic() - began
    return seconds, asdict(run.counts) | run.timings, sum(map(_peak, mine))


def _peak(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1000


def _s3(endpoint: str) -> S3Settings:
    return S3Settings(endpoint, "us-east-1", "key", "secret")


def _job(folder: Path, spark: SparkSession, cluster: Loopback, endpoint: str) -> Job:
    weights = find_weights("efficientnet_lite0", None)
    network = identify(NETWORKS["efficientnet_lite0"], weights, 96)
    return Job(
        images=Address("b", "images"),
        output=Address.parse(str(folder)),
        model=MODEL,
        flatbuffer=lambda: flatbuffer(network, weights),
        spark=lambda: spark,
        s3=_s3(endpoint),
        observer=Silent(),
        pca=PCAOptions(2, None),
    )


def _fill(job: Job, spark: SparkSession, folders: int) -> None:
    """Write the table: a file for each folder."""
    table = job.table
    table.open(job.flatbuffer)
    base = table.create()
    known = table.known(base)
    assert known is not None
    fill = _filling(table.parts)
    table.commit(base, known, answers_of(spark, range(folders), fill))


def _filling(parts: Parts) -> Callable[[Iterator[int]], Iterator[pa.RecordBatch]]:
    """Return what a task does: it writes the images of folders with random features."""
    dimensions, pages, keys_of_page, name = DIMENSIONS, PAGES, KEYS, NAME

    def fill(folders: Iterator[int]) -> Iterator[pa.RecordBatch]:
        for folder in folders:
            keys = [(page, key) for page in range(pages) for key in range(keys_of_page)]
            count = len(keys)
            random = np.random.default_rng(folder).normal(size=(count, dimensions))
            values = random.astype(np.float32).ravel()
            offsets = np.arange(0, values.size + 1, dimensions, dtype=np.int32)
            modified = pa.scalar(1769860800000000, TABLE.field("modified").type)
            columns = {
                "path": [f"{folder:04}/{name.format(*key)}" for key in keys],
                "label": [f"{folder:04}"] * count,
                "length": [4000 + key for _, key in keys],
                "modified": pa.repeat(modified, count),
                "version": [f"{key:032x}" for _, key in keys],
                "sha256": pa.nulls(count, pa.binary()),
                "decoder": [DECODER] * count,
                "runtime": [RUNTIME] * count,
                "features": pa.ListArray.from_arrays(offsets, values),
                "stage": pa.nulls(count, pa.string()),
                "reason": pa.nulls(count, pa.string()),
            }
            yield written(parts, "filled", pa.table(columns, schema=TABLE), dimensions)

    return fill
