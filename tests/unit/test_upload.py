"""An upload sends what is missing or newer, once, and says how far it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError, StorageError
from pipeline.storage import Address, FolderStore
from pipeline.upload import UPLOADS_AT_ONCE, Uploaded, upload

NAMES = ["Apple 1/0 é.jpg", "_hidden/.x", "100%#+.png", *(f"Kiwi/{n}.jpg" for n in range(100))]


@pytest.fixture
def source(tmp_path: Path) -> FolderStore:
    store = FolderStore(Address.parse(str(tmp_path / "source")))
    for name in NAMES:
        store.write(name, name.encode())
    return store


@pytest.fixture
def target(tmp_path: Path) -> FolderStore:
    (tmp_path / "target").mkdir()
    return FolderStore(Address.parse(str(tmp_path / "target")))


def test_every_file_arrives_under_its_own_name(source: FolderStore, target: FolderStore) -> None:
    done = upload(source, target)
    assert done == Uploaded(len(NAMES), 0, sum(len(name.encode()) for name in NAMES), {})
    found = {entry.key: target.read(entry.key) for entry in target.list()}
    assert found == {name: name.encode() for name in NAMES}


def test_a_second_upload_sends_only_what_is_missing_longer_or_newer(
    source: FolderStore, target: FolderStore
) -> None:
    upload(source, target)
    assert upload(source, target) == Uploaded(0, len(NAMES), 0, {})

    target.delete("Kiwi/1.jpg")
    source.write("Kiwi/2.jpg", b"changed and longer")
    newer = source.folder / "Kiwi/3.jpg"
    os.utime(newer, (newer.stat().st_mtime + 5,) * 2)
    assert upload(source, target).sent == 3
    assert target.read("Kiwi/2.jpg") == b"changed and longer"
    assert upload(source, target).sent == 0


def test_the_progress_never_falls_and_ends_at_the_whole(
    source: FolderStore, target: FolderStore
) -> None:
    seen: list[tuple[int, int]] = []
    upload(source, target, lambda done, total: seen.append((done, total)))
    assert len(NAMES) > 4 * UPLOADS_AT_ONCE
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {len(NAMES)}
    assert seen[-1] == (len(NAMES), len(NAMES))


def test_an_upload_that_cannot_be_written_is_told(source: FolderStore, target: FolderStore) -> None:
    target.write("Kiwi", b"a file in the way of the folder")
    with pytest.raises(StorageError, match=r"target/Kiwi/\d+\.jpg"):
        upload(source, target)


def test_an_empty_folder_is_refused(target: FolderStore) -> None:
    with pytest.raises(NoImagesError, match=f"expected files in {target.folder}, found none"):
        upload(target, target)
