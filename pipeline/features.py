"""The one Spark pass over the images, as the driver leads it.

An image is read, decoded and run through the network once (task.py); what came of it is its row
in the feature table (table.py), which grows in batches of bounded size. A driver that is killed
loses the batch it was in, nothing else.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.accumulators import Accumulator
from pyspark.sql import SparkSession

from pipeline.engine.session import task_slots
from pipeline.errors import StateError
from pipeline.images import LISTING
from pipeline.storage import ImageReader
from pipeline.table import (
    CODEC,
    INDEX,
    KEY,
    READ,
    ROWS,
    FeatureTable,
    Pass,
    Speed,
    index_schema,
    largest_pass,
)
from pipeline.task import PassOverImages

IMAGES_PER_SLOT_AND_BATCH = 8192  # about a minute of work: what a killed driver loses at most
TASKS_PER_SLOT_AND_BATCH = 4  # the bar moves as tasks end; each costs some 0.2 s to commit


@dataclass(frozen=True)
class Progress:
    """How far a pass is: images done of those to do, and how many of them in quarantine."""

    done: int
    total: int
    quarantined: int


def compute_features(
    spark: SparkSession,
    table: FeatureTable,
    images: pa.Table,
    reader: ImageReader,
    flatbuffer: bytes,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Pass:
    """Bring the feature table up to date with a listing.

    Parameters
    ----------
    images
        A table of the schema LISTING.
    on_progress
        Called about twice a second while Spark works.

    Returns
    -------
    Pass
        The index of exactly the images listed, and what had to be computed for it.
    """
    began = time.monotonic()
    known = _known_rows(spark, table)
    todo = _not_in(images, known)
    slots = task_slots(spark)
    model = spark.sparkContext.broadcast(flatbuffer)
    done, quarantined = (spark.sparkContext.accumulator(0) for _ in range(2))
    step = slots * IMAGES_PER_SLOT_AND_BATCH
    fresh = []
    with _reporting(todo.num_rows, done, quarantined, on_progress):
        for number, start in enumerate(range(0, todo.num_rows, step), 1):
            part = todo.slice(start, step)
            spark.sparkContext.setJobDescription(
                f"features: images {start + 1} to {start + part.num_rows} of {todo.num_rows}"
            )
            batch = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{number:05d}-{uuid.uuid4().hex[:6]}"
            run = PassOverImages(
                model, table.model.input_size, reader, batch, done, quarantined
            )  # fmt: skip
            _write_batch(spark, table, part, run, slots)
            fresh.append(batch)
    spark.sparkContext.setJobDescription("")
    if fresh:
        known = pa.concat_tables([known, _index_of(spark, table, fresh)])
    index = _live_index(images, known)
    previous = table.read_index()
    largest = None if previous is None else largest_pass(previous)
    if todo.num_rows and (largest is None or todo.num_rows >= largest.images):
        largest = Speed(todo.num_rows, time.monotonic() - began, slots)
    table.write_index(index, reader.address, largest)
    return Pass(
        index=index,
        computed=todo.num_rows,
        reused=images.num_rows - todo.num_rows,
        dropped=0 if previous is None else _count_gone(previous, images),
        largest=largest,
    )


def _known_rows(spark: SparkSession, table: FeatureTable) -> pa.Table:
    """Return the index of all committed rows, but for images that could not be read then."""
    batches = table.committed_batches()
    if not batches:
        return pa.table({name: [] for name in INDEX}).cast(index_schema())
    rows = _index_of(spark, table, batches)
    return rows.filter(pc.fill_null(pc.not_equal(rows["stage"], READ), True))


def _index_of(spark: SparkSession, table: FeatureTable, batches: list[str]) -> pa.Table:
    frame = spark.read.schema(ROWS).parquet(*(table.batch_uri(batch) for batch in batches))
    return frame.select(*INDEX).toArrow().cast(index_schema())


def _not_in(images: pa.Table, known: pa.Table) -> pa.Table:
    joined = images.join(known.select(KEY), KEY, join_type="left anti")
    return joined.select(LISTING.names).sort_by("path")


def _live_index(images: pa.Table, known: pa.Table) -> pa.Table:
    """Return one row for each image listed; of an image computed twice, the newest batch's."""
    newest = known.group_by(KEY).aggregate([("batch", "max")]).rename_columns([*KEY, "batch"])
    live = images.join(newest, KEY, join_type="inner").join(
        known.select([*KEY, "batch", "stage", "reason"]), [*KEY, "batch"], join_type="inner"
    )
    if live.num_rows != images.num_rows:
        raise StateError(
            f"expected a row for each of {images.num_rows} images, found {live.num_rows}: the "
            "feature table was changed while this ran. Run again, one run at a time."
        )
    return live.select(INDEX).sort_by("path").cast(index_schema())


def _count_gone(previous: pa.Table, images: pa.Table) -> int:
    gone: pa.Table = previous.join(images.select(["path"]), ["path"], join_type="left anti")
    return int(gone.num_rows)


def _write_batch(
    spark: SparkSession, table: FeatureTable, images: pa.Table, run: PassOverImages, slots: int
) -> None:
    tasks = min(slots * TASKS_PER_SLOT_AND_BATCH, images.num_rows)
    frame = spark.createDataFrame(images).repartition(tasks)
    rows = frame.mapInArrow(run, ROWS)
    rows.write.option("compression", CODEC).parquet(table.batch_uri(run.batch))
    _check_commit(table, run.batch)


def _check_commit(table: FeatureTable, batch: str) -> None:
    """Make sure that S3 got the batch from the magic committer: another one is not atomic there."""
    key = f"{table.root}/batches/{batch}/_SUCCESS"
    proof = table.output.read(key)
    if proof is None:
        raise StateError(
            f"expected {table.output.address}/{key} after the commit, found none. Run again: "
            "the batch is computed anew."
        )
    if table.output.address.bucket is not None:
        committer = json.loads(proof or b"{}").get("committer")
        if committer != "magic":
            raise StateError(
                f"expected the magic committer on {table.output.address}, found {committer}. "
                "Start the cluster with the spark-defaults.conf and the jars of pipeline/engine/."
            )


@contextmanager
def _reporting(
    total: int,
    done: Accumulator[int],
    quarantined: Accumulator[int],
    on_progress: Callable[[Progress], None],
) -> Iterator[None]:
    """Call `on_progress` twice a second; accumulators move as tasks end."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(0.5):
            on_progress(Progress(done.value, total, quarantined.value))

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()
        on_progress(Progress(done.value, total, quarantined.value))
