"""A result as a version: a reader sees one whole result, whatever happens to those who publish."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import StateError, StorageError
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, FolderStore
from pipeline.versions import (
    RESULT,
    all_versions,
    at,
    copy_newest,
    delete_all,
    lacking,
    newest,
    open_result,
    prune,
    publish,
    restore,
)
from tests.records import run_of
from tests.versioned import NAMES, DyingFolder, Killed, copied, make, prepare, seen


@pytest.fixture
def output(tmp_path: Path) -> FolderStore:
    return FolderStore(Address.parse(str(tmp_path / "out")))


def test_the_newest_version_is_whole_and_its_copies_follow(output: FolderStore) -> None:
    assert newest(output) is None
    assert make(output, "first").version == 1
    assert make(output, "second").version == 2
    assert seen(output) == "second"
    assert copied(output) == {b"second"}
    assert output.read("run.json") == output.read("versions/00000002.json")
    assert [run.run_id for _, run in all_versions(output)] == ["first", "second"]


def test_a_copy_that_the_newest_has_not_goes(output: FolderStore) -> None:
    output.write("versions/first/matrix.parquet/part-1.parquet", b"first")
    make(output, "first")
    make(output, "second")
    assert output.read("matrix.parquet/part-1.parquet") is None


def test_a_reader_sees_one_whole_result_wherever_a_run_is_killed(tmp_path: Path) -> None:
    whole = DyingFolder(Address.parse(str(tmp_path / "whole")))
    whole.taken = []
    make(whole, "first")
    before = len(whole.taken)
    make(whole, "second")
    steps = whole.taken[before:]
    assert len(steps) == 1 + 1 + len(RESULT) + len(NAMES) + 1, steps
    for number in range(len(steps) + 1):
        store = DyingFolder(Address.parse(str(tmp_path / f"{number}")))
        store.taken = []
        make(store, "first")
        store.steps, store.taken = number, []
        try:
            make(store, "second")
        except Killed:
            assert store.taken == steps[:number]
        assert seen(store) == ("second" if number else "first")
        mended = FolderStore(store.address)
        copy_newest(mended)
        assert copied(mended) == {str(seen(mended)).encode()}


def test_of_two_who_publish_at_once_the_newest_is_what_the_copies_end_at(
    output: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(output, "first")
    copy, other = FolderStore.copy, iter(["third"])

    def interrupted(store: FolderStore, source: str, target: str) -> None:
        copy(store, source, target)
        if target == "matrix.csv" and (name := next(other, None)):
            make(FolderStore(output.address), name)

    monkeypatch.setattr(FolderStore, "copy", interrupted)
    make(output, "second")
    assert (seen(output), copied(output)) == ("third", {b"third"})


def test_the_second_of_two_takes_the_next_number(
    output: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_new, other = FolderStore.write_new, iter(["theirs"])

    def late(store: FolderStore, key: str, content: bytes) -> bool:
        if name := next(other, None):
            publish(FolderStore(output.address), prepare(output, name), lambda: True)
        return write_new(store, key, content)

    monkeypatch.setattr(FolderStore, "write_new", late)
    assert make(output, "ours").version == 2
    assert at(output, 1).run_id == "theirs"


def test_a_run_that_was_overtaken_after_its_look_at_the_table_publishes_nothing(
    output: FolderStore,
) -> None:
    overtaking = iter(["newer"])

    def is_current() -> bool:
        if name := next(overtaking, None):
            make(output, name)
            return True
        return False

    with pytest.raises(StateError, match="another run has changed the feature table"):
        make(output, "older", is_current)
    assert (seen(output), copied(output)) == ("newer", {b"newer"})


def test_what_others_take_away_while_copies_are_made_is_no_error(
    output: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, lost = FolderStore.copy, iter([True, True])

    def disturbed(store: FolderStore, source: str, target: str) -> None:
        if next(lost, False):
            raise StorageError("No such file or directory")
        copy(store, source, target)

    monkeypatch.setattr(FolderStore, "copy", disturbed)
    make(output, "first")
    assert copied(output) == {b"first"}


def test_a_file_that_came_late_is_no_part_of_a_version(output: FolderStore) -> None:
    prepare(output, "first")
    output.write("versions/first/csv-0123/000001.csv", b"first")
    make(output, "first")
    assert (seen(output), copied(output)) == ("first", {b"first"})
    assert output.read("csv-0123/000001.csv") is None


def test_a_run_whose_table_has_changed_publishes_nothing(output: FolderStore) -> None:
    make(output, "first")
    with pytest.raises(StateError, match="another run has changed the feature table"):
        make(output, "second", lambda: False)
    assert (seen(output), copied(output)) == ("first", {b"first"})


def test_a_result_that_lacks_a_part_is_not_published(output: FolderStore) -> None:
    run = prepare(output, "first")
    output.delete("versions/first/model")
    with pytest.raises(StateError, match=r"expected model in .*/versions/first, found it gone"):
        publish(output, run, lambda: True)
    assert newest(output) is None


def test_what_is_gone_of_a_version_is_known(output: FolderStore) -> None:
    run = make(output, "first")
    assert lacking(output, run) == []
    output.write("versions/first/matrix.csv", b"longer than it was")
    output.delete("versions/first/matrix.parquet/part-0.parquet")
    assert lacking(output, run) == ["matrix.csv", "matrix.parquet/part-0.parquet"]


def test_old_versions_go_and_their_numbers_stay(output: FolderStore) -> None:
    for name in ("one", "two", "three", "four", "five"):
        make(output, name)
    prepare(output, "killed")
    prune(output)
    assert len(all_versions(output)) == 5, "a day has not passed"
    for file in Path(output.address.path, "versions").rglob("*"):
        os.utime(file, (0, 0))
    prepare(output, "at-work")
    prune(output)
    assert [run.version for _, run in all_versions(output)] == [3, 4, 5]
    with pytest.raises(StateError, match=r"version 1 in .*that it is pruned. There are: 3, 4, 5"):
        at(output, 1)
    found = {file.name for file in Path(output.address.path, "versions").iterdir()}
    assert found - {f"{number:08d}.json" for number in range(1, 6)} == {
        "three", "four", "five", "at-work",
    }  # fmt: skip
    delete_all(output)
    files = [file.name for file in Path(output.address.path, "versions").rglob("*.*")]
    assert sorted(files) == [f"{number:08d}.json" for number in range(1, 7)]
    assert (newest(output), make(output, "after").version) == (None, 7)


def test_an_older_version_can_be_the_newest_again(output: FolderStore) -> None:
    make(output, "first")
    make(output, "second")
    assert restore(output, 1).version == 3
    assert (seen(output), copied(output)) == ("first", {b"first"})
    for file in Path(output.address.path).rglob("*"):
        os.utime(file, (0, 0))
    make(output, "fourth")
    make(output, "fifth")
    prune(output)
    assert [run.version for _, run in all_versions(output)] == [3, 4, 5]
    assert lacking(output, at(output, 3)) == [], "a folder stays as long as a version names it"
    output.delete("versions/first/model")
    with pytest.raises(StateError, match=r"expected model/pca.npz in .*versions/first, found it"):
        restore(output, 3)


def test_a_result_of_an_older_project_is_read_where_it_lies(output: FolderStore) -> None:
    output.write("run.json", run_of().to_bytes())
    run, files = open_result(output, S3Settings())
    assert run == run_of()
    assert files.address == output.address
