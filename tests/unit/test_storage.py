"""Addresses and folders: every name is kept as it is, and a file is there whole or not at all."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.quarantine import BadImageError
from pipeline.reading import ImageReader
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore, FolderStore, _neighbours, open_store

ODD_NAMES = [
    "with space.jpg", "accents éàü.jpg", "100%.jpg", "%41.jpg", "no#1.jpg", "a+b.jpg", "10:30.jpg",
    "_hidden", ".hidden", "_folder/.x/y", "q?&=.jpg", "[x]{y}*.jpg", "back\\slash", "a\nb", "日本",
]  # fmt: skip

# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bucket", "path"),
    [
        ("s3a://fruits", "fruits", ""),
        ("s3a://fruits/", "fruits", ""),
        ("s3a://fruits/images", "fruits", "images"),
        ("s3://fruits/images/", "fruits", "images"),
        ("s3a://fruits/a b/é%20#1/", "fruits", "a b/é%20#1"),
        ("/photos", None, "/photos"),
        ("/photos/", None, "/photos"),
        ("/a b/100%", None, "/a b/100%"),
        ("file:///photos", None, "/photos"),
        ("/", None, "/"),
        ("photos", None, str(Path.cwd() / "photos")),
        ("~/photos", None, str(Path.home() / "photos")),
    ],
)
def test_an_address_is_read_as_written(text: str, bucket: str | None, path: str) -> None:
    assert Address.parse(text) == Address(bucket, path)


@pytest.mark.parametrize(
    "text",
    ["s3a://", "s3a:///images", "s3n://fruits", "https://fruits.s3.amazonaws.com", "file://photos"],
)
def test_another_kind_of_address_is_refused_in_words(text: str) -> None:
    with pytest.raises(StorageError, match="expected s3a://bucket/prefix or a folder") as refused:
        Address.parse(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("place", ["s3a://fruits", "s3a://fruits/a/b", "/photos"])
@pytest.mark.parametrize("name", ["plain", *ODD_NAMES])
def test_what_an_address_prints_leads_back_to_it(place: str, name: str) -> None:
    address = Address.parse(place) / name
    assert Address.parse(str(address)) == address
    assert Address.parse(address.uri) == address
    assert str(address) == f"{place}/{name}"


def test_spark_gets_a_name_as_it_is_because_hadoop_undoes_no_escapes() -> None:
    assert Address.parse("/a b/é%41#x").uri == "file:///a b/é%41#x"
    assert Address.parse("s3://fruits/a b").uri == "s3a://fruits/a b"


@pytest.mark.parametrize(
    ("outer", "inner", "holds"),
    [
        ("s3a://fruits", "s3a://fruits/images", True),
        ("s3a://fruits/images", "s3a://fruits/images", True),
        ("s3a://fruits/images", "s3a://fruits/images/apple", True),
        ("s3a://fruits/images", "s3a://fruits/images-2", False),
        ("s3a://fruits/images/apple", "s3a://fruits/images", False),
        ("s3a://fruits", "s3a://fruits-2/images", False),
        ("/photos", "/photos/apple", True),
        ("/photos", "/photos-2", False),
        ("/", "/photos", True),
        ("/photos", "s3a://photos/apple", False),
    ],
)
def test_an_address_knows_what_lies_below_it(outer: str, inner: str, holds: bool) -> None:
    assert Address.parse(outer).holds(Address.parse(inner)) is holds


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    found = open_store(Address.parse(str(tmp_path)), S3Settings())
    assert isinstance(found, FolderStore)
    return found


def keys(store: FolderStore, prefix: str = "") -> list[str]:
    return sorted(entry.key for entry in store.list(prefix))


def test_odd_names_are_written_listed_read_copied_and_deleted(store: FolderStore) -> None:
    for name in ODD_NAMES:
        store.write(f"in/{name}", name.encode())
    assert keys(store) == sorted(f"in/{name}" for name in ODD_NAMES)
    for name in ODD_NAMES:
        store.copy(f"in/{name}", f"out/{name}")
        assert store.read(f"out/{name}") == name.encode()
    for name in ODD_NAMES:
        store.delete(f"in/{name}")
        store.delete(f"out/{name}")
    assert keys(store) == []


def test_an_entry_tells_length_time_and_version(store: FolderStore) -> None:
    store.write("a.jpg", b"12345")
    moment = datetime(2026, 2, 3, 4, 5, 6, 789_012, UTC)
    nanoseconds = int(moment.timestamp()) * 10**9 + 789_012_345
    os.utime(store.folder / "a.jpg", ns=(nanoseconds, nanoseconds))
    (entry,) = store.list()
    assert (entry.key, entry.length, entry.modified) == ("a.jpg", 5, moment)
    assert entry.version == str(nanoseconds)


def test_a_file_that_was_replaced_has_another_version(store: FolderStore) -> None:
    store.write("a", b"1")
    (before,) = store.list()
    store.write("a", b"2")
    os.utime(store.folder / "a", ns=(1, 1))
    (after,) = store.list()
    assert before.version != after.version


def test_a_prefix_may_end_in_the_middle_of_a_name_as_on_s3(store: FolderStore) -> None:
    for key in ("a/part-1", "a/part-2/x", "a/other", "ab", "b/part-1"):
        store.write(key, b"")
    assert keys(store, "a/part-") == ["a/part-1", "a/part-2/x"]
    assert keys(store, "a/part-1") == ["a/part-1"]
    assert keys(store, "a/") == ["a/other", "a/part-1", "a/part-2/x"]
    assert keys(store, "a") == ["a/other", "a/part-1", "a/part-2/x", "ab"]
    assert keys(store, "ab") == ["ab"]
    assert keys(store, "none/") == keys(store, "none") == keys(store, "ab/c") == []


def test_a_link_to_nowhere_is_listed_and_does_not_end_the_listing(store: FolderStore) -> None:
    store.write("b.jpg", b"1")
    (store.folder / "a.jpg").symlink_to("gone")
    (store.folder / "circle.jpg").symlink_to("circle.jpg")
    assert keys(store) == ["a.jpg", "b.jpg", "circle.jpg"]
    assert store.read("a.jpg") is None


def test_a_file_that_goes_during_the_listing_is_left_out(store: FolderStore) -> None:
    for key in ("a", "b", "c"):
        store.write(key, b"")
    listing = store.list()
    first = next(listing)
    (store.folder / "b").unlink()
    assert [first.key, *(entry.key for entry in listing)] == ["a", "c"]


def test_a_name_that_is_not_utf8_is_told(store: FolderStore) -> None:
    try:
        Path(os.fsdecode(bytes(store.folder) + b"/caf\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(StorageError, match=r"expected file names in UTF-8, found .*caf\\xe9\.jpg"):
        list(store.list())


def test_a_missing_folder_is_told_and_a_missing_file_is_none(tmp_path: Path) -> None:
    store = FolderStore(Address.parse(str(tmp_path / "none")))
    with pytest.raises(StorageError, match=f"expected a folder at {tmp_path}/none, found none"):
        list(store.list())
    assert list(store.list("features/")) == []
    assert store.read("a") is None
    assert store.read("a/b") is None
    store.delete("a")


def test_a_write_makes_its_folders_and_replaces_what_was_there(store: FolderStore) -> None:
    store.write("a/b/c", b"old and longer")
    store.write("a/b/c", b"new")
    assert store.read("a/b/c") == b"new"
    assert (store.folder / "a/b/c").stat().st_mode & 0o777 == 0o644
    assert keys(store) == ["a/b/c"]


@pytest.mark.parametrize("fails_with", [OSError(28, "No space left on device"), KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, fails_with: BaseException
) -> None:
    store.write("a", b"old")
    write_bytes = Path.write_bytes

    def fill_half(file: Path, content: bytes) -> int:
        write_bytes(file, content[: len(content) // 2])
        raise fails_with

    monkeypatch.setattr(Path, "write_bytes", fill_half)
    expected = StorageError if isinstance(fails_with, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as failed:
        store.write("a", b"new content")
    if expected is StorageError:
        assert f"{store.folder}/a: No space left on device" in str(failed.value)
    assert store.read("a") == b"old"
    assert os.listdir(store.folder) == ["a"]  # noqa: PTH208


def test_an_upload_keeps_content_and_time(store: FolderStore, tmp_path: Path) -> None:
    source = tmp_path / "source é.bin"
    source.write_bytes(b"content")
    os.utime(source, ns=(10**18, 10**18))
    store.upload("there/copy", source)
    assert store.read("there/copy") == b"content"
    (entry,) = store.list("there/")
    assert entry.version == str(10**18)


def test_an_upload_of_a_file_that_is_gone_is_told(store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        store.upload("copy", tmp_path / "gone")
    assert keys(store) == []


def test_a_copy_replaces_what_was_there(store: FolderStore) -> None:
    store.write("a", b"new")
    store.write("b/c", b"old")
    store.copy("a", "b/c")
    assert keys(store) == ["a", "b/c"]
    assert store.read("b/c") == b"new"
    with pytest.raises(StorageError, match="No such file"):
        store.copy("gone", "b/d")
    assert keys(store) == ["a", "b/c"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_object_is_written_once(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    assert store.write_new("a/one", b"first")
    assert not store.write_new("a/one", b"second")
    assert store.read("a/one") == b"first"
    assert keys(store) == ["a/one"]


def test_a_delete_takes_the_object_and_all_below_it_and_nothing_beside_it(
    store: FolderStore,
) -> None:
    for key in ("a/1", "a/b/2", "ab", "c"):
        store.write(key, b"")
    store.delete("a")
    assert keys(store) == ["ab", "c"]
    store.delete("c")
    store.delete("c")
    assert keys(store) == ["ab"]


def test_deleting_a_link_leaves_what_it_leads_to(store: FolderStore) -> None:
    store.write("kept/a", b"1")
    (store.folder / "link").symlink_to("kept", target_is_directory=True)
    store.delete("link")
    assert keys(store) == ["kept/a"]
    assert not (store.folder / "link").exists()


def test_a_file_in_the_way_of_a_folder_is_told(store: FolderStore) -> None:
    store.write("a", b"1")
    with pytest.raises(StorageError, match=r"a/b: .*Check that it exists"):
        store.write("a/b", b"2")
    assert store.read("a/b") is None


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """Give a folder that this process, made an ordinary user for the moment, may not enter."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder, "forbidden")
        (inside / "deeper").mkdir(parents=True)
        Path(folder).chmod(0o755)
        inside.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield inside
        finally:
            if root:
                os.seteuid(0)
            inside.chmod(0o700)


