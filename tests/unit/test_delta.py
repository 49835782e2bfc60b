"""The door to the table: a commit holds on the snapshot it was computed from, or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake

from pipeline.errors import StateError
from pipeline.s3.access import S3Settings
from pipeline.storage import Address
from pipeline.table.delta import UPKEEP, Change, Delta, File, Snapshot, StaleSnapshotError
from pipeline.table.parts import Parts

SCHEMA = pa.schema([pa.field("path", pa.string(), nullable=False), pa.field("n", pa.int64())])


@pytest.fixture
def delta(tmp_path: Path) -> Delta:
    return Delta(Address.parse(str(tmp_path / "table é")), S3Settings())


def write(delta: Delta, name: str, rows: int = 3) -> File:
    """Write a file of the table, as a task does."""
    path = f"{name}/part.parquet"
    paths = pa.array([f"{name}-{row}" for row in range(rows)])
    table = pa.table([paths, pa.array(range(rows), pa.int64())], schema=SCHEMA)
    return File(path, Parts(delta.address, delta.s3).write(path, table), rows)


def committed(delta: Delta, *names: str) -> Snapshot:
    snapshot = delta.create(SCHEMA, "empty")
    for name in names:
        snapshot = delta.commit(snapshot, Change(add=(write(delta, name),)), f"with {name}")
    return snapshot


def rows_of(delta: Delta) -> list[str]:
    return sorted(DeltaTable(delta.address.path).to_pyarrow_table()["path"].to_pylist())


def test_there_is_no_table_before_the_first(delta: Delta) -> None:
    assert delta.snapshot() is None
    made = delta.create(SCHEMA, "empty")
    assert (made.files, made.rows, made.state) == ({}, 0, "empty")


def test_a_table_that_another_run_has_made_is_taken(delta: Delta) -> None:
    first = committed(delta, "a")
    assert delta.create(SCHEMA, "empty again") == first


def test_files_come_and_go_with_the_name_of_what_is_known_of_them(delta: Delta) -> None:
    snapshot = committed(delta, "a", "b")
    assert (snapshot.rows, snapshot.state, len(snapshot.files)) == (6, "with b", 2)
    new = write(delta, "c", 2)
    snapshot = delta.commit(snapshot, Change((new,), ("a/part.parquet",)), "without a")
    assert snapshot == delta.snapshot()
    assert (snapshot.rows, snapshot.state) == (5, "without a")
    assert rows_of(delta) == ["b-0", "b-1", "b-2", "c-0", "c-1"]


def test_another_runs_rows_end_this_one_and_stay(delta: Delta) -> None:
    base = committed(delta, "a")
    delta.commit(base, Change(add=(write(delta, "theirs"),)), "theirs")
    with pytest.raises(StateError, match="expected nobody else to write"):
        delta.commit(base, Change(add=(write(delta, "ours"),)), "ours")
    assert rows_of(delta) == ["a-0", "a-1", "a-2", "theirs-0", "theirs-1", "theirs-2"]


def merged(delta: Delta, base: Snapshot) -> Snapshot:
    """Merge all files, as upkeep does."""
    new = write(delta, "merged", base.rows)
    return delta.commit(base, Change((new,), tuple(base.files), UPKEEP), str(base.state))


def test_upkeep_between_is_no_hindrance_to_new_files(delta: Delta) -> None:
    base = committed(delta, "a", "b")
    upkept = merged(delta, base)
    assert upkept.state == "with b"
    snapshot = delta.commit(base, Change(add=(write(delta, "c"),)), "with c")
    assert set(snapshot.files) == {"merged/part.parquet", "c/part.parquet"}


def test_what_upkeep_has_merged_is_not_removed_by_a_run_that_did_not_see_it(delta: Delta) -> None:
    base = committed(delta, "a", "b")
    merged(delta, base)
    with pytest.raises(StaleSnapshotError, match="were merged while this run worked"):
        delta.commit(base, Change((write(delta, "c"),), ("a/part.parquet",)), "stale")
    assert "c-0" not in rows_of(delta)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ("none", "bytes, found none"),
        ("another", r"with [\d,]+ bytes, found 5"),
        ("old", "less than a day old, found it written at"),
    ],
)
def test_a_file_to_add_must_be_there_as_it_was_written(
    delta: Delta, found: str, complaint: str
) -> None:
    base = committed(delta)
    new = write(delta, "a")
    file = Path(delta.address.path) / new.path
    match found:
        case "none":
            file.unlink()
        case "another":
            file.write_bytes(b"short")
        case _:
            long_ago = time.time() - 25 * 3600
            os.utime(file, (long_ago, long_ago))
    with pytest.raises(StateError, match=complaint):
        delta.commit(base, Change(add=(new,)), "a")
    assert delta.snapshot() == base


def test_a_file_to_remove_must_be_live(delta: Delta) -> None:
    base = committed(delta, "a")
    after = delta.commit(base, Change(remove=("a/part.parquet",)), "gone")
    with pytest.raises(StateError, match="among the live files"):
        delta.commit(after, Change(remove=("a/part.parquet",)), "gone twice")


def test_after_another_programs_commit_nothing_is_known_of_the_rows(delta: Delta) -> None:
    committed(delta, "a")
    foreign = pa.table({"path": ["theirs"], "n": pa.array([1], pa.int64())}, schema=SCHEMA)
    properties = CommitProperties(custom_metadata={"other": "name"})
    write_deltalake(delta.address.path, foreign, mode="append", commit_properties=properties)
    snapshot = delta.snapshot()
    assert snapshot is not None
    assert (snapshot.rows, snapshot.state) == (4, None)
    again = delta.commit(snapshot, Change(kind=UPKEEP), "counted anew")
    assert (again.rows, again.state) == (4, "counted anew")
