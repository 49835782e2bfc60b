"""Keeps Spark's classes parsed and linked in a file, so that each of its processes starts sooner.

A Java process of Spark reads some 15,000 classes from 300 jars before it does anything, which is
half of the processor time of its start. Java's class data sharing (JEP 350) maps them from an
archive instead. The archive belongs to one Java and to these very files: a Java to which it does
not belong starts without it, and says nothing.

    python -m pipeline.engine.class_archive               make it, for this environment
    python -m pipeline.engine.class_archive FILE S3A_JARS make it, for a class path as Java takes it
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from pipeline.engine.jars import fetch, spark_home
from pipeline.engine.java import QUICK_START, find_java_home

# What opens Java's own packages to Spark (JavaModuleOptions in its launcher), as far as the
# archived job goes.
_OPENED = ("lang", "lang.invoke", "lang.reflect", "net", "nio", "util", "util.concurrent")

# A small job of each kind that the pipeline runs. Nobody listens on S3's port: its client has been
# loaded by then.
_JOB = """
from contextlib import suppress
from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
numbers = spark.range(1000).selectExpr("id", "cast(id % 5 as string) as label")
numbers.repartition(3).groupBy("label").count().toArrow()
numbers.mapInArrow(lambda batches: batches, numbers.schema).write.parquet("numbers")
spark.read.parquet("numbers").orderBy("id").write.csv("csv", header=True)
with suppress(Py4JJavaError):
    spark.read.parquet("s3a://nowhere/numbers")
spark.stop()
"""
_SETTINGS = {
    "spark.hadoop.fs.s3a.endpoint": "http://127.0.0.1:9",
    "spark.hadoop.fs.s3a.endpoint.region": "nowhere",
    "spark.hadoop.fs.s3a.access.key": "none",
    "spark.hadoop.fs.s3a.secret.key": "none",
    "spark.hadoop.fs.s3a.attempts.maximum": "1",
    "spark.hadoop.fs.s3a.retry.limit": "0",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.port": "0",
    "spark.authenticate": "true",
    "spark.network.crypto.enabled": "true",
}


def default_file() -> Path:
    """Return where the archive of this environment lies."""
    return Path(sysconfig.get_path("data")) / "spark-classes.jsa"


def class_path(s3a_jars: str) -> str:
    """Return what the class path of a process that uses the archive begins with.

    An archive is taken for class paths that begin as its own did, and with no folder of files among
    these: Spark puts the folder of its settings before its own jars, which is too early.

    Parameters
    ----------
    s3a_jars
        The jars of S3A, as Java takes a class path.
    """
    return f"{s3a_jars}:{spark_home()}/jars/*"


def java_options(archive: Path) -> list[str]:
    """Return the options with which Java uses an archive, if it fits."""
    return [f"-XX:SharedArchiveFile={archive}", "-Xlog:disable"]


def make(archive: Path, s3a_jars: str) -> bool:
    """Run a small job of Spark and keep the classes that it took; tell whether that went well.

    Parameters
    ----------
    archive
        The file to make, of some 200 MB.
    s3a_jars
        The jars of S3A, as Java takes a class path.
    """
    archive.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".classes-") as folder:
        scratch = Path(folder)
        (scratch / "job.py").write_text(_JOB)
        made = scratch / "classes.jsa"
        command = [
            str(find_java_home() / "bin" / "java"), "-Xmx1g",
            *QUICK_START.split(), "-Xlog:disable",
            *(f"--add-opens=java.base/java.{package}=ALL-UNNAMED" for package in _OPENED),
            "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
            f"-XX:ArchiveClassesAtExit={made}", "-cp", class_path(s3a_jars),
            "org.apache.spark.deploy.SparkSubmit", "--master", "local[1]",
            *(word for name, value in _SETTINGS.items() for word in ("--conf", f"{name}={value}")),
            "job.py",
        ]  # fmt: skip
        run = subprocess.run(  # noqa: S603
            command,
            cwd=scratch,
            env=os.environ | {
                "SPARK_HOME": str(spark_home()),
                "SPARK_CONF_DIR": str(scratch / "none"),
                "SPARK_LOCAL_IP": "127.0.0.1",
                "PYSPARK_PYTHON": sys.executable,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )  # fmt: skip
        if run.returncode == 0 and made.exists():
            made.chmod(0o644)
            made.replace(archive)
            return True
    last_words = (run.stderr.strip().splitlines() or ["no more is known"])[-1]
    sys.stderr.write(f"fruits: Spark starts without an archive of its classes: {last_words}\n")
    return False


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            make(default_file(), ":".join(map(str, fetch())))
        case [_file, _s3a_jars]:
            make(Path(_file), _s3a_jars)
        case _:
            sys.exit(__doc__)
