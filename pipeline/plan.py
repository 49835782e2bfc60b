"""What a pass has to do: a listing and the feature table compared in Spark.

No list of images comes to the driver: the plan lies in files, and the driver knows which of their
rows belong to which file of the table.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.engine.session import task_slots
from pipeline.errors import RemovalsError
from pipeline.listing.images import LISTED
from pipeline.quarantine import READ
from pipeline.storage import Address
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import DECODER, RUNTIME, FeatureTable
from pipeline.table.parts import Parts, Slice, for_each

FILES_PER_COMMIT = 1000  # files that are written again
ROWS_PER_PLAN_PART = 65_536
MOST_GONE, MOST_GONE_SHARE = 100, 0.1  # more than both is not believed at once

# What is to be computed: an image as it was listed, and what the table has of it, if anything: the
# hash of its content, why it could not be read, whether today's decoder and runtime made it, and
# whether it was listed then as it is now.
TODO = pa.schema(
    [
        *LISTED,
        pa.field("known_sha256", pa.binary()),
        pa.field("known_since", pa.int64()),
        pa.field("known_reason", pa.string()),
        pa.field("same_maker", pa.bool_()),
        pa.field("same_listing", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Touched:
    """A file of the table with rows that change or go: where they are named in the plan."""

    file: str
    part: str
    start: int
    todo: int  # rows that are computed again; they come first
    gone: int


@dataclass(frozen=True)
class Plan:
    """What a pass has to do: slices of images that are new, and files with rows to replace."""

    new: list[Slice]
    touched: list[Touched]
    unsure: int = 0

    @property
    def todo(self) -> int:
        """How many images have to be computed."""
        return sum(s.count for s in self.new) + sum(t.todo for t in self.touched)

    @property
    def gone(self) -> int:
        """How many rows have no image any more."""
        return sum(t.gone for t in self.touched)

    def commits(self, images: int) -> Iterator[tuple[list[Slice], list[Touched]]]:
        """Yield the work in parts of at most so many images each."""
        for some in cut_into(self.new, images):
            yield some, []
        batch: list[Touched] = []
        for touched in self.touched:
            if batch and (
                len(batch) == FILES_PER_COMMIT or sum(t.todo for t in batch) + touched.todo > images
            ):
                yield _todo_of(batch), batch
                batch = []
            batch.append(touched)
        if batch:
            yield _todo_of(batch), batch


def check_removals(gone: int, known: int, images: Address) -> None:
    """Refuse a listing that lacks more than a hundred and a tenth of the images that are known."""
    if gone > MOST_GONE and gone > MOST_GONE_SHARE * known:
        raise RemovalsError(
            f"expected about the {known:,} images that are known below {images}, found {gone:,} "
            "of them gone. Check that the address is right and all of it can be seen; if they are "
            "to go, run again with --allow-removals."
        )


KNOWN = pa.schema(
    [
        ("path", pa.string()),
        ("known_length", pa.int64()),
        ("known_modified", pa.timestamp("us", "UTC")),
        ("known_version", pa.string()),
        ("again", pa.bool_()),
        ("known_sha256", pa.binary()),
        ("known_since", pa.int64()),
        ("known_reason", pa.string()),
        ("same_maker", pa.bool_()),
        ("file", pa.string()),
    ]
)
PLAN = pa.schema(
    [("part", pa.string()), ("file", pa.string())]
    + [(name, pa.int64()) for name in ("start", "todo", "gone")]
)
KEYS = [
    *("path", "length", "modified", "version", "stage", "sha256", "reason", "decoder", "runtime"),
    "since",  # older files lack it
]


def make_plan(
    spark: SparkSession,
    table: FeatureTable,
    snapshot: Snapshot,
    listed: list[Slice],
    sure_until: datetime | None,
    work: Parts,
    *,
    left_alone: Sequence[str],
    recompute: bool,
    retry_quarantine: bool,
) -> Plan:
    """Compare a listing with the table: what is new, what changed, what is gone.

    Of images modified after `sure_until` the listing knows too little to change or remove a row.
    Images that could not be read are to be tried again, but for those whose reasons begin with the
    words `left_alone`. With `recompute`, rows that another decoder or runtime made are to be
    computed again; with `retry_quarantine`, all that have no features.
    """
    slots = task_slots(spark)
    parts = table.parts

    def images(slices: Iterator[Slice]) -> Iterator[pa.RecordBatch]:
        for some in slices:
            yield from work.read(some.path, LISTED.names)

    def keys(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            for batch in parts.read(file, KEYS):
                row = dict(zip(batch.schema.names, batch.columns, strict=True))
                again = _again(row, left_alone, retry_quarantine=retry_quarantine)
                yield _known_columns(row, file, again)

    now = for_each(spark, listed, images, LISTED)
    known = for_each(spark, list(snapshot.files), keys, KNOWN)
    is_gone = sf.col("version").isNull()
    same_listing = (sf.col("length") == sf.col("known_length")) & (
        sf.col("version") == sf.col("known_version")
    )
    is_same = same_listing & ~sf.col("again")
    if recompute:
        is_same &= sf.col("same_maker")
    differs = now.join(known, "path", "full_outer").where(
        is_gone | sf.col("file").isNull() | ~is_same
    )
    unsure = 0
    if sure_until is not None:
        too_young = sf.coalesce(sf.col("known_modified") >= sf.lit(sure_until), sf.lit(False))
        unsure = differs.where(too_young).count()
        differs = differs.where(~too_young)
    # The rows of a file come together; those of no file yet are dealt out.
    place = sf.coalesce("file", (sf.xxhash64("path") % (4 * slots)).cast("string"))
    ordered = (
        differs.withColumn("same_listing", same_listing)
        .select(*TODO.names, "file", is_gone.alias("gone"))
        .repartition(4 * slots, place)
        .sortWithinPartitions(sf.col("file").asc_nulls_first(), "gone")
    )
    told_of = ordered.mapInArrow(WritePlan(work), from_arrow_schema(PLAN)).toArrow().to_pylist()
    new = [Slice(row["part"], row["start"], row["todo"]) for row in told_of if row["file"] is None]
    touched = [
        Touched(row["file"], row["part"], row["start"], row["todo"], row["gone"])
        for row in told_of
        if row["file"] is not None
    ]
    return Plan(new, touched, unsure)


def _again(
    row: dict[str, pa.Array], left_alone: Sequence[str], *, retry_quarantine: bool
) -> pa.Array:
    """Tell of a file's rows which images are to be tried again, though nothing has changed."""
    if retry_quarantine:
        return pc.is_valid(row["stage"])
    word = pc.list_element(pc.split_pattern(pc.fill_null(row["reason"], ""), ":"), 0)
    of_reading = pc.fill_null(pc.equal(row["stage"], READ), False)
    return pc.and_not(of_reading, pc.is_in(word, value_set=pa.array(left_alone, pa.string())))


