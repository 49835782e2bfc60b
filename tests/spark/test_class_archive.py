"""Spark starts from the archive of its classes, and without one where it does not fit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest
from pyspark.sql import SparkSession

from pipeline.engine.class_archive import class_path, default_file, java_options
from pipeline.engine.jars import fetch
from pipeline.engine.java import find_java_home
from pipeline.local.loopback import Loopback


@pytest.fixture(scope="module")
def s3a_jars() -> str:
    return ":".join(map(str, fetch()))


def java(*options: str) -> subprocess.CompletedProcess[str]:
    program = find_java_home() / "bin" / "java"
    return subprocess.run([program, *options, "-version"], capture_output=True, text=True)


def test_java_takes_it_for_the_class_path_that_it_is_of(s3a_jars: str) -> None:
    archive = f"-XX:SharedArchiveFile={default_file()}"
    taken = java("-Xshare:on", archive, "-cp", f"{class_path(s3a_jars)}:/etc")
    assert taken.returncode == 0, taken.stdout + taken.stderr
    assert java("-Xshare:on", archive, "-cp", f"/etc:{class_path(s3a_jars)}").returncode != 0


def test_java_starts_without_one_that_does_not_fit_and_says_nothing(tmp_path: Path) -> None:
    damaged = tmp_path / "classes.jsa"
    damaged.write_bytes(b"no archive")
    for archive in (damaged, tmp_path / "none"):
        run = java(*java_options(archive))
        assert run.returncode == 0
        assert run.stdout == ""
        assert "archive" not in run.stderr


def test_every_process_of_spark_uses_it(cluster: Loopback, spark: SparkSession) -> None:
    assert spark.range(100).repartition(4).count() == 100
    uses = {
        next(word for word in process.cmdline() if word.startswith("org.apache.spark")): any(
            region.path == str(default_file()) for region in process.memory_maps()
        )
        for process in psutil.Process().children(recursive=True)
        if process.name() == "java" and process.memory_maps()
    }
    assert {name.rpartition(".")[2] for name in uses} == {
        "CoarseGrainedExecutorBackend", "Master", "SparkSubmit", "Worker",
    }  # fmt: skip
    assert all(uses.values()), uses
