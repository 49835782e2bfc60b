"""Makes the SparkSession, the same way on a laptop, on rehearsal hosts and on EC2.

All settings come from `spark-defaults.conf` in SPARK_CONF_DIR, which whoever set the cluster up has
written: `pipeline.local.loopback` or the playbooks. What the code reads from it before Spark
starts, it reads here.
"""

from __future__ import annotations

import os
import pwd
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import SparkSession

from pipeline.engine.java import find_java_home, without_options
from pipeline.errors import ClusterError
from pipeline.s3.access import without_aws

COMMON_SETTINGS = Path(__file__).with_name("spark-defaults.conf")


def read_settings() -> dict[str, str]:
    """Return the settings of SPARK_CONF_DIR's spark-defaults.conf, empty if there is none."""
    folder = os.environ.get("SPARK_CONF_DIR")
    file = Path(folder, "spark-defaults.conf") if folder else None
    return {} if file is None or not file.exists() else read_settings_of(file)


def read_settings_of(file: Path) -> dict[str, str]:
    """Return the settings of a spark-defaults.conf."""
    lines = (line.strip() for line in file.read_text().splitlines())
    pairs = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[1] if len(pair) == 2 else "" for pair in pairs}


def check_user() -> None:
    """Make sure that the user has a name, without which Hadoop starts nothing.

    Raises
    ------
    ClusterError
        When the system knows none for the user's number, as in many a container.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        raise ClusterError(
            f"expected a user with a name, as Spark's Hadoop needs one, found number {os.getuid()} "
            "without. Add it to /etc/passwd, run as another user, or under `unshare "
            "--map-root-user`."
        ) from None


def make_session(
    name: str,
    master: str | None = None,
    settings: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> SparkSession:
    """Start an application on the cluster that SPARK_CONF_DIR describes.

    Parameters
    ----------
    name
        Shown in Spark's pages.
    master
        `spark://host:port`; None takes `spark.master` of the settings.
    settings
        Settings of this application only.
    log
        Where the driver's JVM writes what it has to say; None is standard error.

    Raises
    ------
    ClusterError
        When no master is known.
    """
    check_user()
    known = read_settings()
    master = master or known.get("spark.master")
    if master is None:
        raise ClusterError(
            "expected the address of a Spark master, found none; give --master spark://host:port "
            "or set SPARK_CONF_DIR to the folder of the cluster's spark-defaults.conf."
        )
    os.environ["JAVA_HOME"] = str(find_java_home())
    # Executors must run this very interpreter, or the one that the cluster's nodes have for it.
    os.environ["PYSPARK_PYTHON"] = known.get("spark.pyspark.python", sys.executable)
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    builder = SparkSession.builder.appName(name).master(master)
    for key, value in (settings or {}).items():
        builder = builder.config(key, value)
    with _standard_error_to(log), _interruptions_held_back(), _javas_environment():
        session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


@contextmanager
def _javas_environment() -> Iterator[None]:
    """Start the driver's JVM without the user's keys for AWS, and without other Javas' options.

    Spark would copy keys that it finds into Hadoop's settings, and send these to all executors.
    """
    before = dict(os.environ)
    become(without_options(without_aws(before)))
    try:
        yield
    finally:
        become(before)


def become(values: Mapping[str, str]) -> None:
    """Give this process an environment; other threads find no variable missing that stays."""
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(
        {name: value for name, value in values.items() if os.environ.get(name) != value}
    )


@contextmanager
def _interruptions_held_back() -> Iterator[None]:
    """Let Ctrl-C and its like wait for the few seconds in which the driver's JVM starts.

    PySpark forgets a JVM whose start is interrupted, and that JVM then waits for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold_back(number: int, _frame: object) -> None:
        came.append(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, hold_back) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is hold_back:  # Spark has put its own in place of SIGINT's
                signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def _standard_error_to(log: Path | None) -> Iterator[None]:
    """Give a process that starts in here another standard error than ours."""
    if log is None:
        yield
        return
    sys.stderr.flush()
    ours = os.dup(2)
    try:
        with log.open("ab") as theirs:
            os.dup2(theirs.fileno(), 2)
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def task_slots(spark: SparkSession) -> int:
    """Return how many tasks the application runs at once, when it has all that it may have."""
    limit = spark.sparkContext.getConf().get("spark.cores.max")
    return int(limit) if limit else max(1, spark.sparkContext.defaultParallelism)