def _known_columns(row: dict[str, pa.Array], file: str, again: pa.Array) -> pa.RecordBatch:
    """Return of a file's rows what decides whether an image has to be computed again."""
    of_today = pc.equal(row["decoder"], DECODER), pc.equal(row["runtime"], RUNTIME)
    unread = pc.fill_null(pc.equal(row["stage"], READ), False)
    return pa.RecordBatch.from_pydict(
        {
            "path": row["path"],
            "known_length": row["length"],
            "known_modified": row["modified"],
            "known_version": row["version"],
            "again": again,
            "known_since": row.get("since", pa.nulls(len(unread), pa.int64())),
            "known_sha256": pc.if_else(again, pa.scalar(None, pa.binary()), row["sha256"]),
            "known_reason": pc.if_else(unread, row["reason"], pa.scalar(None, pa.string())),
            "same_maker": pc.and_(*of_today),
            "file": pa.array([file] * len(unread), pa.string()),
        },
        KNOWN,
    )


@dataclass(frozen=True)
class WritePlan:
    """Writes a partition of the plan, sorted by file; tells of each file which rows are its own."""

    work: Parts

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield part, file, start, todo and gone."""
        held: list[pa.RecordBatch] = []
        for batch in batches:
            held.append(batch)
            if sum(b.num_rows for b in held) >= ROWS_PER_PLAN_PART:
                rows = pa.Table.from_batches(held)
                whole = _rows_of_whole_files(rows)
                if whole:
                    yield self._write(rows.slice(0, whole))
                    held = rows.slice(whole).to_batches()
        if held and (rows := pa.Table.from_batches(held)).num_rows:
            yield self._write(rows)

    def _write(self, rows: pa.Table) -> pa.RecordBatch:
        part = f"plan-{uuid.uuid4().hex}.parquet"
        self.work.write(part, rows)
        told_of, start = [], 0
        # Arrow's own group_by does not keep the order of the rows.
        sorted_rows = zip(rows["file"].to_pylist(), rows["gone"].to_pylist(), strict=True)
        for file, of_file in groupby(sorted_rows, key=itemgetter(0)):
            gone = [is_gone for _, is_gone in of_file]
            told_of.append(
                {
                    "part": part,
                    "file": file,
                    "start": start,
                    "todo": len(gone) - sum(gone),
                    "gone": sum(gone),
                }
            )
            start += len(gone)
        return pa.RecordBatch.from_pylist(told_of, PLAN)


def _rows_of_whole_files(rows: pa.Table) -> int:
    """Return how many rows come before those of the last file, which may not be complete."""
    last = rows["file"][-1].as_py()
    if last is None:
        return int(rows.num_rows)
    others = pc.fill_null(pc.not_equal(rows["file"], last), True)
    return int(pc.sum(others).as_py() or 0)


def cut_into(slices: Sequence[Slice], rows: int) -> Iterator[list[Slice]]:
    """Yield slices in lists of at most so many rows."""
    batch: list[Slice] = []
    room = rows
    for some in slices:
        while some.count > room:
            yield [*batch, Slice(some.path, some.start, room)] if room else batch
            some = Slice(some.path, some.start + room, some.count - room)
            batch, room = [], rows
        batch.append(some)
        room -= some.count
    if batch:
        yield batch


def _todo_of(touched: Sequence[Touched]) -> list[Slice]:
    return [Slice(t.part, t.start, t.todo) for t in touched if t.todo]
