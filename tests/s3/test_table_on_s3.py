"""What commits and joins rest on, on a real S3 server: conditional writes, parts copied there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import StateError, StorageError
from pipeline.output import check_exclusive_writes
from pipeline.storage import BucketStore
from pipeline.table.delta import Change, Delta, File, Snapshot
from pipeline.table.parts import Parts

SCHEMA = pa.schema([pa.field("path", pa.string(), nullable=False)])


@pytest.fixture
def delta(bucket: BucketStore) -> Delta:
    return Delta(bucket.address / "out é/table", bucket.s3)


def write(delta: Delta, name: str, rows: int = 3) -> File:
    path = f"{name}/part.parquet"
    table = pa.table([pa.array([f"{name}-{row}" for row in range(rows)])], schema=SCHEMA)
    return File(path, Parts(delta.address, delta.s3).write(path, table), rows)


def race(*runs: Callable[[], Snapshot]) -> list[Snapshot | StateError]:
    """Let runs commit at the same moment, as near as threads come to it."""
    start = threading.Barrier(len(runs))

    def run(commit: Callable[[], Snapshot]) -> Snapshot | StateError:
        start.wait()
        try:
            return commit()
        except StateError as error:
            return error

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(run, runs))


def test_of_runs_that_commit_at_once_one_wins_and_the_others_are_told(delta: Delta) -> None:
    snapshot = delta.create(SCHEMA, "empty")
    won = 0
    for turn in range(6):
        files = [write(delta, f"{turn}-{run}") for run in range(3)]
        doors = [Delta(delta.address, delta.s3) for _ in files]
        outcomes = race(
            *(
                lambda door=door, file=file, base=snapshot: door.commit(
                    base, Change((file,), tuple(base.files)), file.path
                )
                for door, file in zip(doors, files, strict=True)
            )
        )
        (winner,) = (one for one in outcomes if isinstance(one, Snapshot))
        losers = [str(one) for one in outcomes if isinstance(one, StateError)]
        assert all("expected nobody else to write" in told for told in losers), losers
        found = delta.snapshot()
        assert found is not None
        assert (found.rows, found.state) == (3, winner.state), "one run's rows, replaced by its own"
        snapshot, won = found, won + 1
    assert won == 6


def test_the_server_refuses_the_second_of_two_new_objects(bucket: BucketStore) -> None:
    check_exclusive_writes(bucket, "_work/probe")
    assert bucket.read("_work/probe") is None
    assert bucket.write_new("one", b"first")
    assert not bucket.write_new("one", b"second")
    assert bucket.read("one") == b"first"


def test_a_server_that_takes_both_is_refused(
    bucket: BucketStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(store: BucketStore, key: str, content: bytes) -> bool:
        store.write(key, content)
        return True

    monkeypatch.setattr(BucketStore, "write_new", careless)
    with pytest.raises(StorageError, match="--single-writer"):
        check_exclusive_writes(bucket, "_work/probe")
    assert bucket.read("_work/probe") is None


@pytest.mark.parametrize("here", [0, 10**9], ids=["by the server", "by this machine"])
def test_parts_are_joined_in_their_order(
    bucket: BucketStore, monkeypatch: pytest.MonkeyPatch, here: int
) -> None:
    monkeypatch.setattr(storage, "JOINED_HERE", here)
    sizes = [9 << 20, 100, 5, 8 << 20, 3 << 20, 6 << 20, 1]
    contents = [bytes([65 + number]) * size for number, size in enumerate(sizes)]
    for number, content in enumerate(contents):
        bucket.write(f"parts/{number}", content)
    bucket.join([(f"parts/{number}", size) for number, size in enumerate(sizes)], "whole é.csv")
    assert bucket.read("whole é.csv") == b"".join(contents)
    assert bucket.read("parts/0") == contents[0]


def test_what_a_bucket_keeps_of_deleted_objects_is_told(bucket: BucketStore) -> None:
    assert bucket.old_versions() is None
    bucket.client.put_bucket_versioning(
        Bucket=bucket.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    assert "no rule of the bucket deletes them" in str(bucket.old_versions())
    rule = {
        "ID": "old", "Status": "Enabled", "Filter": {"Prefix": ""},
        "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
    }  # fmt: skip
    bucket.client.put_bucket_lifecycle_configuration(
        Bucket=bucket.bucket, LifecycleConfiguration={"Rules": [rule]}
    )
    assert "after 30 days" in str(bucket.old_versions())