def test_a_folder_that_may_not_be_read_is_told(forbidden: Path) -> None:
    outer = FolderStore(Address.parse(str(forbidden.parent)))
    for attempt in (
        lambda: list(outer.list()),
        lambda: outer.read("forbidden/a"),
        lambda: outer.write("forbidden/a", b""),
        lambda: outer.delete("forbidden/a"),
    ):
        with pytest.raises(StorageError, match=r"forbidden.*: Permission denied\. Check that"):
            attempt()


def test_the_reader_of_images_gives_the_version_that_the_listing_gave(store: FolderStore) -> None:
    for name in ODD_NAMES:
        store.write(name, name.encode())
    read = ImageReader(store.address, S3Settings()).open()
    for entry in store.list():
        assert read(entry.key) == (entry.key.encode(), entry.version)
    with pytest.raises(BadImageError, match="vanished"):
        read("gone.jpg")


def test_folders_that_are_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for file in (outside / "apple/0.jpg", tmp_path / "in/pear/1.jpg"):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    (tmp_path / "in/apple").symlink_to(outside / "apple")
    (tmp_path / "in/pear/again").symlink_to(tmp_path / "in")
    (tmp_path / "in/nowhere").symlink_to(tmp_path / "gone")
    (outside / "apple/self").symlink_to(outside / "apple")
    (outside / "apple/pears").symlink_to(tmp_path / "in/pear")
    (tmp_path / "in/pear/apples").symlink_to(outside / "apple")
    address = Address.parse(str(tmp_path / "in"))
    keys = {entry.key for entry in FolderStore(address, follows_links=True).list()}
    assert keys == {
        *("apple/0.jpg", "apple/pears/1.jpg", "nowhere"),
        *("pear/1.jpg", "pear/apples/0.jpg"),
    }
    assert {entry.key for entry in FolderStore(address).list()} == {"pear/1.jpg", "nowhere"}


