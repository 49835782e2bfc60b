"""The whole job on the loopback cluster, by its command: pictures to matrix, and again."""

from __future__ import annotations

import csv
import hmac
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.networks.model import Model
from pipeline.record import FORMAT
from tests.cli.test_messages import one_line_error
from tests.conftest import Fruits
from tests.corpus import bad_images

POINTS = ("scores", "pictures")
SMALL = ("--backbone", "efficientnet_lite0", "--input-size", "96")


def run_json(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def pictures_of(output: Path, label: str) -> set[bytes]:
    rows = pq.read_table(output / "report-data" / "pictures.parquet").to_pylist()
    return {row["jpeg"] for row in rows if row["label"] == label}


def scores(output: Path) -> tuple[list[str], np.ndarray]:
    with (output / "matrix.csv").open(newline="") as content:
        rows = sorted(csv.reader(content))
    return [row[0] for row in rows[:-1]], np.array([row[2:] for row in rows[:-1]], float)


def assert_same_matrix(one: Path, other: Path) -> None:
    (paths, first), (same_paths, second) = scores(one), scores(other)
    assert paths == same_paths
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.fixture(scope="module")
def pictures(fruit_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "pictures"
    shutil.copytree(fruit_pictures, folder)
    for key, (content, _) in bad_images().items():
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_bytes(content)
    (folder / "readme.txt").write_text("not an image")
    first = min(folder.iterdir())
    first.rename(folder / f" {first.name} ")
    return folder


@pytest.fixture(scope="module")
def output(pictures: Path) -> Path:
    return pictures.parent / "output"


def test_the_whole_job_writes_all_that_it_promises(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    done = fruits_on_spark("run", pictures, output, *SMALL, "--components", 5)
    assert done.returncode == 0, done.stderr
    assert "52 listed, 4 quarantined" in done.stdout

    run = run_json(output)
    counts = run["counts"]
    assert counts["listed"] == counts["features"] + counts["quarantined"] == 52
    assert (counts["computed"], counts["ignored"], len(run["labels"])) == (52, 1, 12)
    assert run["pca"]["k"] == 5

    names = ["path", "label", *(f"pc_{n}" for n in range(1, 6))]
    with (output / "matrix.csv").open(newline="") as content:
        rows = list(csv.DictReader(content))
    assert list(rows[0]) == names
    table = pq.read_table(output / "matrix.parquet").sort_by("path")
    assert table.column_names == names
    for name in names[:2]:
        assert [row[name] or None for row in rows] == table[name].to_pylist()
    for name in names[2:]:
        np.testing.assert_array_equal([float(row[name]) for row in rows], table[name].to_numpy())

    with (output / "quarantine.csv").open(newline="") as content:
        assert {row["path"] for row in csv.DictReader(content)} == bad_images().keys()
    with (output / "explained_variance.csv").open(newline="") as content:
        variance = list(csv.DictReader(content))
    assert sum(row["kept"] == "True" for row in variance) == 5
    assert float(variance[-1]["cumulative"]) == pytest.approx(1)
    assert "<svg" in (output / "report.html").read_text()
    data = {name: pq.read_table(output / f"report-data/{name}.parquet") for name in POINTS}
    assert data["scores"]["path"].to_pylist() == sorted(row["path"] for row in rows)
    assert len(set(data["pictures"]["label"].to_pylist())) == 12
    assert {file.name for file in (output / "model").iterdir()} == {
        "pca.npz",
    }  # fmt: skip
    assert not (output / "_next").exists()
    assert not list((output / "_work").glob("*"))


def test_a_rerun_with_nothing_new_starts_no_spark(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    before = (output / "matrix.csv").stat().st_mtime_ns
    done = fruits_on_spark("run", pictures, output, *SMALL, "--components", 5)
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert (run["counts"]["computed"], run["counts"]["reused"]) == (0, 52)
    assert "spark" not in run["timings"]
    assert "features" in run["made"]["timings"]
    assert (run["made"]["computed"], run["largest_pass"]["images"]) == (52, 52)
    assert (output / "matrix.csv").stat().st_mtime_ns == before


def test_a_result_of_an_older_version_is_made_anew_with_what_it_lacked(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    shutil.rmtree(output / "report-data")
    shutil.rmtree(output / "versions")
    run = run_json(output)
    del run["format"]
    run["pca"]["standardize"] = run["pca"]["requested"].pop("standardize")
    run["largest_pass"]["images_per_second"] = 1.0
    (output / "run.json").write_text(json.dumps(run))
    done = fruits_on_spark("run", pictures, output, *SMALL, "--components", 5)
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert (run["format"], run["counts"]["computed"], run["pca"]["rows_read"]) == (FORMAT, 0, 0)
    assert (output / "report-data" / "pictures.parquet").exists()


def test_a_grown_folder_costs_its_own_part_and_equals_a_run_from_scratch(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    for file in sorted((pictures / "Lemon").glob("*.jpg"))[:3]:
        shutil.copy(file, pictures / "Banana" / f"new-{file.name}")
    done = fruits_on_spark("run", pictures, output, *SMALL)
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert (run["counts"]["computed"], run["counts"]["reused"]) == (3, 52)
    assert (run["pca"]["fit"], run["pca"]["rows_read"]) == ("grown", 3)
    assert (run["made"]["computed"], run["largest_pass"]["images"]) == (3, 52)
    assert (run["drift"]["added"], run["drift"]["is_unlike"]) == (3, None)
    assert "3 images were added: too few to compare" in done.stdout

    scratch = output.with_name("scratch")
    assert fruits_on_spark("run", pictures, scratch, *SMALL).returncode == 0
    assert run_json(scratch)["pca"]["fit"] == "full"
    assert_same_matrix(output, scratch)


def test_an_image_that_is_gone_leaves_the_result(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    gone = next((pictures / "Orange").glob("*.jpg"))
    gone.unlink()
    done = fruits_on_spark("run", pictures, output, *SMALL, "--standardize")
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert (run["counts"]["dropped"], run["pca"]["requested"]["standardize"]) == (1, True)
    assert str(gone.relative_to(pictures)) not in scores(output)[0]


def test_images_that_are_unlike_the_rest_are_told_and_shown(
    fruits_on_spark: Fruits, tmp_path: Path
) -> None:
    drawn = np.random.default_rng(7)

    def put(label: str, name: str, level: float) -> None:
        file = tmp_path / "in" / label / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = drawn.normal(level, 40, (24, 24, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(file)

    labels = {"dark": 60, "light": 180}
    for label, level in labels.items():
        for number in range(110):
            put(label, str(number), level)
    assert fruits_on_spark("run", tmp_path / "in", tmp_path / "out", *SMALL).returncode == 0
    assert run_json(tmp_path / "out")["drift"] is None
    for label, level in labels.items():
        for number in range(110):
            put(label, f"new-{number}", level + (30 if label == "dark" else 0))
    done = fruits_on_spark("run", tmp_path / "in", tmp_path / "out", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "220 images were added. They are unlike the rest, most of all dark" in done.stdout
    drift = run_json(tmp_path / "out")["drift"]
    assert (drift["added"], drift["compared"], drift["is_unlike"]) == (220, 220, True)
    (far,) = (tmp_path / "out/report-data").glob("farthest.parquet")
    rows = pq.read_table(far).to_pylist()
    assert len(rows) == 12
    assert {(row["label"], row["path"].startswith("dark/new-")) for row in rows} == {("dark", True)}
    assert "They are unlike the rest" in (tmp_path / "out/report.html").read_text()
    assert not list((tmp_path / "out").rglob("spreads-*"))


def test_a_result_older_than_the_features_is_made_anew(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    new = pictures / "Plum" / "late.jpg"
    shutil.copy(next((pictures / "Lemon").glob("*.jpg")), new)
    assert fruits_on_spark("features", pictures, output, *SMALL).returncode == 0
    assert "late.jpg" not in (output / "matrix.csv").read_text()
    done = fruits_on_spark("run", pictures, output, *SMALL, "--standardize")
    assert done.returncode == 0, done.stderr
    assert run_json(output)["counts"]["computed"] == 0
    assert str(new.relative_to(pictures)) in scores(output)[0]


def test_features_and_pca_apart_give_the_matrix_of_run(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    apart = output.with_name("apart")
    done = fruits_on_spark("features", pictures, apart, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "51 features and 4 quarantined of 55 images; 55 computed now" in done.stdout
    assert "Next: fruits pca" in done.stdout
    done = fruits_on_spark("pca", apart, "--standardize")
    assert done.returncode == 0, done.stderr
    assert_same_matrix(apart, output)
    assert run_json(apart)["largest_pass"]["images"] == 55


def test_more_components_than_images_are_refused_before_anything_is_read(
    fruits_on_spark: Fruits, pictures: Path, tmp_path: Path
) -> None:
    done = fruits_on_spark("run", pictures, tmp_path / "output", *SMALL, "--components", 500)
    assert done.returncode == 1
    assert re.search(r"expected 1 to 54 components \(55 images with 1,280 features", done.stderr)
    assert not (tmp_path / "output").exists()


def test_more_components_than_the_rank_is_an_error_and_the_result_stays(
    fruits_on_spark: Fruits, output: Path
) -> None:
    before = (output / "run.json").read_text()
    done = fruits_on_spark("pca", output, "--components", 1000)
    assert done.returncode == 1
    assert "expected 1 to" in done.stderr
    assert (output / "run.json").read_text() == before


def test_a_forgotten_image_leaves_no_file_that_named_it(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    image = next((pictures / "Kiwi Cut").glob("*.jpg"))
    path = str(image.relative_to(pictures))
    refused = fruits_on_spark("forget", output, path)
    assert refused.returncode == 1
    assert "to be deleted before it is forgotten" in refused.stderr
    image.unlink()
    pictured = pictures_of(output, "Kiwi Cut")
    (passed,) = output.glob("features/*/pass.json")
    passed.write_text(passed.read_text().replace('"unreadable": []', f'"unreadable": ["{path}"]'))
    done = fruits_on_spark("forget", output, path)
    assert done.returncode == 0, done.stderr
    assert "1 images forgotten, 1 of them had a row" in done.stdout
    assert len(pictures_of(output, "Kiwi Cut")) == len(pictured) - 1
    for file in filter(Path.is_file, output.rglob("*")):
        assert path.encode() not in file.read_bytes(), file
        if file.suffix == ".parquet" and "_delta_log" not in file.parts:
            assert path not in pq.read_table(file).to_pydict().get("path", []), file
    (kept,) = output.glob("features/*/forgotten/*.json")
    key = bytes.fromhex(re.search("^[0-9a-f]{64}$", done.stdout, re.MULTILINE)[0])
    expected = hmac.digest(key, path.encode(), "sha256").hex()
    assert json.loads(kept.read_text())["hashes"] == [expected]
    again = fruits_on_spark("run", pictures, output, *SMALL, "--standardize")
    assert again.returncode == 0, again.stderr
    assert run_json(output)["counts"]["computed"] == 0


def test_forgetting_the_last_image_leaves_neither_features_nor_result(
    fruits_on_spark: Fruits, pictures: Path, tmp_path: Path
) -> None:
    few, output = tmp_path / "few", tmp_path / "output"
    shutil.copytree(pictures / "Lemon", few / "Lemon")
    paths = [str(file.relative_to(few)) for file in few.rglob("*.jpg")]
    assert fruits_on_spark("run", few, output, *SMALL, "--components", 1).returncode == 0
    shutil.rmtree(few / "Lemon")
    done = fruits_on_spark("forget", output, *paths)
    assert done.returncode == 0, done.stderr
    assert re.search("^[0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert "There is no result any more: no image is left" in " ".join(done.stdout.split())
    assert {file.name for file in output.iterdir()} <= {"features", "versions", "_work"}
    assert not list(output.glob("features/*/table/**/*.parquet"))
    records = [file.read_text() for file in output.glob("versions/**/*") if file.is_file()]
    assert set(records) == {"{}"}, "their numbers are never used again"


def test_what_is_known_of_the_rows_is_counted_anew_where_it_was_damaged(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    for state in output.glob("features/*/states/*.npz"):
        state.write_bytes(state.read_bytes()[:-100])
    before = output.with_name("before")
    shutil.copytree(output, before)
    only_two = ("--keep-versions", 2, "--keep-days", 0)
    done = fruits_on_spark("run", pictures, output, *SMALL, "--standardize", *only_two)
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert (run["counts"]["computed"], run["pca"]["fit"]) == (0, "full")
    kept = [file for file in (output / "versions").glob("0*.json") if file.stat().st_size > 2]
    assert len(kept) == 2
    assert json.loads(max(kept).read_text())["run_id"] == run["run_id"]
    assert_same_matrix(before, output)
    done = fruits_on_spark("run", pictures, output, *SMALL, "--standardize")
    assert "spark" not in run_json(output)["timings"]


def test_what_is_gone_of_a_result_is_made_good_by_the_same_command(
    fruits_on_spark: Fruits, pictures: Path, output: Path
) -> None:
    command = ("run", pictures, output, *SMALL, "--standardize")
    (output / "run.json").unlink()
    shutil.rmtree(output / "model")
    done = fruits_on_spark(*command)
    assert done.returncode == 0, done.stderr
    run = run_json(output)
    assert "spark" not in run["timings"], "copies are made again of the version"
    assert (output / "model" / "pca.npz").exists()
    (output / "versions" / run["folder"] / "matrix.csv").unlink()
    done = fruits_on_spark(*command)
    assert done.returncode == 0, done.stderr
    assert f"matrix.csv of version {run['version']} is gone" in " ".join(done.stderr.split())
    again = run_json(output)
    assert (again["version"], again["counts"]["computed"]) == (run["version"] + 1, 0)
    listed = fruits_on_spark("results", output).stdout.split()
    assert listed[:2] == ["version", "published"]
    assert again["folder"] in listed
    assert "reused" in fruits_on_spark("results", output, "--at", run["version"] - 1).stdout


@pytest.fixture(params=["the driver", "the workers"])
def full_disk(
    request: pytest.FixtureRequest, tmp_path: Path, small_network: tuple[Model, bytes]
) -> Iterator[Path]:
    """A disk too small for the model, or one that holds the model but not the features."""
    disk = tmp_path / "disk"
    disk.mkdir()
    kilobytes = 300 if request.param == "the driver" else len(small_network[1]) // 1024 + 100
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs root on Linux: a small disk is mounted for this test")
    yield disk
    # An executor may keep open what it could not write.
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_no_space_left(fruits_on_spark: Fruits, fruit_pictures: Path, full_disk: Path) -> None:
    done = fruits_on_spark("run", fruit_pictures, full_disk / "out", *SMALL)
    one_line_error(done, "room|space")
    assert not (full_disk / "out" / "run.json").exists()
