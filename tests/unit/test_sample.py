"""The sample is fruit that a newcomer can trust: the same for everyone, and unlike each other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.local.sample import VARIETIES, render_sample


def contents(folder: Path, paths: list[Path]) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample") / "not yet" / "there"


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[Path]:
    return render_sample(folder, per_variety=3)


def test_every_variety_gets_its_folder_and_its_number_of_pictures(
    folder: Path, paths: list[Path]
) -> None:
    assert len(VARIETIES) >= 10
    expected = [folder / variety / f"{n}_100.jpg" for variety in VARIETIES for n in range(3)]
    assert paths == expected
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(expected)


def test_some_names_have_spaces_as_in_fruits_360() -> None:
    assert any(" " in variety for variety in VARIETIES)


def test_a_picture_is_a_square_rgb_jpeg_of_the_size_asked_for(
    tmp_path: Path, paths: list[Path]
) -> None:
    small = render_sample(tmp_path, per_variety=1, size=48)
    assert {path.name for path in small} == {"0_48.jpg"}
    for path, size in [*((p, 100) for p in paths), *((p, 48) for p in small)]:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (size, size))


def test_a_fruit_fills_a_white_frame(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as picture:
            pixels = np.asarray(picture).astype(int)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        # JPEG bleeds a little colour into the white blocks that the outline crosses.
        fruit = (pixels < 200).any(axis=-1)
        extent = max(np.ptp(np.flatnonzero(np.any(fruit, axis=axis))) for axis in (0, 1))
        assert np.count_nonzero((corners > 235).all(axis=-1)) >= 2, path
        assert 90 <= extent < 100, path
        assert 0.15 < fruit.mean() < 0.9, path


def test_pictures_of_a_variety_resemble_each_other_more_than_other_varieties(
    folder: Path, paths: list[Path]
) -> None:
    def palette(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            pixels = np.asarray(picture).reshape(-1, 3) // 64 @ (16, 4, 1)
        return np.bincount(pixels, minlength=64) / len(pixels)

    palettes = np.array([palette(path) for path in paths])
    distances = np.abs(palettes[:, None] - palettes).sum(axis=-1)
    np.fill_diagonal(distances, np.inf)
    agree = [paths[k].parent == paths[n].parent for k, n in enumerate(distances.argmin(axis=1))]
    # Colour alone, without any network, finds a sibling nearly always.
    assert np.mean(agree) > 0.8


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, folder: Path, paths: list[Path]
) -> None:
    again = render_sample(tmp_path, per_variety=3)
    assert contents(tmp_path, again) == contents(folder, paths)


def test_no_two_pictures_are_the_same_whatever_the_seed(
    tmp_path: Path, folder: Path, paths: list[Path]
) -> None:
    other = render_sample(tmp_path, per_variety=3, seed=361)
    every = [*contents(tmp_path, other).values(), *contents(folder, paths).values()]
    assert len(set(every)) == 2 * len(paths)


def test_a_picture_does_not_depend_on_how_many_others_there_are(
    tmp_path: Path, folder: Path, paths: list[Path]
) -> None:
    fewer = contents(tmp_path, render_sample(tmp_path, per_variety=1))
    assert fewer.items() < contents(folder, paths).items()


def test_a_picture_does_not_depend_on_which_varieties_there_are(
    tmp_path: Path, folder: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.local.sample.VARIETIES", {"Lemon": VARIETIES["Lemon"]})
    alone = contents(tmp_path, render_sample(tmp_path, per_variety=1))
    assert list(alone) == ["Lemon/0_100.jpg"]
    assert alone.items() < contents(folder, paths).items()


def test_an_empty_folder_is_welcome(tmp_path: Path) -> None:
    assert len(render_sample(tmp_path, per_variety=1)) == len(VARIETIES)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"expected .* empty, found 1 .*; remove it or"):
        render_sample(tmp_path)
    assert contents(tmp_path, list(tmp_path.rglob("*"))) == {"holiday.jpg": b"mine"}


def test_a_crash_leaves_no_truncated_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(picture: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half a")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        render_sample(tmp_path)
    assert not list(tmp_path.rglob("*.jpg"))