# --- S3 --------------------------------------------------------------------------------------


def test_s3_settings_are_those_of_spark_and_print_no_key() -> None:
    settings = S3Settings.from_spark(
        {
            "spark.hadoop.fs.s3a.endpoint": "http://127.0.0.1:8333",
            "spark.hadoop.fs.s3a.endpoint.region": "eu-west-3",
            "spark.hadoop.fs.s3a.access.key": "ACCESS-KEY",
            "spark.hadoop.fs.s3a.secret.key": "SECRET-KEY",
        }
    )
    assert (settings.access_key, settings.secret_key) == ("ACCESS-KEY", "SECRET-KEY")
    for text in (repr(settings), str(settings), f"{ImageReader(Address('b', ''), settings)}"):
        assert "http://127.0.0.1:8333" in text
        assert "eu-west-3" in text
        assert "KEY" not in text
    assert S3Settings.from_spark({}) == S3Settings()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("NoSuchBucket", "check its name or create it"),
        ("InvalidAccessKeyId", "check the credentials"),
        ("SignatureDoesNotMatch", "the secret key is wrong"),
        ("ExpiredToken", "get new ones"),
        ("AccessDenied", "check the role's and the bucket's policy"),
        ("403", "check the role's and the bucket's policy"),
        ("404", "check the address"),
    ],
)
def test_what_s3_answers_is_told_with_its_remedy(code: str, remedy: str) -> None:
    store = BucketStore(Address("fruits", "images"), S3Settings())
    told = store._explain({"Code": code, "Message": "in S3's words"})
    assert told.startswith(f"s3a://fruits/images: S3 answered {code}: ")
    assert remedy in told
    assert "in S3's words" not in told


