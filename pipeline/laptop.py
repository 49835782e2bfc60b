"""A Spark standalone cluster and an S3 server on this machine's loopback, for as long as needed.

The same Spark, settings, jars and pipeline as on a real cluster: one master and two workers as
processes of their own. The S3 stand-in is SeaweedFS. Each cluster has a folder of its own below
`.fruits/`, with its secrets, logs and data; the folder goes when the cluster stops, and one that a
crash left behind goes when the next cluster starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ClusterError
from pipeline.jars import fetch, spark_home
from pipeline.java import find_java_home
from pipeline.session import COMMON_SETTINGS
from pipeline.storage import S3Settings

HOST = "127.0.0.1"
WORKERS = 2
WORKER_MEMORY = "1g"  # of Java; Python and the model come on top of it
SECONDS_TO_START = 90.0


@dataclass(frozen=True)
class Loopback:
    """A running cluster: its master, its pages by name, its settings folder and its S3."""

    master: str
    pages: dict[str, str]
    conf: Path
    s3: S3Settings


@contextmanager
def loopback_cluster(base: Path, *, with_s3: bool = True) -> Iterator[Loopback]:
    """Start a cluster on loopback, point SPARK_CONF_DIR at it, and stop it at the end.

    Parameters
    ----------
    base
        The folder of the clusters' own folders; several may run side by side.
    with_s3
        Also start the S3 stand-in; without it, s3a:// means AWS.

    Raises
    ------
    ClusterError
        When a server does not come up; the message ends with its log.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_private_folder(base))
        s3 = stack.enter_context(_s3_server(folder)) if with_s3 else S3Settings()
        _write_settings(folder / "conf", s3)
        stack.enter_context(_environment(_spark_environment(folder)))
        master, page = stack.enter_context(_master(folder))
        with (folder / "conf" / "spark-defaults.conf").open("a") as settings:
            settings.write(f"spark.master {master}\n")
        for number in range(1, WORKERS + 1):
            stack.enter_context(_worker(folder, master, number))
        pages = _pages_once_registered(folder, page)
        yield Loopback(master, pages, folder / "conf", s3)


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


