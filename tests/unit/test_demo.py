"""The demo's choices: which images, which weights, and where a result may go."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import NoImagesError, OutputTakenError, WeightsError
from pipeline.local.demo import check_target, copy_result
from pipeline.local.given import choose_weights, open_images, weights_file
from pipeline.local.sample import VARIETIES
from pipeline.networks.catalogue import NETWORKS
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, FolderStore
from pipeline.versions import RESULT
from tests.records import run_of


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def write(folder: Path, **files: bytes) -> Path:
    """Write files below a folder; `__` in a name stands for `/`, `_jpg` for `.jpg` and so on."""
    for name, content in files.items():
        stem, _, ending = name.replace("__", "/").rpartition("_")
        file = folder / f"{stem}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def archive(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as content:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            content.addfile(member, io.BytesIO(name.encode()))
    return file


# --- images ----------------------------------------------------------------------------------


def test_without_images_a_sample_is_rendered_for_the_time_of_the_demo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.local.sample.VARIETIES", {"Lemon": VARIETIES["Lemon"]})
    with open_images(None) as (folder, said):
        assert {file.split("/")[0] for file in contents(folder)} == {"Lemon"}
        assert "rendered sample" in said
    assert not folder.exists()


def test_a_folder_of_images_is_taken_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, Kiwi__0_jpg=b"1", more_tar=b"not even an archive")
    with open_images(tmp_path) as (folder, said):
        assert folder == tmp_path
        assert said == str(tmp_path)
    assert contents(tmp_path) == {"Kiwi/0.jpg": b"1", "more.tar": b"not even an archive"}


def test_archives_are_unpacked_for_the_time_of_the_demo(tmp_path: Path) -> None:
    one = archive(tmp_path / "1.tar", "Kiwi/0.jpg", "LICENSE")
    two = archive(tmp_path / "2.tar", "Plum é/0.jpg")
    with open_images(one) as (folder, said):
        assert sorted(contents(folder)) == ["Kiwi/0.jpg", "LICENSE"]
        assert said == str(one)
    assert not folder.exists()
    with open_images(tmp_path) as (folder, said):
        assert sorted(contents(folder)) == ["Kiwi/0.jpg", "LICENSE", "Plum é/0.jpg"]
        assert said == f"{one}, {two}"
    assert sorted(contents(tmp_path)) == ["1.tar", "2.tar"]


def test_a_zip_as_kaggle_gives_it_and_a_packed_tar_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as content:
        content.writestr("fruits-360/Training/Pêche 1/0.jpg", b"0")
        content.writestr("fruits-360/Training/empty/", b"")
        content.writestr(zipfile.ZipInfo("no/time.jpg", (1980, 0, 0, 0, 0, 0)), b"1")
    plain = archive(tmp_path / "plain", "Kiwi/0.jpg")
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    with open_images(tmp_path) as (folder, _):
        assert sorted(contents(folder)) == [
            "Kiwi/0.jpg",
            "fruits-360/Training/Pêche 1/0.jpg",
            "no/time.jpg",
        ]


def test_two_archives_with_the_same_names_lose_nothing(tmp_path: Path) -> None:
    archive(tmp_path / "train.tar", "Kiwi/0.jpg")
    archive(tmp_path / "test.tar", "Kiwi/0.jpg")
    with open_images(tmp_path) as (folder, _):
        assert sorted(contents(folder)) == ["Kiwi/0.jpg", "train.tar/Kiwi/0.jpg"]


def test_names_in_a_zip_are_read_as_their_programs_meant_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as content:
        content.writestr("Kiwi/0.jpg", b"0")
        content.writestr("Apple:0.jpg", b"1")
        link = zipfile.ZipInfo("Kiwi/again.jpg")
        link.external_attr = 0o120777 << 16
        content.writestr(link, "0.jpg")
        content.writestr("PXXche/0.jpg", b"2")
    raw = (tmp_path / "a.zip").read_bytes()
    # As .NET writes a folder, and macOS an accent, which says nothing of UTF-8.
    raw = raw.replace(b"Apple:0", b"Apple\\0").replace(b"PXXche", "P\u00eache".encode())
    (tmp_path / "a.zip").write_bytes(raw)
    with open_images(tmp_path / "a.zip") as (folder, _):
        assert sorted(contents(folder)) == ["Apple/0.jpg", "Kiwi/0.jpg", "P\u00eache/0.jpg"]


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_an_archive_that_is_damaged_further_on_is_told(tmp_path: Path, damage: str) -> None:
    whole = archive(tmp_path / "a.tar", *(f"Kiwi/{number}.jpg" for number in range(5)))
    content = bytearray(whole.read_bytes())
    if damage == "header":
        content[2 * 1024] ^= 1
        whole.write_bytes(content)
    else:
        whole.unlink()
        whole = tmp_path / "a.tar.gz"
        whole.write_bytes(gzip.compress(bytes(content))[:-40])
    with pytest.raises(NoImagesError, match=r"a\.tar.*found: "), open_images(whole):
        pass


def test_a_folder_of_links_to_folders_holds_images(tmp_path: Path) -> None:
    (tmp_path / "store/Kiwi").mkdir(parents=True)
    (tmp_path / "store/Kiwi/0.jpg").write_bytes(b"0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/Kiwi").symlink_to(tmp_path / "store/Kiwi")
    with open_images(tmp_path / "mine") as (folder, _):
        assert folder == tmp_path / "mine"


def test_a_zip_that_reaches_out_of_its_folder_or_is_locked_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as content:
        content.writestr("../../../../evil.jpg", b"evil")
    locked = bytearray((tmp_path / "evil.zip").read_bytes().replace(b"../../../../evil", b"e" * 16))
    for place in (6, locked.index(b"PK\1\2") + 8):
        locked[place] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 and no more")
    for name, told in (("evil", "outside"), ("locked", "password"), ("cut", "not a zip")):
        given = tmp_path / f"{name}.zip"
        with pytest.raises(NoImagesError, match=told), open_images(given):
            pytest.fail("it was taken")
    assert not list(tmp_path.rglob("evil.jpg"))


def test_what_holds_no_image_is_refused_with_its_path(tmp_path: Path) -> None:
    refused = [
        write(tmp_path / "texts", a_txt=b"a"),
        write(tmp_path / "other", a_jpg=b"a") / "a.jpg",
        tmp_path / "missing",
        archive(tmp_path / "texts.tar", "a.txt"),
        archive(tmp_path / "empty.tar"),
    ]
    for given in refused:
        with pytest.raises(NoImagesError, match="Check IMAGES") as told, open_images(given):
            pytest.fail(f"{given} was taken")
        assert str(given) in str(told.value)


def test_an_archive_that_reaches_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    evil = archive(tmp_path / "in" / "evil.tar", "a.jpg", "../../../../evil.jpg")
    with pytest.raises(NoImagesError, match="outside the destination"), open_images(evil):
        pytest.fail("it was taken")
    assert not list(tmp_path.rglob("evil.jpg"))


def test_a_link_is_a_copy_and_never_a_way_out_and_times_are_kept(tmp_path: Path) -> None:
    file = archive(tmp_path / "1.tar", "Kiwi/0.jpg")
    with tarfile.open(file, "a") as content:
        for name, kind, to in (
            ("Kiwi/1.jpg", tarfile.LNKTYPE, "Kiwi/0.jpg"),
            ("Kiwi/2.jpg", tarfile.SYMTYPE, "0.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mtime = kind, to, 1_700_000_000
            content.addfile(member)
    with open_images(file) as (folder, _):
        assert contents(folder) == dict.fromkeys(
            ("Kiwi/0.jpg", "Kiwi/1.jpg", "Kiwi/2.jpg"), b"Kiwi/0.jpg"
        )
        assert not any(each.is_symlink() for each in folder.rglob("*"))
        assert (folder / "Kiwi/1.jpg").stat().st_mtime == 1_700_000_000
    out = tmp_path / "secret.jpg"
    out.write_bytes(b"secret")
    with tarfile.open(file, "a") as content:
        member = tarfile.TarInfo("Kiwi/3.jpg")
        member.type, member.linkname = tarfile.SYMTYPE, str(out)
        content.addfile(member)
    with pytest.raises(NoImagesError, match="linkname"), open_images(file):
        pytest.fail("it was taken")


# --- weights ---------------------------------------------------------------------------------


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keras's cache as it is after a download, and no other source of weights."""
    monkeypatch.delenv("FRUITS_WEIGHTS", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    file = tmp_path / "keras/models"
    return write(file, **{"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top_h5": b""})


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Keras's download fail at once, as without a network."""
    monkeypatch.delenv("FRUITS_WEIGHTS", raising=False)

    def fail(*_: object) -> Path:
        raise WeightsError("Keras could not download its MobileNetV2 weights")

    monkeypatch.setattr("pipeline.networks.weights._download", fail)


def test_weights_are_those_given_then_the_environments_then_keras(
    keras_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = write(tmp_path, given_h5=b"", named_h5=b"")
    (kerass,) = keras_home.iterdir()
    assert choose_weights(None, None) == ("mobilenet_v2", kerass, None)
    monkeypatch.setenv("FRUITS_WEIGHTS", str(given / "named.h5"))
    assert choose_weights(None, None) == ("mobilenet_v2", given / "named.h5", None)
    assert choose_weights(str(given / "given.h5"), None)[1] == given / "given.h5"


def test_a_network_that_is_asked_for_is_the_one_that_runs(
    keras_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = replace(NETWORKS["mobilenet_v2"], name="other", weights=lambda: tmp_path / "other.h5")
    monkeypatch.setitem(NETWORKS, "other", other)
    monkeypatch.setenv("FRUITS_WEIGHTS", str(tmp_path / "of_mobilenet.h5"))
    assert choose_weights(None, "other") == ("other", tmp_path / "other.h5", None)
    assert choose_weights(None, "efficientnet_lite0")[0] == "efficientnet_lite0"


def test_a_folder_stands_for_the_one_weights_file_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights", a_h5=b"", README_md=b"")
    assert choose_weights(str(folder), None)[1] == folder / "a.h5"


def test_a_folder_of_several_weights_or_none_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights", a_h5=b"", b_h5=b"")
    with pytest.raises(WeightsError, match=r"found a\.h5, b\.h5"):
        choose_weights(str(folder), None)
    with pytest.raises(WeightsError, match="found none"):
        choose_weights(str(tmp_path), None)


def test_a_file_of_weights_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no\.h5, found none"):
        weights_file(tmp_path / "no.h5")


def test_without_a_download_the_other_network_takes_its_place_and_says_so(
    no_download: None,
) -> None:
    backbone, weights, said = choose_weights(None, None)
    assert backbone == "efficientnet_lite0"
    assert weights.is_file()
    assert said is not None
    assert "EfficientNet-Lite0 takes its place" in said


@pytest.mark.parametrize(("given", "backbone"), [("imagenet", None), (None, "mobilenet_v2")])
def test_what_was_asked_for_by_name_is_never_replaced(
    no_download: None, given: str | None, backbone: str | None
) -> None:
    with pytest.raises(WeightsError, match="could not download"):
        choose_weights(given, backbone)


def test_the_other_network_may_be_asked_for(
    no_download: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRUITS_WEIGHTS", str(tmp_path / "of mobilenet_v2.h5"))
    backbone, weights, said = choose_weights(None, "efficientnet_lite0")
    assert (backbone, said) == ("efficientnet_lite0", None)
    assert weights.suffix == ".pth"


# --- the result ------------------------------------------------------------------------------


def test_a_free_folder_or_an_earlier_result_may_be_the_target(tmp_path: Path) -> None:
    check_target(tmp_path / "missing")
    check_target(tmp_path)
    check_target(write(tmp_path, run_json=b"{}", report_html=b""))


def test_anything_else_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, thesis_doc=b"mine")
    with pytest.raises(OutputTakenError, match=r"something else \(thesis\.doc\)"):
        check_target(tmp_path)
    with pytest.raises(OutputTakenError, match=r"thesis\.doc is a file"):
        check_target(tmp_path / "thesis.doc")


def test_a_run_that_was_made_there_keeps_its_features(tmp_path: Path) -> None:
    write(tmp_path, run_json=b"{}", report_html=b"")
    (tmp_path / "features").mkdir()
    with pytest.raises(OutputTakenError, match=r"something else \(features\), which would be lost"):
        check_target(tmp_path)


FOLDERS = ("matrix.parquet", "model", "report-data")


@pytest.fixture
def source(tmp_path: Path) -> FolderStore:
    """A whole result, with the features that stay where they are."""
    store = FolderStore(Address.parse(str(tmp_path / "source")))
    for name in RESULT:
        key = f"{name}/part" if name in FOLDERS else name
        store.write(key, name.encode())
    store.write("run.json", run_of().to_bytes())
    store.write("features/m/model.json", b"")
    return store


WHOLE = {
    **{name: name.encode() for name in RESULT if name not in FOLDERS},
    "matrix.parquet/part": b"matrix.parquet",
    "model/part": b"model",
    "report-data/part": b"report-data",
    "run.json": run_of().to_bytes(),
}


def test_a_result_is_copied_whole_and_replaces_an_earlier_one(
    source: FolderStore, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    copy_result(source, S3Settings(), target / "new.v1")
    assert contents(target / "new.v1") == WHOLE
    write(target / "new.v1", of_the_earlier_txt=b"")
    copy_result(source, S3Settings(), target / "new.v1")
    assert contents(target / "new.v1") == WHOLE
    assert [file.name for file in target.iterdir()] == ["new.v1"]
    assert target.joinpath("new.v1").stat().st_mode & 0o777 == 0o755


def test_a_copy_that_fails_leaves_the_earlier_result_and_nothing_else(
    source: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write(tmp_path / "targets" / "target", run_json=b"the earlier one")

    def lost(_store: FolderStore, key: str) -> bytes:
        raise OSError(f"connection lost at {key}")

    monkeypatch.setattr(FolderStore, "read", lost)
    with pytest.raises(OSError, match="connection lost"):
        copy_result(source, S3Settings(), target)
    assert contents(target.parent) == {"target/run.json": b"the earlier one"}