def test_an_unknown_answer_of_s3_is_told_in_its_own_words() -> None:
    store = BucketStore(Address("fruits", ""), S3Settings())
    told = store._explain({"Code": "SlowDown", "Message": "Please reduce your request rate"})
    assert told == "s3a://fruits: S3 answered SlowDown: Please reduce your request rate."
    assert store._explain({}) == "s3a://fruits: S3 answered unknown error: no more is known."


def test_files_are_joined_in_their_order(tmp_path: Path) -> None:
    store = FolderStore(Address.parse(str(tmp_path)))
    for name, content in {"b": b"first,", "a": b"", "c": b"last"}.items():
        store.write(name, content)
    store.join([("b", 6), ("a", 0), ("c", 4)], "deep/whole")
    assert store.read("deep/whole") == b"first,last"
    assert store.read("b") == b"first,"


@given(st.lists(st.integers(0, 20 << 20), max_size=20))
def test_only_the_last_part_of_a_joined_object_is_small(sizes: list[int]) -> None:
    parts = [(str(number), size) for number, size in enumerate(sizes)]
    runs = list(_neighbours(parts))
    assert [part for run in runs for part in run] == parts
    assert all(sum(size for _, size in run) >= 8 << 20 for run in runs[:-1])


def test_a_pipe_or_a_socket_among_images_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
    (tmp_path / "photo.jpg").write_bytes(b"1")
    store = open_store(Address.parse(str(tmp_path)), S3Settings())
    assert [entry.key for entry in store.list()] == ["photo.jpg"]
    read = ImageReader(store.address, S3Settings()).open()
    for key in ("pipe.jpg", "socket.jpg"):  # which was a photo when it was listed
        with pytest.raises(BadImageError, match="unreadable"):
            read(key)
