"""Keeps a feature table quick to read, and deletes what no version names."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.errors import StateError
from pipeline.output import WORK
from pipeline.storage import Entry
from pipeline.table.delta import UPKEEP, Change, File, Snapshot
from pipeline.table.feature_table import ROWS_PER_FILE, FeatureTable
from pipeline.table.parts import Parts, for_each

SMALL = ROWS_PER_FILE // 4  # rows; a file with fewer is worth merging
MOST_SMALL_FILES = 32  # what a dozen small passes leave
MERGED = pa.schema([("path", pa.string()), ("size", pa.int64()), ("rows", pa.int64())])
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
    told = for_each(spark, list(_groups(small)), merge, MERGED)
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
            each = [pa.Table.from_batches(list(self.parts.read(file))) for file in group]
            rows = pa.concat_tables(each, promote_options="default")  # older ones lack a column
            path = f"{self.commit}/{uuid.uuid4().hex}.parquet"
            size = self.parts.write(path, rows)
            yield pa.RecordBatch.from_pydict(
                {"path": [path], "size": [size], "rows": [rows.num_rows]}, MERGED
            )


def sweep_all(table: FeatureTable) -> Swept:
    """Delete all that the newest version does not name, however young; readers of others end.

    First an empty commit, as a fence: whoever is at work from before it cannot commit any more, so
    that none of the files that are deleted can become live.
    """
    snapshot = table.newest()
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
    snapshot = table.newest()
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
