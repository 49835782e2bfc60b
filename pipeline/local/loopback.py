"""A Spark standalone cluster and an S3 server on this machine's loopback, for as long as needed.

The same Spark, settings, jars and pipeline as on a real cluster: one master and two workers as
processes of their own. The S3 stand-in is SeaweedFS. Each cluster has a folder of its own below
`.fruits/`, with its secrets, logs and data; the folder goes when the cluster stops, and one that a
crash left behind goes when the next cluster starts.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.cluster.master import registered_workers
from pipeline.engine import class_archive
from pipeline.engine.jars import fetch, spark_home
from pipeline.engine.java import QUICK_START, find_java_home, one_line
from pipeline.engine.session import COMMON_SETTINGS, check_user
from pipeline.errors import ClusterError
from pipeline.local import seaweed
from pipeline.local.environment import environment_of, of_servers
from pipeline.local.ports import free_ports
from pipeline.s3.access import S3Settings

T = TypeVar("T")

HOST = "127.0.0.1"
HOME = "s3a://fruits"  # where a notebook finds images and puts results
WORKERS = 2
# Of Java; Python and the model come on top of it. Two applications fit: a notebook and a run.
EXECUTOR_MEMORY, WORKER_MEMORY = "1g", "2g"
SECONDS_TO_START = 240.0  # a server that ends before is told at once


@dataclass(frozen=True)
class Loopback:
    """A running cluster: its master, its pages by name, its settings folder and its S3."""

    master: str
    pages: dict[str, str]
    conf: Path
    s3: S3Settings


@contextmanager
def loopback_cluster(base: Path, s3: S3Settings | None = None) -> Iterator[Loopback]:
    """Start a cluster on loopback, point SPARK_CONF_DIR at it, and stop it at the end.

    Parameters
    ----------
    base
        The folder of the clusters' own folders; several may run side by side.
    s3
        How s3a:// is reached; None starts the S3 stand-in, and nothing of this user's reaches it.

    Raises
    ------
    ClusterError
        When a server does not come up; the message ends with its log.
    """
    check_user()
    with ExitStack() as stack:
        folder = stack.enter_context(_private_folder(base))
        stack.enter_context(environment_of(_spark_environment(folder), with_s3=s3 is None))
        servers = stack.enter_context(_Servers(folder))
        stand_in = seaweed.new_settings(HOST) if s3 is None else None
        s3 = stand_in or s3 or S3Settings()
        master = _new_master()
        _write_settings(folder / "conf", s3, master)
        servers.start("master", _master_command(master))
        if stand_in:
            identities = {"fruits": (s3, seaweed.EVERYTHING)}
            command = seaweed.command(folder / "s3", s3, identities)
            servers.start("s3", command, seaweed.environment())
        servers.wait("master", lambda: _workers(master) is not None)
        for number in range(1, WORKERS + 1):
            work = folder / f"worker-{number}"
            servers.start(work.name, _worker_command(master, work))
        if stand_in:
            servers.wait("s3", lambda: seaweed.answers(s3))
        workers = servers.wait("worker-1", lambda: _all_workers(master))
        pages = {f"worker {n}": worker["webuiaddress"] for n, worker in enumerate(workers, 1)}
        yield Loopback(master.url, {"master": master.page, **pages}, folder / "conf", s3)


@contextmanager
def _private_folder(base: Path) -> Iterator[Path]:
    """Make a folder that is locked while this process lives, and remove it at the end.

    The kernel frees the lock of a process that is gone, however it went: a folder below `base`
    that can be locked belongs to nobody.
    """
    base.mkdir(parents=True, exist_ok=True)
    for left in base.glob("cluster-*/lock"):
        with suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=base.absolute(), prefix="cluster-"))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class _Servers:
    """The processes of one cluster, each under a guard that ends it when this process is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.guards: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for guard in self.guards.values():
            if guard.stdin:
                guard.stdin.close()
        for guard in self.guards.values():
            guard.wait()

    def start(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> None:
        """Start a server whose output goes to a log of its name."""
        with self._log(name).open("ab") as output:
            self.guards[name] = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "pipeline.local.guard", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=of_servers(os.environ) | (environment or {}),
                cwd=self.folder,
            )

    def wait(self, name: str, ready: Callable[[], T]) -> T:
        """Wait for what a server that is ready gives, as long as it lives; return that."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not (found := ready()):
            if self.guards[name].poll() is not None or time.monotonic() > deadline:
                tail = self._log(name).read_text(errors="replace").splitlines()[-8:]
                raise ClusterError(
                    f"expected the {name} to start within {SECONDS_TO_START:.0f} s, it did not. "
                    "Run again; its log ends:\n" + "\n".join(tail)
                )
            time.sleep(0.1)
        return found

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@dataclass(frozen=True)
class _Master:
    port: int
    page_port: int

    @property
    def url(self) -> str:
        return f"spark://{HOST}:{self.port}"

    @property
    def page(self) -> str:
        return f"http://{HOST}:{self.page_port}"


def _new_master() -> _Master:
    return _Master(*free_ports(HOST, 2))


def _master_command(master: _Master) -> list[str]:
    ports = ["--port", str(master.port), "--webui-port", str(master.page_port)]
    return [*_spark_class("master.Master"), "--host", HOST, *ports]


def _worker_command(master: _Master, work: Path) -> list[str]:
    cores = max(1, (os.cpu_count() or 1) // WORKERS)
    size = ["--cores", str(cores), "--memory", WORKER_MEMORY, "--work-dir", str(work)]
    ports = ["--port", "0", "--webui-port", "0"]
    return [*_spark_class("worker.Worker"), "--host", HOST, *ports, *size, master.url]


def _spark_class(name: str) -> list[str]:
    return [str(spark_home() / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}"]


def _workers(master: _Master) -> list[Any] | None:
    """Return the workers that the master knows, None while it does not answer."""
    try:
        return registered_workers(master.page)
    except (OSError, ValueError):
        return None


def _all_workers(master: _Master) -> list[Any]:
    """Return the workers once all have registered, none before."""
    known = _workers(master) or []
    return known if len(known) == WORKERS else []


def _write_settings(conf: Path, s3: S3Settings, master: _Master) -> None:
    conf.mkdir(mode=0o700)
    scratch = conf.parent / "scratch"
    scratch.mkdir(mode=0o700)
    jars, java = _class_path(), one_line([*_java_options(scratch), *s3.for_java()])
    here: dict[str, object] = {
        "spark.master": master.url,
        "spark.fruits.home": HOME,
        "spark.fruits.page": master.page,
        "spark.authenticate.secret": secrets.token_urlsafe(48),
        "spark.driver.extraClassPath": jars,
        "spark.executor.extraClassPath": jars,
        "spark.driver.host": HOST,
        "spark.driver.bindAddress": HOST,
        "spark.driver.memory": "1g",
        "spark.driver.defaultJavaOptions": java,
        "spark.executor.defaultJavaOptions": java,
        "spark.executor.memory": EXECUTOR_MEMORY,
        "spark.local.dir": scratch,
        "spark.sql.warehouse.dir": scratch / "warehouse",
        "spark.hadoop.fs.s3a.buffer.dir": scratch,
        "spark.ui.port": 0,
        "spark.ui.showConsoleProgress": "false",
    }
    here |= s3.for_spark()
    lines = [f"{name} {value}" for name, value in here.items()]
    settings = COMMON_SETTINGS.read_text() + "\n# This cluster\n" + "\n".join(lines) + "\n"
    seaweed.write_private(conf / "spark-defaults.conf", settings)
    shutil.copy(COMMON_SETTINGS.with_name("log4j2.properties"), conf)


def _spark_environment(folder: Path) -> dict[str, str]:
    scratch = folder / "scratch"
    return {
        "SPARK_CONF_DIR": str(folder / "conf"),
        "SPARK_HOME": str(spark_home()),
        "SPARK_LOCAL_IP": HOST,
        "SPARK_LOCAL_DIRS": str(scratch),
        "SPARK_DAEMON_MEMORY": "512m",
        "SPARK_DAEMON_CLASSPATH": _class_path(),
        "SPARK_DAEMON_JAVA_OPTS": one_line([*_java_options(scratch), "-Dfruits.log.level=info"]),
        "JAVA_HOME": str(find_java_home()),
    }


def _class_path() -> str:
    return class_archive.class_path(":".join(map(str, fetch())))


def _java_options(scratch: Path) -> list[str]:
    # On a small machine, half of the wait is six JVMs compiling code that runs once. Libraries of
    # Java's put parts of theirs with its temporary files; from /tmp not every system runs them.
    archive = class_archive.default_file()
    ready = class_archive.java_options(archive) if archive.exists() else []
    return [*QUICK_START.split(), f"-Djava.io.tmpdir={scratch}", *ready]
