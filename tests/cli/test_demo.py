"""`fruits demo`, as a newcomer runs it: everything on loopback, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

from tests.conftest import Fruits
from tests.s3.test_loopback_safety import processes_of
from tests.waiting import eventually

# No proxy listens there: Keras's download fails at once, as on a machine without a network.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "FRUITS_WEIGHTS": "", "FRUITS_IMAGES": ""}


# What a laptop may have of other installations, and of its user's own work; none of it is there.
OF_THE_USER = {
    "AWS_ACCESS_KEY_ID": "ASIAUSER", "AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "x",
    "AWS_PROFILE": "work", "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "nowhere",
    "AWS_CA_BUNDLE": "/nope", "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
    "SPARK_HOME": "/opt/spark", "SPARK_CONF_DIR": "/opt/spark/conf", "SPARK_LOCAL_DIRS": "/nope",
    "SPARK_MASTER_HOST": "10.0.0.1", "PYSPARK_SUBMIT_ARGS": "--master yarn", "MASTER": "yarn",
    "PYSPARK_PYTHON": "python2", "HADOOP_HOME": "/nope", "HADOOP_CONF_DIR": "/nope",
    "CLASSPATH": "/nope", "JAVA_TOOL_OPTIONS": "-Xmx20m", "JDK_JAVA_OPTIONS": "-Xmx20m",
    "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9",
    "PYTHONSTARTUP": "/nope", "LC_ALL": "C",
}  # fmt: skip


def heed_interrupts() -> None:
    """Undo what nohup and background shells do: a child ignores the signals its parent ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def nearest_neighbour_accuracy(rows: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows whose nearest other row has the same label."""
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * rows @ rows.T
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(axis=1)] == labels).mean())


def assert_nothing_is_left(folder: Path) -> None:
    assert eventually(lambda: not processes_of(folder)), processes_of(folder)
    assert not list(folder.glob(".fruits/cluster-*"))


def test_real_photos_and_weights_give_a_matrix_that_tells_varieties_apart(
    fruits: Fruits, real_images: Path, real_weights: Path, tmp_path: Path
) -> None:
    done = fruits("demo", "--images", real_images, "--weights", real_weights, **OF_THE_USER)
    assert done.returncode == 0, done.stderr
    for word in ("600 listed, 0 quarantined", "images/s", "mobilenet_v2", "report.html", "Next:"):
        assert word in done.stdout

    output = tmp_path / "demo-output"
    run = json.loads((output / "run.json").read_text())
    assert run["images"].startswith("s3a://")
    assert run["output"].startswith("s3a://")
    assert run["cluster"]["master"].startswith("spark://127.0.0.1:")
    matrix = pq.read_table(output / "matrix.parquet")
    scores = np.column_stack([matrix[f"pc_{n}"].to_numpy() for n in range(1, 51)])
    labels = np.array(matrix["label"].to_pylist())
    assert nearest_neighbour_accuracy(scores, labels) >= 0.99
    assert_nothing_is_left(tmp_path)


def test_a_folder_that_is_no_result_is_never_replaced(fruits_here: Fruits, tmp_path: Path) -> None:
    target = tmp_path / "holidays"
    target.mkdir()
    (target / "beach.jpg").write_text("x")
    done = fruits_here("demo", "--output", target, **OFFLINE)
    assert done.returncode == 1
    assert "something else (beach.jpg), which would be lost" in done.stderr
    assert (target / "beach.jpg").exists()


def test_without_images_and_weights_others_do_and_kept_up_it_shows_its_pages(
    tmp_path: Path,
) -> None:
    command = [Path(sys.executable).with_name("fruits"), "demo", "--keep"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200", "KERAS_HOME": str(tmp_path / "keras")} | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=heed_interrupts,
    ) as demo:
        assert demo.stdout is not None
        told, pages = "", {}
        for line in demo.stdout:
            told += line
            if "http://127.0.0.1:" in line:
                name, _, page = line.strip().rpartition(" ")
                pages[name.strip()] = page
            if "In another terminal" in line:
                break
        assert "a rendered sample" in told
        assert "EfficientNet-Lite0 takes its place" in told
        assert "efficientnet_lite0-224" in told
        assert "240 listed, 0 quarantined" in told
        assert pages.keys() == {"master", "worker 1", "worker 2", "application"}
        for page in pages.values():
            with urllib.request.urlopen(page, timeout=120) as answer:
                assert b"Spark" in answer.read()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(300) == 0
    assert_nothing_is_left(tmp_path)


def test_interrupted_in_the_middle_it_stops_at_once_and_leaves_nothing(
    tmp_path: Path, fruit_pictures: Path
) -> None:
    command = [Path(sys.executable).with_name("fruits"), "demo", "--images", fruit_pictures]
    with subprocess.Popen(
        [*command, "--backbone", "efficientnet_lite0"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as demo:
        began = time.monotonic()
        while not _has_started_spark(demo):
            assert time.monotonic() - began < 300
            time.sleep(0.1)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=300)
        assert demo.returncode == 130
        assert "run again to continue" in errors
    assert_nothing_is_left(tmp_path)


def _has_started_spark(process: subprocess.Popen[str]) -> bool:
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "pyspark-shell" in child.cmdline():
                return True
        except psutil.Error:
            continue
    return False
