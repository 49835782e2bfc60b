"""What the loopback cluster shares with a real one: nobody gets in without the secret."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.cluster.master import master_state
from pipeline.engine.session import read_settings
from pipeline.local.loopback import Loopback, loopback_cluster
from tests.waiting import SECONDS, eventually


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line or folder names the cluster's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join([*process.cmdline(), process.cwd()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_application_without_the_secret_is_refused(cluster: Loopback, tmp_path: Path) -> None:
    program = (
        "from pyspark.sql import SparkSession\n"
        f"SparkSession.builder.master('{cluster.master}').appName('stranger')"
        ".config('spark.authenticate', 'true')"
        ".config('spark.authenticate.secret', 'a-guess-of-mine-that-is-wrong')"
        ".config('spark.network.crypto.enabled', 'true').getOrCreate().range(1).count()\n"
    )
    told = tmp_path / "told"
    with (
        told.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"SPARK_CONF_DIR": "/nonexistent"},
            stderr=output,
            start_new_session=True,
        ) as stranger,
    ):
        # It would ask three times, 20 s apart.
        assert eventually(lambda: "Failed to connect to master" in told.read_text())
        os.killpg(stranger.pid, signal.SIGKILL)
    state = master_state(cluster.pages["master"])
    known = [app["name"] for app in (*state["activeapps"], *state["completedapps"])]
    assert "stranger" not in known


def test_no_secret_shows_in_the_list_of_processes(cluster: Loopback) -> None:
    settings = read_settings()
    secrets = [
        settings["spark.authenticate.secret"],
        settings["spark.hadoop.fs.s3a.secret.key"],
    ]
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    assert any("deploy.master.Master" in line for line in lines)
    assert not [line for line in lines for secret in secrets if secret in line]


def test_everything_listens_on_loopback_only(cluster: Loopback) -> None:
    ports = {
        connection.laddr
        for process in processes_of(cluster.conf.parent)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(ports) >= 8
    assert {address.ip.removeprefix("::ffff:") for address in ports} == {"127.0.0.1"}


def test_the_pages_take_no_orders(cluster: Loopback) -> None:
    request = urllib.request.Request(
        f"{cluster.pages['master']}/workers/kill/?host=127.0.0.1", method="POST", data=b""
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code in (403, 405)
    with socket.socket() as rest:  # where REST submission listens by default
        assert rest.connect_ex(("127.0.0.1", 6066)) != 0


STARTER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run under nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pipeline.local.loopback import loopback_cluster
with loopback_cluster(Path(sys.argv[1])) as cluster:
    print(cluster.conf.parent, flush=True)
    time.sleep(600)
"""


@contextmanager
def starter_in(base: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has a cluster below a folder and waits for its end."""
    command = [sys.executable, "-c", STARTER, str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        try:
            yield starter
        finally:
            starter.kill()


def test_however_the_starter_ends_no_process_is_left_and_the_next_start_clears_up(
    cluster: Loopback, tmp_path: Path
) -> None:
    folders = []
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGHUP):
        with starter_in(tmp_path) as starter:
            assert starter.stdout is not None
            folder = Path(starter.stdout.readline().strip())
            assert len(processes_of(folder)) >= 8  # 4 servers, each under its guard
            starter.send_signal(end)
            starter.wait(SECONDS)
        assert eventually(lambda folder=folder: not processes_of(folder)), processes_of(folder)
        folders.append(folder)

    # It also runs beside another.
    with loopback_cluster(tmp_path) as other:
        assert not [folder for folder in folders if folder.exists()]
        assert other.conf.parent.exists()
        assert other.master != cluster.master
        assert other.s3.endpoint != cluster.s3.endpoint
        assert other.s3.secret_key != cluster.s3.secret_key
    assert not list(tmp_path.glob("cluster-*"))
