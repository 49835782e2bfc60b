"""The listing: every image by its key, with its folder's name as label, and nothing read."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import NoImagesError, StorageError
from pipeline.listing import images
from pipeline.listing.images import (
    LISTED,
    Digest,
    Listing,
    is_image,
    label_of,
    list_images,
)
from pipeline.listing.names import ENDINGS, MOST_KINDS, LeftOut, kind_of, told_of
from pipeline.storage import Address, FolderStore

COARSE = timedelta(seconds=2)  # a file system's clock may lag, and count in seconds


def listing_of(folder: Path, *keys: str) -> Listing:
    """List a folder with files of these names, each as long as its name."""
    for key in keys:
        file = folder / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * len(key))
    return list_images(FolderStore(Address.parse(str(folder))), Path(tempfile.mkdtemp()))


def table_of(listing: Listing) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part, _ in listing.parts])


def labels(listing: Listing) -> dict[str, str | None]:
    rows = table_of(listing).select(["path", "label"]).to_pylist()
    return {row["path"]: row["label"] for row in rows}


def test_the_label_is_the_name_of_the_folder_an_image_lies_in(tmp_path: Path) -> None:
    found = listing_of(tmp_path, "Apple Red 1/0.jpg", "train/Kiwi/1.jpg", "at the root.jpg")
    assert labels(found) == {
        "Apple Red 1/0.jpg": "Apple Red 1",
        "at the root.jpg": None,
        "train/Kiwi/1.jpg": "Kiwi",
    }


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_an_image_may_have_any_ending_that_photos_have(ending: str) -> None:
    for name in (ending, ending.upper(), ending.title()):
        assert is_image(f"a/photo.{name}")
        assert is_image(f"_a/.photo.backup.{name}")
        assert not is_image(f"a/photo.{name}.txt")


@pytest.mark.parametrize(
    "name",
    ["photo", "photo.jpg ", "photo.JPG?w=640", "photo.jpg_large", "photo.jpeg~", "x.webp!d", "jpg"],
)
def test_an_image_may_have_a_browsers_name_or_no_ending(name: str) -> None:
    assert is_image(f"a.b/{name}")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("notes.TXT", ".txt"),
        ("a.jpg/x.svg", ".svg"),
        ("a/README", "without an ending"),
        ("a/_SUCCESS", "without an ending"),
        ("a/.DS_Store", "without an ending"),
        ("a/._0.jpg", "a Mac's own"),
        ("__MACOSX/a/0.jpg", "a Mac's own"),
        ("a/0.jpg:Zone.Identifier", "Windows' own"),
        ("a/Thumbs.db", ".db"),
        ("a/IMG_1.NEF", ".nef"),
    ],
)
def test_what_is_known_to_be_something_else_has_a_kind(key: str, kind: str) -> None:
    assert kind_of(key) == kind


def test_very_many_kinds_are_told_as_some() -> None:
    left_out = LeftOut()
    for number in range(200):
        left_out.add(f".{number}")
    left_out.add(".0")
    assert len(left_out.told()) == MOST_KINDS + 1
    assert sum(left_out.told().values()) == 201
    assert told_of({".txt": 1200, ".db": 3, ".a": 1, ".b": 1}, 2) == "1,200 .txt, 3 .db, 2 others"


def test_hidden_names_are_listed(tmp_path: Path) -> None:
    found = listing_of(tmp_path, "_a/0.jpg", ".b/1.jpg", "c/_2.jpg", "c/.3.jpg")
    assert labels(found) == {".b/1.jpg": ".b", "_a/0.jpg": "_a", "c/.3.jpg": "c", "c/_2.jpg": "c"}
    assert found.ignored == 0


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    found = listing_of(tmp_path, "a/0.jpg", "a/0.txt", "LICENSE", "a/.DS_Store")
    assert found.count == table_of(found).num_rows == 1
    assert found.left_out == {"without an ending": 2, ".txt": 1}


def test_a_folder_may_be_named_like_an_image(tmp_path: Path) -> None:
    found = listing_of(tmp_path, "x.jpg/inside.png")
    assert labels(found) == {"x.jpg/inside.png": "x.jpg"}
    assert label_of("x.jpg/inside.png") == "x.jpg"


def test_a_listing_longer_than_a_part_is_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "ROWS_PER_PART", 3)
    keys = ["b/1.jpg", "a/2.jpg", "a.jpg", "a-b/3.jpg", "a/1.jpg", "B/1.jpg", "é/1.jpg", "z.jpg"]
    found = listing_of(tmp_path, *keys)
    assert [rows for _, rows in found.parts] == [3, 3, 2]
    assert sorted(table_of(found)["path"].to_pylist()) == sorted(keys)


def test_a_label_is_the_same_however_its_letters_are_composed(tmp_path: Path) -> None:
    composed, apart = "Pêche", "Pe\u0302che"
    assert set(labels(listing_of(tmp_path, f"{composed}/1.jpg", f"{apart}/2.jpg")).values()) == {
        composed
    }


def test_a_digest_tells_any_change_and_no_order(tmp_path: Path) -> None:
    def digest(*rows: tuple[str, int, str], decides: str = "s3a://fruits") -> str:
        made = Digest(decides)
        for row in rows:
            made.add(*row)
        return str(made)

    rows = [("a", 1, "x"), ("b", 1, "x"), ("c", 2, "y")]
    assert digest(*rows) == digest(*reversed(rows))
    others = [
        rows[:2],
        [*rows, ("d", 1, "x")],
        [("a", 1, "y"), *rows[1:]],
        [("a", 2, "x"), *rows[1:]],
        [("a1", 1, "x"), *rows[1:]],
        [*rows, rows[0]],
    ]
    found = [digest(*rows), digest(*rows, decides="s3a://other"), *(digest(*o) for o in others)]
    assert len(set(found)) == len(found)


def test_the_digest_of_a_listing_is_that_of_the_next_until_something_changes(
    tmp_path: Path,
) -> None:
    first = listing_of(tmp_path, "a/0.jpg", "a/1.jpg", "notes.txt").digest
    (tmp_path / "notes.txt").write_text("something else")
    again = list_images(FolderStore(Address.parse(str(tmp_path))), Path(tempfile.mkdtemp())).digest
    assert again == first
    assert listing_of(tmp_path, "a/2.jpg").digest != first


def test_the_listing_has_its_schema_lengths_and_times(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    listed = table_of(listing_of(tmp_path, "a/0.jpg", "a/long name.jpg"))
    assert listed.schema == LISTED
    assert sorted(listed["length"].to_pylist()) == [7, 15]
    for modified in listed["modified"].to_pylist():
        assert before - COARSE <= modified <= datetime.now(UTC) + COARSE
    assert listed["version"].null_count == listed["path"].null_count == 0


def test_a_folder_without_images_is_told_by_its_address(tmp_path: Path) -> None:
    with pytest.raises(NoImagesError, match=r"found 1 \.txt, 1 \.csv") as told:
        listing_of(tmp_path, "a.txt", "b/c.csv")
    assert f"below {tmp_path}, " in str(told.value)
    assert f"fruits upload FOLDER {tmp_path}" in str(told.value)


def test_a_missing_folder_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"expected a folder at {tmp_path}/none, found none"):
        listing_of(tmp_path / "none")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(StorageError, match=r"expected a folder at .*a\.jpg, found none"):
        listing_of(tmp_path / "a.jpg")
