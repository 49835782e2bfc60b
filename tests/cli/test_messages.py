"""Mistakes: each gets one line of cause and remedy, its exit status, and nothing is written.

All are told before Spark starts. Most commands run in this very process; what only a process of
their own can show comes first.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.local.loopback import Loopback
from pipeline.storage import BucketStore
from tests.conftest import Fruits
from tests.records import MODEL, run_of

LITE = ("--backbone", "efficientnet_lite0")


def one_line_error(done: object, *words: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert text.startswith("fruits: ") or " fruits: " in text
    for word in words:
        assert re.search(word, text), text


def test_another_spark_in_the_environment_is_not_ours(fruits: Fruits, tmp_path: Path) -> None:
    package = tmp_path / "spark/python/pyspark/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise ImportError('another Spark')")
    (tmp_path / "spark/python/lib").mkdir()
    python = tmp_path / "spark/python"
    ours = {"SPARK_HOME": str(python.parent), "PYTHONPATH": f"{python}:{python}/lib/py4j-src.zip"}
    done = fruits("--version", **ours)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_with_the_status_and_the_line_of_its_mistake(fruits: Fruits) -> None:
    assert "Usage: " in fruits("--help").stdout
    wrong = fruits("run")
    assert wrong.returncode == 2, wrong.stderr
    assert "Traceback" not in wrong.stderr
    one_line_error(fruits("run", "nowhere", "out", *LITE), "expected a folder", "nowhere")


def test_debug_shows_the_trace(fruits: Fruits) -> None:
    done = fruits("run", "nowhere", "out", *LITE, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", ["run", "features", "pca", "upload", "sample", "demo"])
def test_every_command_explains_itself(fruits_here: Fruits, command: str) -> None:
    done = fruits_here(command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert command in fruits_here("--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "a", "b", "--no-such-option"],
        ["run", "a", "b", "--components", "0"],
        ["run", "a", "b", "--backbone", "resnet"],
        ["run", "a", "b", *LITE, "--variance", "95"],
        ["bake", "a"],
    ],
)
def test_wrong_usage_exits_with_2(fruits_here: Fruits, arguments: list[str]) -> None:
    done = fruits_here(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_no_images_at_all(fruits_here: Fruits, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    one_line_error(fruits_here("run", "empty", "out", *LITE), "expected images", "fruits upload")
    one_line_error(fruits_here("run", "nowhere", "out", *LITE), "expected a folder", "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_else(
    fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.docx").write_text("x")
    one_line_error(fruits_here("run", fruit_pictures, taken, *LITE), "thesis.docx", "--force")
    assert [file.name for file in taken.iterdir()] == ["thesis.docx"]


@pytest.mark.parametrize(
    ("images", "model", "word"),
    [("/elsewhere", None, "the run of /elsewhere"), (None, "other-1", "of the model other-1")],
)
def test_an_output_that_holds_another_run(
    fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path, images: str, model: str, word: str
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    named = replace(MODEL, id=model or "any")
    run = run_of(images=images or str(fruit_pictures), model=named)
    (output / "run.json").write_bytes(run.to_bytes())
    one_line_error(fruits_here("run", fruit_pictures, output, *LITE), word, "--force")
    assert [file.name for file in output.iterdir()] == ["run.json"]


def test_features_of_another_model(
    fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    table = tmp_path / "output" / "features" / "other-224-abc"
    table.mkdir(parents=True)
    (table / "model.json").write_text("{}")
    one_line_error(fruits_here("run", fruit_pictures, "output", *LITE), "other-224-abc", "--force")


def test_a_damaged_run_json(fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run.json").write_text('{"images": ')
    one_line_error(fruits_here("run", fruit_pictures, "output", *LITE), "run.json is damaged")


@pytest.mark.parametrize("name", ["out[1]", "out#1", "out%41"])
def test_an_output_whose_name_means_something_else(
    fruits_here: Fruits, fruit_pictures: Path, name: str
) -> None:
    one_line_error(fruits_here("run", fruit_pictures, name, *LITE), "they take for something else")


def test_an_output_inside_the_images(fruits_here: Fruits, fruit_pictures: Path) -> None:
    one_line_error(fruits_here("run", fruit_pictures, fruit_pictures / "out", *LITE), "apart")


def test_weights_that_are_missing_broken_or_of_another_network(
    fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    from pipeline.networks.model import find_weights

    one_line_error(
        fruits_here("run", fruit_pictures, "out", "--weights", "none.h5"), "none.h5", "--weights"
    )
    (tmp_path / "broken.h5").write_bytes(b"no weights")
    for weights in ("broken.h5", find_weights("efficientnet_lite0", None)):
        one_line_error(
            fruits_here("run", fruit_pictures, "out", "--weights", weights),
            "does not fit",
            "--weights",
        )
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_downloaded_are_told_never_replaced(
    fruits_here: Fruits, fruit_pictures: Path, tmp_path: Path
) -> None:
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")}
    done = fruits_here("run", fruit_pictures, "out", **nowhere)
    one_line_error(done, "could not download", "efficientnet_lite0")
    assert not (tmp_path / "out").exists()


def test_s3_that_cannot_be_used(
    cluster: Loopback, bucket: BucketStore, fruits_here: Fruits, tmp_path: Path
) -> None:
    one_line_error(fruits_here("run", "s3a://no-such-bucket/a", "out", *LITE), "does not exist")
    one_line_error(fruits_here("run", bucket.address, "out", *LITE), "expected images")
    one_line_error(fruits_here("run", "ftp://x/y", "out", *LITE), "s3a://bucket/prefix")
    settings = (cluster.conf / "spark-defaults.conf").read_text()
    for name, good, wrong in [
        ("keys", str(cluster.s3.secret_key), "wrong"),
        ("down", str(cluster.s3.endpoint), "http://127.0.0.1:9"),
    ]:
        conf = tmp_path / name
        conf.mkdir()
        (conf / "spark-defaults.conf").write_text(settings.replace(good, wrong))
        done = fruits_here("run", bucket.address, "out", *LITE, SPARK_CONF_DIR=str(conf))
        one_line_error(done, "credentials" if name == "keys" else "Check the endpoint")
    assert not (tmp_path / "out").exists()


def test_pca_without_features(fruits_here: Fruits, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    one_line_error(fruits_here("pca", "output"), "found: none", "fruits features")


def test_the_sample_is_rendered_and_a_full_folder_refused(
    fruits_here: Fruits, tmp_path: Path
) -> None:
    done = fruits_here("sample", "fruit", "--per-variety", 1)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "fruit").rglob("*.jpg"))) == 12
    one_line_error(fruits_here("sample", "fruit"), "fruit")
