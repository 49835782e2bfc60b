"""Keeps a feature table quick to read, deletes what no version names, and forgets images."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.errors import StateError
from pipeline.output import WORK
from pipeline.plan import Touched
from pipeline.storage import Entry, Store
from pipeline.table.delta import UPKEEP, Change, File, Snapshot
from pipeline.table.feature_table import ROWS_PER_FILE, WRITTEN, WRITTEN_SQL, FeatureTable
from pipeline.table.parts import Parts, for_each
from pipeline.task import Rewrite

SMALL = ROWS_PER_FILE // 4  # rows; a file with fewer is worth merging
MOST_SMALL_FILES = 32  # what a dozen small passes leave
SHORTEST_RETENTION = timedelta(days=2)  # a pass that began before is over by then


@dataclass(frozen=True)
class Swept:
    """What was deleted: files of the table, states, bytes."""

    files: int
    states: int
    bytes: int


def merge_small_files(spark: SparkSession, table: FeatureTable, snapshot: Snapshot) -> Snapshot:
    """Merge small files, once there are many, into larger ones with the same rows."""
    small = sorted(
        (file for file in snapshot.files.values() if file.rows < SMALL), key=lambda f: f.path
    )
    if len(small) <= MOST_SMALL_FILES:
        return snapshot
    merge = Merge(table.parts, uuid.uuid4().hex)
    spark.sparkContext.setJobDescription(f"features: {len(small)} small files merged")
    told = for_each(spark, list(_groups(small)), merge, "path string, size long, rows long")
    add = tuple(File(**row.asDict()) for row in told.collect())
    spark.sparkContext.setJobDescription("")
    change = Change(add, tuple(file.path for file in small), UPKEEP)
    return table.delta.commit(snapshot, change, str(snapshot.state))


def _groups(files: list[File]) -> Iterator[list[str]]:
    group: list[str] = []
    rows = 0
    for file in files:
        if group and rows + file.rows > ROWS_PER_FILE:
            yield group
            group, rows = [], 0
        group.append(file.path)
        rows += file.rows
    yield group


@dataclass(frozen=True)
class Merge:
    """Writes the rows of several files as one."""

    parts: Parts
    commit: str

    def __call__(self, groups: Iterator[list[str]]) -> Iterator[pa.RecordBatch]:
        """Yield path, size and rows of each new file."""
        for group in groups:
            rows = pa.Table.from_batches([b for file in group for b in self.parts.read(file)])
            path = f"{self.commit}/{uuid.uuid4().hex}.parquet"
            size = self.parts.write(path, rows)
            yield pa.RecordBatch.from_pydict(
                {"path": [path], "size": [size], "rows": [rows.num_rows]}
            )


def forget(
    spark: SparkSession, table: FeatureTable, images: Store, paths: Sequence[str], work: Parts
) -> int:
    """Remove images from the table; return how many of them had a row.

    The files that held them are written again without them and the moments corrected; what holds
    them still, in files and states of older versions, `sweep_all` deletes.

    Raises
    ------
    StateError
        When an image still lies where it was listed: the next run would take it in again.
    """
    for path in paths:
        if any(entry.key == path for entry in images.list(path)):
            raise StateError(
                f"expected {images.address}/{path} to be deleted before it is forgotten, found "
                "it there: the next run would take it in again. Delete it, then run this again."
            )
    snapshot = _newest(table)
    known = table.known(snapshot)
    if known is None:
        raise StateError("what is known of the table's rows is lost. Run fruits run first.")
    touched = _rows_of(spark, table, snapshot, frozenset(paths), work)
    if touched:
        rewrite = Rewrite(table.parts, work, [], uuid.uuid4().hex, table.model.dimensions)
        told = for_each(spark, touched, rewrite, WRITTEN_SQL).toArrow().cast(WRITTEN)
        made, _ = table.commit(snapshot, known, told)
        last = table.last_pass()
        if last is not None and last.state == snapshot.state:
            table.keep_pass(replace(last, state=str(made.state)))
    return sum(one.gone for one in touched)


def _rows_of(
    spark: SparkSession, table: FeatureTable, snapshot: Snapshot, paths: frozenset[str], work: Parts
) -> list[Touched]:
    """Return the files that hold rows of images, whose paths are written down beside them."""
    parts = table.parts

    def find(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            rows = (path for b in parts.read(file, ["path"]) for path in b.column(0).to_pylist())
            found = [path for path in rows if path in paths]
            yield pa.RecordBatch.from_pydict(
                {
                    "file": pa.array([file] * len(found), pa.string()),
                    "path": pa.array(found, pa.string()),
                }
            )

    found = for_each(spark, list(snapshot.files), find, "file string, path string").collect()
    rows = sorted((row["file"], row["path"]) for row in found)
    work.write("forget.parquet", pa.table({"path": pa.array([p for _, p in rows], pa.string())}))
    counts = Counter(file for file, _ in rows)
    starts = accumulate(counts.values(), initial=0)
    return [
        Touched(file, "forget.parquet", start, 0, count)
        for (file, count), start in zip(counts.items(), starts, strict=False)
    ]


def _newest(table: FeatureTable) -> Snapshot:
    snapshot = table.snapshot()
    if snapshot is None:
        raise StateError(f"expected a feature table in {table.delta.address}, found none.")
    return snapshot


def sweep_all(table: FeatureTable) -> Swept:
    """Delete all that the newest version does not name, however young; readers of others end.

    First an empty commit, as a fence: whoever is at work from before it cannot commit any more, so
    that none of the files that are deleted can become live.
    """
    snapshot = _newest(table)
    fence = table.delta.commit(snapshot, Change(), str(snapshot.state))
    entries = table.delta.store.list("_delta_log/")
    since = max(entry.modified for entry in entries if entry.key.endswith(f"{fence.version}.json"))
    table.output.delete(WORK)
    return _sweep(
        table,
        lambda entry: entry.key not in fence.files and entry.modified <= since,
        lambda name, entry: name != fence.state and entry.modified <= since,
    )


def _sweep(
    table: FeatureTable,
    file_goes: Callable[[Entry], bool],
    state_goes: Callable[[str, Entry], bool],
) -> Swept:
    data = (e for e in table.delta.store.list() if not e.key.startswith("_delta_log/"))
    files = [entry for entry in data if file_goes(entry)]
    states = [
        entry
        for entry in table.output.list(f"{table.root}/states/")
        if state_goes(entry.key.rpartition("/")[2].removesuffix(".npz"), entry)
    ]
    table.delta.store.delete_keys(entry.key for entry in files)
    table.output.delete_keys(entry.key for entry in states)
    return Swept(len(files), len(states), sum(entry.length for entry in [*files, *states]))


def vacuum(table: FeatureTable, retention: timedelta) -> Swept:
    """Delete what is older than the retention and not named by a version that is kept.

    Such are files whose rows were rewritten or removed, files that a killed run left, and states of
    versions long gone. A reader that opened the table before `retention` may find its files gone.

    Raises
    ------
    StateError
        When the retention is shorter than a pass may take, or there is no table.
    """
    if retention < SHORTEST_RETENTION:
        raise StateError(
            f"expected at least {SHORTEST_RETENTION.days} days, found {retention.days}: what is "
            "younger may belong to a run at work."
        )
    snapshot = _newest(table)
    long_ago = datetime.now(UTC) - retention
    old = set(table.delta.unnamed_files(retention)) - snapshot.files.keys()
    named = table.delta.states(retention)
    work = [e.key for e in table.output.list(f"{WORK}/") if e.modified < long_ago]
    table.output.delete_keys(work)
    table.delta.clean_log()
    return _sweep(
        table,
        lambda entry: entry.key in old and entry.modified < long_ago,
        lambda name, entry: name not in named and entry.modified < long_ago,
    )