@contextmanager
def _s3_server(folder: Path) -> Iterator[S3Settings]:
    keys = S3Settings(
        region="eu-west-3",
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_urlsafe(30),
    )
    home = folder / "s3"
    (home / "data").mkdir(parents=True)
    identity = {
        "name": "fruits",
        "credentials": [{"accessKey": keys.access_key, "secretKey": keys.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    _write_private(home / "identities.json", json.dumps({"identities": [identity]}))

    def command(ports: list[int]) -> list[str]:
        options = {
            "dir": home / "data",
            "ip": HOST,
            "ip.bind": HOST,
            "master.port": ports[1],
            "master.port.grpc": ports[2],
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 1024,
            "volume.port": ports[3],
            "volume.port.grpc": ports[4],
            "volume.max": 0,
            "filer": "true",
            "filer.port": ports[5],
            "filer.port.grpc": ports[6],
            "filer.exposeDirectoryData": "false",
            "filer.localSocket": home / "filer.sock",
            "s3": "true",
            "s3.port": ports[0],
            "s3.port.grpc": ports[7],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": home / "identities.json",
            "s3.iam": "false",
            "s3.localSocket": home / "s3.sock",
        }
        weed = Path(sysconfig.get_path("scripts")) / "weed"
        arguments = [f"-{name}={value}" for name, value in options.items()]
        return [str(weed), "-logtostderr=true", "server", *arguments]

    # SeaweedFS's inner services speak HTTP too: with these keys they answer to its S3 only.
    signing = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    inner = {f"WEED_JWT_{name}_KEY": secrets.token_urlsafe(30) for name in signing}
    log = folder / "s3.log"
    with _server(log, command, 8, _s3_answers, os.environ | inner) as ports:
        yield replace(keys, endpoint=f"http://{HOST}:{ports[0]}")


def _s3_answers(ports: list[int]) -> bool:
    """Tell whether S3 answers; a request without credentials is refused with 403."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{ports[0]}/", timeout=2):
            return False
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        return False


def _write_settings(conf: Path, s3: S3Settings) -> None:
    conf.mkdir(mode=0o700)
    scratch = conf.parent / "scratch"
    here = {
        "spark.authenticate.secret": secrets.token_urlsafe(48),
        "spark.jars": ",".join(str(jar) for jar in fetch()),
        "spark.driver.host": HOST,
        "spark.driver.bindAddress": HOST,
        "spark.driver.memory": "1g",
        "spark.executor.memory": WORKER_MEMORY,
        "spark.local.dir": scratch,
        "spark.sql.warehouse.dir": scratch / "warehouse",
        "spark.hadoop.fs.s3a.buffer.dir": scratch,
        "spark.ui.port": 0,
        "spark.ui.showConsoleProgress": "false",
    }
    if s3.endpoint:
        here |= {
            "spark.hadoop.fs.s3a.endpoint": s3.endpoint,
            "spark.hadoop.fs.s3a.endpoint.region": s3.region,
            "spark.hadoop.fs.s3a.path.style.access": "true",
            "spark.hadoop.fs.s3a.access.key": s3.access_key,
            "spark.hadoop.fs.s3a.secret.key": s3.secret_key,
        }
    lines = [f"{name} {value}" for name, value in here.items()]
    settings = COMMON_SETTINGS.read_text() + "\n# This cluster\n" + "\n".join(lines) + "\n"
    _write_private(conf / "spark-defaults.conf", settings)
    (conf / "log4j2.properties").write_text(_LOGGING)


# Servers log what they do; an application says only what went wrong.
_LOGGING = """
rootLogger.level = ${sys:fruits.log.level:-error}
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n%ex
logger.shell.name = org.apache.spark.api.python.PythonGatewayServer
logger.shell.level = error
"""


def _spark_environment(folder: Path) -> dict[str, str]:
    return {
        "SPARK_CONF_DIR": str(folder / "conf"),
        "SPARK_HOME": str(spark_home()),
        "SPARK_LOCAL_IP": HOST,
        "SPARK_LOCAL_DIRS": str(folder / "scratch"),
        "SPARK_DAEMON_MEMORY": "512m",
        "SPARK_DAEMON_JAVA_OPTS": "-Dfruits.log.level=info",
        "JAVA_HOME": str(find_java_home()),
    }


@contextmanager
def _master(folder: Path) -> Iterator[tuple[str, str]]:
    def command(ports: list[int]) -> list[str]:
        address = ["--host", HOST, "--port", str(ports[0]), "--webui-port", str(ports[1])]
        return [*_spark_class("master.Master"), *address]

    def answers(ports: list[int]) -> bool:
        found = _json(f"http://{HOST}:{ports[1]}/json/")
        return bool(found) and found["url"] == f"spark://{HOST}:{ports[0]}"

    with _server(folder / "master.log", command, 2, answers) as ports:
        yield f"spark://{HOST}:{ports[0]}", f"http://{HOST}:{ports[1]}"


@contextmanager
def _worker(folder: Path, master: str, number: int) -> Iterator[None]:
    cores = max(1, (os.cpu_count() or 1) // WORKERS)
    work = folder / f"worker-{number}"

    def command(ports: list[int]) -> list[str]:
        address = ["--host", HOST, "--port", str(ports[0]), "--webui-port", str(ports[1])]
        size = ["--cores", str(cores), "--memory", WORKER_MEMORY, "--work-dir", str(work)]
        return [*_spark_class("worker.Worker"), *address, *size, master]

    with _server(folder / f"worker-{number}.log", command, 2, lambda _: True):
        yield


def _pages_once_registered(folder: Path, master_page: str) -> dict[str, str]:
    def alive() -> list[Any]:
        found = _json(f"{master_page}/json/") or {"workers": []}
        return [worker for worker in found["workers"] if worker["state"] == "ALIVE"]

    if not _wait(lambda: len(alive()) == WORKERS):
        raise ClusterError(
            f"expected {WORKERS} workers, found {len(alive())} after {SECONDS_TO_START:.0f} s. "
            f"The worker's log ends:\n{_tail(folder / 'worker-1.log')}"
        )
    workers = {f"worker {n}": w["webuiaddress"] for n, w in enumerate(alive(), 1)}
    return {"master": master_page, **workers}


def _spark_class(name: str) -> list[str]:
    return [str(spark_home() / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}"]


@contextmanager
def _server(
    log: Path,
    command: Callable[[list[int]], list[str]],
    ports_wanted: int,
    answers: Callable[[list[int]], bool],
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[int]]:
    """Run a server under a guard, on free ports; try again if another program took one of them."""
    for attempts_left in (2, 1, 0):
        ports = _free_ports(ports_wanted)
        guard = _guarded(command(ports), log, environment)
        try:
            if _wait(lambda g=guard, p=ports: g.poll() is not None or answers(p)):  # type: ignore[misc]
                if guard.poll() is None:
                    yield ports
                    return
            if not attempts_left or guard.poll() is None:
                raise ClusterError(f"{log.stem} did not start. Its log ends:\n{_tail(log)}")
        finally:
            _stop(guard)


def _guarded(
    command: list[str], log: Path, environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "pipeline.guard", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=dict(environment or os.environ),
        )


def _stop(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in found]


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310
            return json.load(answer)
    except (OSError, ValueError):
        return None


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-8:])


def _write_private(file: Path, text: str) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as content:
        content.write(text)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
