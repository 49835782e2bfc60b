"""Rows of the feature table: reading ahead, quarantine, what is new, and what a table remembers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.accumulators import Accumulator, AddingAccumulatorParam
from pyspark.sql.pandas.types import to_arrow_schema

from pipeline import task
from pipeline.errors import StateError
from pipeline.features import _count_gone, _live_index, _not_in
from pipeline.images import LISTING, list_images
from pipeline.job import _digests
from pipeline.networks.decode import BadImageError
from pipeline.networks.model import Model
from pipeline.storage import Address, FolderStore, ImageReader, S3Settings
from pipeline.table import (
    ARROW_ROWS,
    DECODE,
    KEY,
    READ,
    ROWS,
    FeatureTable,
    Speed,
    index_schema,
    largest_pass,
    models_in,
    nothing_to_compute,
    pass_of,
)
from pipeline.task import GETS_AT_ONCE, PassOverImages, _checked, _read_ahead, _Unreadable
from tests.corpus import bad_images, encoded, good_images, picture

MODEL = Model("net-32-abc", "net", 32, 3, "as it is", "weights.h5", "0" * 64)
THEN = datetime(2026, 1, 1, tzinfo=UTC)

# --- reading ahead ---------------------------------------------------------------------------


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"path": str(number), "length": length} for number, length in enumerate(lengths)]


@given(st.lists(st.integers(0, 60_000_000), max_size=60))
def test_images_come_in_the_order_of_their_rows(lengths: list[int]) -> None:
    found = _read_ahead(rows_of(lengths), lambda row: row["path"].encode())
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

    for length, _ in zip(lengths, _read_ahead(rows_of(lengths), read), strict=True):
        time.sleep(seconds)  # the network's turn, in which reads get as far ahead as they may
        count(-1, -length)
    return most["images"], most["bytes"]


def test_a_burst_is_read_while_the_network_takes_the_one_before() -> None:
    images, _ = most_ahead([1000] * 200)
    assert GETS_AT_ONCE < images <= 2 * GETS_AT_ONCE


def test_large_images_are_read_ahead_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "BYTES_AT_ONCE", 24)
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

    found = _read_ahead(rows_of([1] * 50), read)
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
    return list_images(FolderStore(address_of(folder))).images


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
    read = _checked(ImageReader(address_of(tmp_path), S3Settings()).open())
    assert {path: str(read(row)) for path, row in rows.items()} == {
        "same.jpg": str(b"as listed"),
        "replaced.jpg": "replaced since it was listed; the next run takes the new one",
        "deleted.jpg": "deleted since it was listed",
        "folder.jpg": "a folder, not a file",
        "gone/with its folder.jpg": "deleted since it was listed",
    }


@pytest.mark.parametrize("error", [PermissionError("forbidden"), ValueError("not a key")])
def test_an_image_that_may_not_be_read_says_why(error: Exception) -> None:
    outcome = _checked(failing(error))({"path": "a.jpg", "length": 1, "version": "1"})
    assert isinstance(outcome, _Unreadable)
    assert str(outcome) == str(error)


def test_an_s3_that_does_not_answer_is_not_the_images_fault() -> None:
    with pytest.raises(OSError, match="connection refused"):
        row = {"path": "a.jpg", "length": 1, "version": "1"}
        _checked(failing(OSError("connection refused")))(row)


def test_a_file_too_large_for_memory_is_not_read() -> None:
    row = {"path": "a.tif", "length": 3_000_000_000, "version": "1"}
    outcome = _checked(failing(AssertionError("it was read")))(row)
    assert isinstance(outcome, BadImageError)
    assert str(outcome) == "3,000,000,000 bytes are more than the 128,000,000 that are read"


def test_links_in_a_circle_are_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    (row,) = listing_of(tmp_path).to_pylist()
    outcome = _checked(ImageReader(address_of(tmp_path), S3Settings()).open())(row)
    assert str(outcome) == "cannot be read: Too many levels of symbolic links"


def failing(error: Exception) -> Callable[[str], tuple[bytes, str]]:
    def read(_key: str) -> tuple[bytes, str]:
        raise error

    return read


# --- the pass of a task ----------------------------------------------------------------------


def test_the_rows_of_arrow_and_of_spark_are_the_same() -> None:
    assert to_arrow_schema(ROWS, timezone="UTC") == ARROW_ROWS


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PassOverImages:
    """The pass with a network that gives the mean colour: real reads and decodes, no weights."""
    monkeypatch.setattr(task, "_network", lambda _: lambda pixels: pixels.mean(axis=(0, 1)))
    done, quarantined = (Accumulator(n, 0, AddingAccumulatorParam(0)) for n in (71, 72))
    reader = ImageReader(address_of(folder), S3Settings())
    broadcast: Any = None
    return PassOverImages(broadcast, 32, reader, "batch-1", done, quarantined)


def rows_by_path(run: PassOverImages, listing: pa.Table) -> dict[str, dict[str, Any]]:
    batches = list(run(iter(listing.to_batches(max_chunksize=7))))
    assert all(batch.schema == ARROW_ROWS for batch in batches)
    table = pa.Table.from_batches(batches)
    assert table.select(LISTING.names).cast(LISTING).equals(listing)
    return {row["path"]: row for row in table.to_pylist()}


def test_every_image_has_a_row_with_features_or_a_reason(run: PassOverImages, folder: Path) -> None:
    rows = rows_by_path(run, listing_of(folder))
    assert rows.keys() == good_images().keys() | bad_images().keys()
    for name in good_images():
        assert (rows[name]["stage"], rows[name]["reason"]) == (None, None), name
        assert len(rows[name]["features"]) == 3 * 4
    for name, (_, word) in bad_images().items():
        assert (rows[name]["stage"], rows[name]["features"]) == (DECODE, None)
        assert word in rows[name]["reason"]
    assert {row["batch"] for row in rows.values()} == {"batch-1"}
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
    assert (row["stage"], row["reason"]) == (READ, "deleted since it was listed")
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
        assert rows[f"own/{number}.png"]["features"] == np.full(3, number, "<f4").tobytes()
    assert rows["own/0.png"]["features"] is None


# --- new and known images --------------------------------------------------------------------


def images_of(*keys: tuple[str, str]) -> pa.Table:
    """Return a listing of (path, version)."""
    rows = [
        {"path": path, "label": None, "length": 5, "modified": THEN, "version": version}
        for path, version in sorted(keys)
    ]
    return pa.Table.from_pylist(rows, LISTING)


def index_of(*rows: tuple[str, str, str] | tuple[str, str, str, str]) -> pa.Table:
    """Return an index of (path, version, batch) or (path, version, batch, stage)."""
    names = ("path", "version", "batch", "stage")
    common = {"label": None, "length": 5, "modified": THEN, "stage": None, "reason": None}
    described = [{**common, **dict(zip(names, row, strict=False))} for row in rows]
    return pa.Table.from_pylist(described, index_schema())


keys_drawn = st.lists(
    st.tuples(st.sampled_from("abcdé "), st.sampled_from("12")), unique=True, max_size=8
)


@given(keys_drawn, keys_drawn)
def test_new_are_the_images_whose_key_is_not_known(
    listed: list[tuple[str, str]], known: list[tuple[str, str]]
) -> None:
    new = _not_in(images_of(*listed), index_of(*((*key, "batch") for key in known)))
    assert new.schema.names == LISTING.names
    found = list(zip(new["path"].to_pylist(), new["version"].to_pylist(), strict=True))
    assert sorted(found) == sorted(set(listed) - set(known))
    assert new["path"].to_pylist() == sorted(new["path"].to_pylist())


@pytest.mark.parametrize("field", KEY)
def test_an_image_is_new_when_any_part_of_its_key_differs(field: str) -> None:
    changed = {"path": "b", "length": 6, "modified": THEN + timedelta(microseconds=1)}
    known = index_of(("a", "1", "batch"))
    (row,) = images_of(("a", "1")).to_pylist()
    other = pa.Table.from_pylist([{**row, field: changed.get(field, "2")}], LISTING)
    assert _not_in(images_of(("a", "1")), known).num_rows == 0
    assert _not_in(other, known).num_rows == 1


def test_the_index_has_a_row_for_each_image_listed_and_no_other() -> None:
    images = images_of(("a", "1"), ("b", "2"), ("c", "1"))
    known = index_of(
        ("c", "1", "batch-2", DECODE),
        ("b", "1", "batch-1"),
        ("b", "2", "batch-2"),
        ("a", "1", "batch-1"),
        ("dropped", "1", "batch-1"),
    )
    live = _live_index(images, known)
    assert live.schema == index_schema()
    rows = live.select(["path", "version", "batch", "stage"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a", "1", "batch-1", None),
        ("b", "2", "batch-2", None),
        ("c", "1", "batch-2", DECODE),
    ]


def test_of_an_image_computed_twice_the_newest_batch_counts() -> None:
    known = index_of(("a", "1", "2026-01", READ), ("a", "1", "2026-03"), ("a", "1", "2026-02"))
    (row,) = _live_index(images_of(("a", "1")), known).to_pylist()
    assert (row["batch"], row["stage"]) == ("2026-03", None)


def test_an_image_without_a_row_is_told() -> None:
    with pytest.raises(StateError, match="expected a row for each of 2 images, found 1"):
        _live_index(images_of(("a", "1"), ("b", "1")), index_of(("a", "1", "batch")))


def test_an_image_is_gone_when_its_path_is_and_not_when_it_was_replaced() -> None:
    previous = index_of(("a", "1", "b"), ("b", "1", "b"), ("c", "1", "b"))
    assert _count_gone(previous, images_of(("a", "2"), ("d", "1"))) == 2


# --- digests ---------------------------------------------------------------------------------

DIGESTED = [("a", "1", "x"), ("b", "1", "x"), ("c", "1", "y")]


def test_a_digest_depends_on_the_live_rows_and_not_on_their_order() -> None:
    digests = _digests(index_of(*DIGESTED))
    assert digests.keys() == {"x", "y"}
    assert digests["x"] != digests["y"]
    assert _digests(index_of(*reversed(DIGESTED))) == digests
    assert _digests(index_of(*DIGESTED, ("d", "1", "x", DECODE))) == digests
    assert _digests(index_of()) == {}


@pytest.mark.parametrize(
    "changed",
    [
        [("a", "1", "x")],
        [("a", "1", "x"), ("b", "2", "x")],
        [("a", "1", "x"), ("b", "1", "x", DECODE)],
        [("a", "1", "x"), ("b1", "", "x")],
        [("a", "1", "x"), ("b", "1", "x"), ("c", "1", "x")],
    ],
    ids=["dropped", "replaced", "quarantined", "other borders", "added"],
)
def test_a_digest_changes_with_the_rows_of_its_batch_only(changed: list[Any]) -> None:
    before = _digests(index_of(*DIGESTED))
    after = _digests(index_of(*changed, DIGESTED[2]) if len(changed) < 3 else index_of(*changed))
    assert after["x"] != before["x"]
    assert after.get("y", before["y"]) == before["y"]


# --- the table -------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    return FeatureTable(FolderStore(address_of(tmp_path / "out é")), MODEL)


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


def test_a_batch_counts_when_its_success_file_is_there(table: FeatureTable) -> None:
    batches = f"{table.root}/batches"
    for key in ("2/part-0", "2/_SUCCESS", "1/part-0", "1/_SUCCESS", "3/part-0", "4/_temporary/x",
                "5/deeper/_SUCCESS"):  # fmt: skip
        table.output.write(f"{batches}/{key}", b"")
    long_ago = time.time() - 25 * 3600
    for name in ("1/part-0", "1/_SUCCESS", "4/_temporary/x"):
        os.utime(Path(table.output.address.path) / batches / name, (long_ago, long_ago))
    assert table.committed_batches() == ["1", "2"]
    left = {entry.key.removeprefix(batches).split("/")[1] for entry in table.output.list()}
    assert left == {"1", "2", "3", "5"}, "what never counted goes when it is a day old"


def test_the_index_survives_its_file_and_knows_where_its_images_lie(table: FeatureTable) -> None:
    assert table.read_index() is None
    with pytest.raises(StateError, match="found an unfinished one"):
        table.images()
    index = index_of(("a", "1", "batch"), ("b", "1", "batch", DECODE))
    table.write_index(index, Address("fruits", "images é"))
    found = table.read_index()
    assert found is not None
    assert found.cast(index_schema()).equals(index)
    assert table.images() == Address("fruits", "images é")
    assert largest_pass(found) is None


def test_the_speed_of_the_largest_pass_is_kept_with_the_index(table: FeatureTable) -> None:
    speed = Speed(images=600, seconds=12.5, slots=2)
    table.write_index(index_of(("a", "1", "batch")), Address("fruits", ""), speed)
    found = table.read_index()
    assert found is not None
    assert pass_of(found).largest == speed


@pytest.mark.parametrize(
    ("listed", "nothing"),
    [
        ([("a", "1"), ("b", "1")], True),
        ([("a", "1")], False),
        ([("a", "1"), ("b", "2")], False),
        ([("a", "1"), ("c", "1")], False),
        ([("a", "1"), ("b", "1"), ("c", "1")], False),
    ],
    ids=["same", "dropped", "replaced", "another", "added"],
)
def test_there_is_nothing_to_compute_for_the_listing_of_the_last_pass_only(
    table: FeatureTable, listed: list[tuple[str, str]], nothing: bool
) -> None:
    assert nothing_to_compute(table, images_of(*listed)) is None
    index = index_of(("a", "1", "batch"), ("b", "1", "batch", DECODE))
    table.write_index(index, Address("fruits", ""))
    found = nothing_to_compute(table, images_of(*listed))
    assert (found is not None) is nothing


def test_an_image_that_could_not_be_read_is_tried_again(table: FeatureTable) -> None:
    table.write_index(index_of(("a", "1", "batch", READ)), Address("fruits", ""))
    assert nothing_to_compute(table, images_of(("a", "1"))) is None


def test_a_batch_has_an_address_that_spark_finds(table: FeatureTable) -> None:
    table.output.write(f"{table.root}/batches/1/part-0", b"")
    assert table.batch_uri("1").startswith("file:///")
    assert Path(table.batch_uri("1").removeprefix("file://"), "part-0").exists()
