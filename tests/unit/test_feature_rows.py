"""Rows of the feature table: reading ahead, quarantine, what is new, and what a table remembers."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.accumulators import Accumulator, AddingAccumulatorParam

from pipeline import plan, reading, task
from pipeline.errors import RemovalsError, StateError
from pipeline.features import nothing_to_compute
from pipeline.listing.images import LISTING, Listing, list_images
from pipeline.networks.model import Model
from pipeline.pca import Moments, feature_matrix
from pipeline.plan import TODO, Plan, Touched, WritePlan, check_removals, cut_into
from pipeline.quarantine import DECODE, READ, BadImageError, Reason
from pipeline.reading import GETS_AT_ONCE, ImageReader, read_ahead, read_listed
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, FolderStore
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import (
    DECODER,
    RUNTIME,
    TABLE,
    FeatureTable,
    Known,
    LastPass,
    Speed,
    Unread,
    models_in,
    written,
)
from pipeline.table.parts import Parts, Slice, cut
from pipeline.task import PassOverImages, Rewrite
from tests.corpus import bad_images, encoded, good_images, picture

MODEL = Model("net-32-abc", "net", 32, 3, "as it is", "weights.h5", "0" * 64)
THEN = datetime(2026, 1, 1, tzinfo=UTC)

# --- reading ahead ---------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"path": str(number), "length": length} for number, length in enumerate(lengths)]


@given(st.lists(st.integers(0, 60_000_000), max_size=60))
def test_images_come_in_the_order_of_their_rows(lengths: list[int]) -> None:
    found = read_ahead(rows_of(lengths), lambda row: row["path"].encode())
    assert list(found) == [str(number).encode() for number in range(len(lengths))]


def most_ahead(lengths: list[int], seconds: float = 0.002) -> tuple[int, int]:
    """Return how many images, and bytes, are at most read and not yet taken."""
    ahead = {"images": 0, "bytes": 0}
    most = dict(ahead)
    lock = threading.Lock()

    def count(images: int, length: int) -> None:
        with lock:
            for name, number in (("images", images), ("bytes", length)):
                ahead[name] += number
                most[name] = max(most[name], ahead[name])

    def read(row: dict[str, Any]) -> bytes:
        count(1, row["length"])
        return b""

    for length, _ in zip(lengths, read_ahead(rows_of(lengths), read), strict=True):
        time.sleep(seconds)  # the network's turn, in which reads get as far ahead as they may
        count(-1, -length)
    return most["images"], most["bytes"]


def test_a_burst_is_read_while_the_network_takes_the_one_before() -> None:
    images, _ = most_ahead([1000] * 200)
    assert GETS_AT_ONCE < images <= 2 * GETS_AT_ONCE


def test_large_images_are_read_ahead_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BYTES_AT_ONCE", 24)
    images, length = most_ahead([10] * 50)
    assert length <= 48, "a burst and the one before it"
    assert images == 4
    assert most_ahead([100] * 5, seconds=0.1) == (2, 200), (
        "one larger than all that is allowed is a burst"
    )


def test_a_read_that_fails_ends_the_pass_with_its_error() -> None:
    def read(row: dict[str, Any]) -> bytes:
        if row["path"] == "3":
            raise OSError("S3 does not answer")
        return b""

    found = read_ahead(rows_of([1] * 50), read)
    assert [next(found) for _ in range(3)] == [b""] * 3
    with pytest.raises(OSError, match="S3 does not answer"):
        next(found)


# --- read as it was listed -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in good_images().items():
        write(tmp_path / name, content)
    for name, (content, _) in bad_images().items():
        write(tmp_path / name, content)
    return tmp_path


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def address_of(folder: Path) -> Address:
    return Address.parse(str(folder))


def listing_of(folder: Path) -> pa.Table:
    listing = list_images(FolderStore(address_of(folder)), Path(tempfile.mkdtemp()))
    return pa.concat_tables([pq.read_table(part) for part, _ in listing.parts])


def test_an_image_is_read_only_as_it_was_listed(tmp_path: Path) -> None:
    for name in ("same", "replaced", "deleted", "folder", "gone/with its folder"):
        write(tmp_path / f"{name}.jpg", b"as listed")
    rows = {row["path"]: row for row in listing_of(tmp_path).to_pylist()}
    write(tmp_path / "replaced.jpg", b"longer than before")
    os.utime(tmp_path / "replaced.jpg", (1, 1))
    (tmp_path / "deleted.jpg").unlink()
    (tmp_path / "folder.jpg").unlink()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone/with its folder.jpg").unlink()
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").touch()
    read = read_listed(ImageReader(address_of(tmp_path), S3Settings()).open())
    assert {path: str(read(row)) for path, row in rows.items()} == {
        "same.jpg": str(b"as listed"),
        "replaced.jpg": "replaced: since it was listed; the next run takes the new one",
        "deleted.jpg": "vanished: deleted since it was listed",
        "folder.jpg": "unreadable: a folder, not a file",
        "gone/with its folder.jpg": "vanished: deleted since it was listed",
    }


def test_an_image_that_may_not_be_read_says_why() -> None:
    error = BadImageError(Reason.DENIED, "S3 answered AccessDenied")
    outcome = read_listed(failing(error))({"path": "a.jpg", "length": 1, "version": "1"})
    assert str(outcome) == "denied: S3 answered AccessDenied"


def test_an_archived_image_is_not_asked_for_before_it_is_tried_again() -> None:
    row = {"path": "a.jpg", "length": 1, "version": "1", "archive": "GLACIER", "known_reason": None}
    outcome = read_listed(failing(AssertionError("it was read")))(row)
    assert str(outcome) == "archived: its storage class is GLACIER"
    again = read_listed(lambda _: (b"restored", "1"))(row | {"known_reason": str(outcome)})
    assert again == b"restored"


def test_an_s3_that_does_not_answer_is_not_the_images_fault() -> None:
    with pytest.raises(OSError, match="connection refused"):
        row = {"path": "a.jpg", "length": 1, "version": "1"}
        read_listed(failing(OSError("connection refused")))(row)


def test_a_file_too_large_for_memory_is_not_read() -> None:
    row = {"path": "a.tif", "length": 3_000_000_000, "version": "1"}
    outcome = read_listed(failing(AssertionError("it was read")))(row)
    assert isinstance(outcome, BadImageError)
    assert (
        str(outcome) == "too large: 3,000,000,000 bytes are more than the 150,000,000 that are read"
    )


def test_links_in_a_circle_are_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    (row,) = listing_of(tmp_path).to_pylist()
    outcome = read_listed(ImageReader(address_of(tmp_path), S3Settings()).open())(row)
    assert str(outcome) == "unreadable: Too many levels of symbolic links"


def failing(error: Exception) -> Callable[[str], tuple[bytes, str]]:
    def read(_key: str) -> tuple[bytes, str]:
        raise error

    return read


# --- the pass of a task ----------------------------------------------------------------------


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PassOverImages:
    """The pass with a network that gives the mean colour: real reads and decodes, no weights."""
    monkeypatch.setattr(task, "_network", lambda _: lambda pixels: pixels.mean(axis=(0, 1)))
    done, quarantined = (Accumulator(n, 0, AddingAccumulatorParam(0)) for n in (71, 72))
    reader = ImageReader(address_of(folder), S3Settings())
    apart = Path(tempfile.mkdtemp())
    work, table = (Parts(address_of(apart / name), S3Settings()) for name in ("work", "table"))
    broadcast: Any = None
    return PassOverImages(broadcast, 32, 3, reader, work, table, "commit-1", done, quarantined)


def rows_by_path(run: PassOverImages, listing: pa.Table) -> dict[str, dict[str, Any]]:
    """Run the pass over slices of a listing, and read what it wrote."""
    run.work.write("listing.parquet", listing)
    told_of = [
        row
        for answer in run(iter(cut([Slice("listing.parquet", 0, listing.num_rows)], 3)))
        for row in answer.to_pylist()
        if row["path"]
    ]
    files = [pa.Table.from_batches(list(run.table.read(row["path"]))) for row in told_of]
    table = pa.concat_tables(files)
    assert table.schema == TABLE
    assert table.select(LISTING.names).equals(listing.select(LISTING.names))
    for row, file in zip(told_of, files, strict=True):
        assert row["path"].startswith("commit-1/")
        assert row["size"] == (Path(run.table.address.path) / row["path"]).stat().st_size
        assert (row["rows"], row["counted"], row["sign"]) == (file.num_rows, file.num_rows, 1)
        assert row["quarantined"] == file.num_rows - file["stage"].null_count
        good = feature_matrix(file["features"].drop_null().combine_chunks(), 3)
        counted = Moments.from_bytes(row["moments"])
        assert counted.n == len(good)
        np.testing.assert_allclose(counted.scatter, Moments.of(good).scatter, rtol=1e-9)
    return {row["path"]: row for row in table.to_pylist()}


def test_every_image_has_a_row_with_features_or_a_reason(run: PassOverImages, folder: Path) -> None:
    rows = rows_by_path(run, listing_of(folder))
    assert rows.keys() == good_images().keys() | bad_images().keys()
    for name in good_images():
        assert (rows[name]["stage"], rows[name]["reason"]) == (None, None), name
        assert len(rows[name]["features"]) == 3
        assert rows[name]["sha256"] == hashlib.sha256(good_images()[name]).digest()
    for name, (_, word) in bad_images().items():
        assert (rows[name]["stage"], rows[name]["features"]) == (DECODE, None)
        assert word in rows[name]["reason"]
    assert {(row["decoder"], row["runtime"]) for row in rows.values()} == {(DECODER, RUNTIME)}
    assert run.done.value == len(rows)
    assert run.quarantined.value == len(bad_images())


def test_a_truncated_image_is_quarantined_with_its_reason(
    run: PassOverImages, folder: Path
) -> None:
    row = rows_by_path(run, listing_of(folder))["bad/truncated.jpg"]
    assert row["stage"] == DECODE
    assert "truncated" in row["reason"].lower()


def test_an_image_gone_since_the_listing_is_quarantined_at_reading(
    run: PassOverImages, folder: Path
) -> None:
    listing = listing_of(folder)
    (folder / "no label.jpg").unlink()
    row = rows_by_path(run, listing)["no label.jpg"]
    assert (row["stage"], row["reason"]) == (READ, "vanished: deleted since it was listed")
    assert row["label"] is row["features"] is None


def test_each_row_gets_the_features_of_its_own_image(run: PassOverImages, folder: Path) -> None:
    for number in range(40):
        content = encoded(picture(20 + number, 20), "PNG")
        write(folder / f"own/{number}.png", content if number % 3 else b"broken")
    for number in range(1, 40, 3):
        grey = encoded(picture(30, 30).convert("L").point(lambda _, n=number: n), "PNG")
        write(folder / f"own/{number}.png", grey)
    rows = rows_by_path(run, listing_of(folder))
    for number in range(1, 40, 3):
        assert rows[f"own/{number}.png"]["features"] == [number] * 3
    assert rows["own/0.png"]["features"] is None


# --- the table -------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    return FeatureTable(FolderStore(address_of(tmp_path / "out é")), MODEL, S3Settings())


def test_a_new_table_keeps_the_model_it_is_given_and_makes_it_once(table: FeatureTable) -> None:
    assert table.open(lambda: b"flatbuffer") == b"flatbuffer"
    assert table.open(lambda: pytest.fail("made again")) == b"flatbuffer"
    assert models_in(table.output) == [MODEL]


def test_a_table_that_lost_its_flatbuffer_gets_a_new_one(table: FeatureTable) -> None:
    table.open(lambda: b"flatbuffer")
    table.output.delete(f"{table.root}/model.tflite")
    assert table.open(lambda: b"again") == b"again"


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        (b"{", "model.json is damaged"),
        (b"{}", "model.json is damaged"),
        (b"[]", "model.json is damaged"),
        (json.dumps({**MODEL.to_json(), "id": "other-1"}).encode(), "found those of other-1"),
    ],
)
def test_a_table_of_another_model_is_refused(
    table: FeatureTable, described: bytes, complaint: str
) -> None:
    table.output.write(f"{table.root}/model.json", described)
    with pytest.raises(StateError, match=complaint):
        table.open(lambda: b"flatbuffer")


def test_a_table_of_an_older_version_is_refused_with_the_remedy(table: FeatureTable) -> None:
    table.output.write(f"{table.root}/batches/1/part-0", b"features")
    with pytest.raises(
        StateError, match=r"as an older version of fruits kept them\. Choose another"
    ):
        table.open(lambda: b"flatbuffer")
    assert [entry.key for entry in table.output.list()] == [f"{table.root}/batches/1/part-0"]


REASONS = {READ: Reason.VANISHED, DECODE: Reason.DAMAGED}


def rows_of_table(*outcomes: str | None) -> pa.Table:
    """Return rows of the table, each with features or a stage."""
    rows = [
        {
            "path": f"a/{number}.jpg", "label": "a", "length": 5, "modified": THEN, "version": "1",
            "decoder": DECODER, "runtime": RUNTIME, "stage": stage,
            "reason": stage and f"{REASONS[stage].word}: told",
            "features": None if stage else [number, 0.0, 1.0],
        }
        for number, stage in enumerate(outcomes)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, TABLE)


def with_rows(table: FeatureTable, *outcomes: str | None) -> tuple[Snapshot, Known]:
    """Commit rows to a new table."""
    base = table.create()
    known = table.known(base)
    assert known is not None
    answer = written(table.parts, "commit-1", rows_of_table(*outcomes), 3)
    return table.commit(base, known, pa.Table.from_batches([answer]))


def test_a_commit_is_known_by_its_counts_and_moments(table: FeatureTable) -> None:
    snapshot, known = with_rows(table, None, None, DECODE, READ)
    assert (known.rows, known.features, known.quarantined, known.each_run) == (4, 2, 2, 1)
    assert known.running.moments.n == 2
    again = table.known(snapshot)
    assert again is not None
    assert (again.rows, again.quarantined, again.each_run, again.daily) == (4, 2, 1, 0)
    np.testing.assert_array_equal(again.running.moments.scatter, known.running.moments.scatter)


def test_what_goes_is_taken_from_what_is_known(table: FeatureTable) -> None:
    base, known = with_rows(table, None, None, None, DECODE)
    (file,) = base.files
    goes = pa.table({"path": ["a/1.jpg", "a/3.jpg"], "gone": [False, True]})
    table.parts.write("plan.parquet", goes)
    rewrite = Rewrite(table.parts, table.parts, [], "commit-2", 3)
    answers = rewrite(iter([Touched(file, "plan.parquet", 0, 1, 1)]))
    snapshot, known = table.commit(base, known, pa.Table.from_batches(list(answers)))
    assert (known.rows, known.quarantined, snapshot.rows) == (2, 0, 2)
    expected = Moments.of(np.array([[0.0, 0, 1], [2, 0, 1]]))
    np.testing.assert_allclose(known.running.moments.scatter, expected.scatter, atol=1e-12)
    left = [row["path"] for new in snapshot.files for b in table.parts.read(new) for row in
            b.to_pylist()]  # fmt: skip
    assert left == ["a/0.jpg", "a/2.jpg"]


@pytest.mark.parametrize("harm", ["lost", "changed"])
def test_a_state_that_is_lost_or_damaged_is_not_believed(table: FeatureTable, harm: str) -> None:
    snapshot, _ = with_rows(table, None, None)
    key = f"{table.root}/states/{snapshot.state}.npz"
    content = bytearray(table.output.read(key) or b"")
    table.output.delete(key)
    if harm == "changed":
        content[len(content) // 2] ^= 1
        table.output.write(key, bytes(content))
    assert table.known(snapshot) is None


def last_pass(snapshot: Snapshot, digest: str = "d") -> LastPass:
    return LastPass(
        str(snapshot.state), digest, "s3a://fruits/images é", {".txt": 3}, Speed(600, 12.5, 2)
    )


def test_the_last_pass_is_kept(table: FeatureTable) -> None:
    assert table.last_pass() is None
    with pytest.raises(StateError, match="found an unfinished one"):
        table.images()
    done = last_pass(with_rows(table, None)[0])
    table.keep_pass(done)
    assert table.last_pass() == done
    assert table.images() == Address("fruits", "images é")


@pytest.mark.parametrize(("digest", "nothing"), [("d", True), ("another", False)])
def test_there_is_nothing_to_compute_for_the_listing_of_the_last_pass_only(
    table: FeatureTable, folder: Path, digest: str, nothing: bool
) -> None:
    snapshot, _ = with_rows(table, None, DECODE)
    listing, reader = Listing((), {}, digest), ImageReader(address_of(folder), S3Settings())
    assert nothing_to_compute(table, snapshot, listing, reader) is None
    table.keep_pass(last_pass(snapshot))
    found = nothing_to_compute(table, snapshot, listing, reader)
    assert (found is not None) is nothing
    if found:
        assert (found.known.rows, found.reused, found.largest) == (2, 2, Speed(600, 12.5, 2))


def test_images_that_could_not_be_read_are_tried_again_here_when_it_is_time(
    table: FeatureTable, folder: Path
) -> None:
    snapshot, known = with_rows(table, None, READ, READ)
    assert (known.each_run, known.daily) == (2, 0)
    reader = ImageReader(address_of(folder), S3Settings())
    gone = [Unread(f"gone/{n}.jpg", 10, "1", "vanished: deleted") for n in range(2)]

    def has_nothing(**changes: Any) -> bool:
        table.keep_pass(replace(last_pass(snapshot), unread=tuple(gone), **changes))
        return nothing_to_compute(table, snapshot, Listing((), {}, "d"), reader) is not None

    assert has_nothing()
    gone.pop()
    assert not has_nothing(), "not all of them are known here"
    gone.append(Unread("gone/2.jpg", 10, "1", "vanished: deleted"))
    write(folder / "gone/2.jpg", b"back again")
    assert not has_nothing(), "another version is there now"


def test_an_image_that_its_disk_did_not_give_is_tried_again_once_a_day(
    table: FeatureTable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REASONS, READ, Reason.UNREADABLE)
    snapshot, known = with_rows(table, None, READ)
    assert (known.each_run, known.daily) == (0, 1)
    image = folder / "a/1.jpg"
    image.parent.mkdir()
    image.symlink_to(image)
    reader = ImageReader(address_of(folder), S3Settings())
    unread = Unread("a/1.jpg", 7, "1", "unreadable: Too many levels of symbolic links")

    def has_nothing(tried: float) -> bool:
        table.keep_pass(replace(last_pass(snapshot), unread=(unread,), tried=tried))
        return nothing_to_compute(table, snapshot, Listing((), {}, "d"), reader) is not None

    now = time.time()
    assert has_nothing(now - 90_000)
    last = table.last_pass()
    assert last is not None
    assert last.tried >= now, "tried now, so not again before tomorrow"
    image.unlink()
    image.write_bytes(b"content")
    assert has_nothing(now - 3600)
    assert not has_nothing(now - 90_000)
    assert not has_nothing(now + 90_000), "a clock that was set back"


def test_there_is_something_to_compute_once_the_table_has_moved_on(
    table: FeatureTable, folder: Path
) -> None:
    snapshot, known = with_rows(table, None, None)
    table.keep_pass(last_pass(snapshot))
    answer = written(table.parts, "commit-2", rows_of_table(None), 3)
    moved, _ = table.commit(snapshot, known, pa.Table.from_batches([answer]))
    reader = ImageReader(address_of(folder), S3Settings())
    assert nothing_to_compute(table, moved, Listing((), {}, "d"), reader) is None


# --- rows that stay --------------------------------------------------------------------------


def todo_of(folder: Path, **known: Any) -> pa.Table:
    """Return the listing of a folder as a plan has it, with what is known of each image."""
    rows = listing_of(folder).to_pylist()
    nothing = {
        "known_sha256": None,
        "known_since": 3,
        "known_reason": None,
        "same_maker": True,
        "same_listing": True,
    }
    return pa.Table.from_pylist([row | nothing | known.get(row["label"], {}) for row in rows], TODO)


def test_the_same_content_is_read_and_not_computed_again(
    run: PassOverImages, tmp_path: Path
) -> None:
    contents = {name: encoded(picture(30 + n, 20), "PNG") for n, name in enumerate("abc")}
    for name, content in contents.items():
        write(tmp_path / f"own/{name}/1.png", content)
    own = replace(run, reader=ImageReader(address_of(tmp_path / "own"), S3Settings()))
    hashes = {name: hashlib.sha256(content).digest() for name, content in contents.items()}
    todo = todo_of(
        tmp_path / "own",
        a={"known_sha256": hashes["a"]},
        b={"known_sha256": hashes["b"], "same_maker": False},
        c={"known_sha256": hashes["a"]},
    )
    own.work.write("todo.parquet", todo)
    kept, computed, _reads = own(iter([Slice("todo.parquet", 0, 3)]))
    (told_of,) = kept.to_pylist()
    assert (told_of["kept_rows"], told_of["counted"], told_of["path"]) == (1, 0, None)
    (stays,) = [row for b in own.work.read(told_of["kept"]) for row in b.to_pylist()]
    assert stays["path"] == "a/1.png"
    assert computed.to_pylist()[0]["counted"] == 2
    file = computed.to_pylist()[0]["path"]
    rows = {row["label"]: row["since"] for b in own.table.read(file) for row in b.to_pylist()}
    assert rows == {"b": 3, "c": 0}, "another maker's features of the same bytes are none added"


def test_features_of_an_image_that_was_archived_since_are_kept(
    run: PassOverImages, tmp_path: Path
) -> None:
    write(tmp_path / "own/a/1.png", encoded(picture(30, 20), "PNG"))
    todo = todo_of(tmp_path / "own", a={"known_sha256": b"hash", "same_maker": False})
    cold = pa.array(["GLACIER"], pa.string())
    todo = todo.set_column(todo.column_names.index("archive"), "archive", cold)
    own = replace(run, reader=ImageReader(address_of(tmp_path / "own"), S3Settings()))
    own.work.write("todo.parquet", todo)
    kept, _reads = own(iter([Slice("todo.parquet", 0, 1)]))
    assert kept.to_pylist()[0]["kept_rows"] == 1


def test_an_image_that_can_still_not_be_read_stays_as_it_is(
    run: PassOverImages, tmp_path: Path
) -> None:
    write(tmp_path / "own/a/1.png", b"")
    todo = todo_of(tmp_path / "own", a={"known_reason": "vanished: deleted"})
    (tmp_path / "own/a/1.png").unlink()
    own = replace(run, reader=ImageReader(address_of(tmp_path / "own"), S3Settings()))
    own.work.write("todo.parquet", todo)
    kept, _reads = own(iter([Slice("todo.parquet", 0, 1)]))
    assert kept.to_pylist()[0]["kept_rows"] == 1


def test_a_row_that_stays_is_listed_anew_and_a_file_that_stays_is_not_written(
    table: FeatureTable,
) -> None:
    base, known = with_rows(table, None, None, DECODE)
    (file,) = base.files
    listed = rows_of_table(None).select(LISTING.names).to_pylist()
    moved = pa.Table.from_pylist([row | {"version": "2", "length": 6} for row in listed], LISTING)
    for name, rows in {"same": listed, "moved": moved.to_pylist()}.items():
        table.parts.write(name, pa.Table.from_pylist(rows, LISTING))
    table.parts.write("plan", pa.table({"path": ["a/0.jpg"], "gone": [False]}))
    touched = Touched(file, "plan", 0, 1, 0)
    assert not list(Rewrite(table.parts, table.parts, ["same"], "commit-2", 3)(iter([touched])))
    answers = Rewrite(table.parts, table.parts, ["moved"], "commit-2", 3)(iter([touched]))
    snapshot, after = table.commit(base, known, pa.Table.from_batches(list(answers)))
    (new,) = snapshot.files
    rows = [row for b in table.parts.read(new) for row in b.to_pylist()]
    assert [(row["version"], row["length"]) for row in rows] == [("2", 6), ("1", 5), ("1", 5)]
    assert rows[0]["features"] == [0, 0, 1]
    assert (after.rows, after.quarantined, after.running.moments.n) == (3, 1, 2)


# --- the work of a pass ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 40))
def test_work_is_cut_into_commits_of_bounded_size(rows: list[int], most: int) -> None:
    slices = [Slice(str(number), 0, count) for number, count in enumerate(rows)]
    commits = list(cut_into(slices, most))
    assert [sum(s.count for s in commit) for commit in commits[:-1]] == [most] * (len(commits) - 1)
    assert all(0 < sum(s.count for s in commit) <= most for commit in commits)
    found = [(s.path, row) for commit in commits for s in commit
             for row in range(s.start, s.start + s.count)]  # fmt: skip
    assert found == [(s.path, row) for s in slices for row in range(s.count)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 40))
def test_work_is_cut_for_tasks_without_losing_a_row(rows: list[int], tasks: int) -> None:
    slices = [Slice(str(number), 3, count) for number, count in enumerate(rows)]
    cuts = cut(slices, tasks)
    assert len(cuts) <= tasks + len(slices)
    found = [(s.path, row) for s in cuts for row in range(s.start, s.start + s.count)]
    assert found == [(s.path, row) for s in slices for row in range(3, 3 + s.count)]


def plan_rows(*rows: tuple[str, str | None, bool]) -> pa.Table:
    """Return (path, file, gone) as the plan has them."""
    listed = {"label": None, "length": 1, "modified": THEN, "version": "1"}
    schema = pa.schema([*(f.with_nullable(True) for f in LISTING),
                        pa.field("file", pa.string()), pa.field("gone", pa.bool_())])  # fmt: skip
    return pa.Table.from_pylist(
        [{**listed, "path": path, "file": file, "gone": gone} for path, file, gone in rows], schema
    )


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_a_plan_keeps_the_rows_of_a_file_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(plan, "ROWS_PER_PLAN_PART", at_once)
    rows = plan_rows(
        ("n1", None, False), ("n2", None, False), ("a1", "a", False), ("a2", "a", False),
        ("a3", "a", True), ("b1", "b", True), ("c1", "c", False),
    )  # fmt: skip
    work = Parts(address_of(tmp_path), S3Settings())
    told_of = [
        row
        for batch in WritePlan(work)(iter(rows.to_batches(max_chunksize=1)))
        for row in batch.to_pylist()
    ]
    found: dict[str | None, list[str]] = {}
    for row in told_of:
        some = work.read_slice(Slice(row["part"], row["start"], row["todo"] + row["gone"]))
        assert some["gone"].to_pylist() == [False] * row["todo"] + [True] * row["gone"]
        found.setdefault(row["file"], []).extend(some["path"].to_pylist())
    assert found == {None: ["n1", "n2"], "a": ["a1", "a2", "a3"], "b": ["b1"], "c": ["c1"]}
    assert len([row for row in told_of if row["file"]]) == 3, "a file is in one part"


def test_a_plan_of_many_files_names_the_rows_of_each(tmp_path: Path) -> None:
    """By the thousand: a table that is hashed may be in order for a few."""
    names = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(3000)]
    rows = plan_rows(*((f"of {name}", name, True) for name in sorted(names)))
    work = Parts(address_of(tmp_path), S3Settings())
    for batch in WritePlan(work)(iter(rows.to_batches(max_chunksize=700))):
        for row in batch.to_pylist():
            (path,) = work.read_slice(Slice(row["part"], row["start"], 1))["path"].to_pylist()
            assert path == f"of {row['file']}"


def test_touched_files_are_rewritten_in_bounded_commits() -> None:
    touched = [Touched(name, "plan", 0, todo, 1) for name, todo in
               (("a", 5), ("b", 5), ("c", 0), ("d", 9), ("e", 20))]  # fmt: skip
    work = Plan([Slice("new", 0, 7)], touched)
    assert (work.todo, work.gone) == (46, 5)
    commits = [(sum(s.count for s in slices), [t.file for t in files])
               for slices, files in work.commits(10)]  # fmt: skip
    assert commits == [(7, []), (10, ["a", "b", "c"]), (9, ["d"]), (20, ["e"])]


@pytest.mark.parametrize(
    ("gone", "known", "believed"),
    [
        (100, 100, True),
        (101, 1010, True),
        (101, 1009, False),
        (5000, 1_000_000, True),
        (0, 0, True),
    ],
)
def test_a_listing_that_lacks_many_known_images_is_not_believed(
    gone: int, known: int, believed: bool
) -> None:
    with nullcontext() if believed else pytest.raises(RemovalsError, match="--allow-removals"):
        check_removals(gone, known, Address("fruits", "images"))
