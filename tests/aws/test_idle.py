"""The cluster stops itself when nobody uses it, and only then; a spot worker is drained in time.

Spark's page, JupyterLab and the metadata service are stood in for by a server on loopback that
answers as they do; instances are moto's.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from jupyter_server.auth.security import passwd

from pipeline.cluster.idle import Use, Watch
from pipeline.local.ports import free_ports
from tests.aws.account import REGION, Account
from tests.pages import Pages, serving
from tests.waiting import SECONDS, eventually

KEY = "A" * 64
TCP = "  sl  local_address rem_address   st tx_queue\n"
LISTEN = "   0: 00000000:0016 00000000:0000 0A 00000000:00000000\n"
LOGIN = "   1: 0A00000A:0016 0100000A:C350 01 00000000:00000000\n"
ELSEWHERE = "   2: 0A00000A:1F90 0100000A:0016 01 00000000:00000000\n"


@pytest.fixture
def pages() -> Iterator[Pages]:
    with serving() as running:
        running.answers = {"/json/": {"activeapps": [], "workers": []}}
        yield running


@pytest.fixture
def cluster(aws: Account) -> Iterator[str]:
    """A master, a worker on demand and one on spot, and a stranger."""
    ec2 = aws.client("ec2")
    image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["debian-12-amd64-*"]}])[
        "Images"
    ][0]
    made = []
    for name, role, market in (
        ("grove", "master", "on-demand"),
        ("grove", "worker", "on-demand"),
        ("grove", "worker", "spot"),
        ("other", "worker", "spot"),
    ):
        tags = [
            {"Key": key, "Value": value}
            for key, value in (("Cluster", name), ("Role", role), ("Market", market))
        ]
        launched = ec2.run_instances(
            ImageId=image["ImageId"],
            MinCount=1,
            MaxCount=1,
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )
        made.append(launched["Instances"][0]["InstanceId"])
    yield "grove"
    ec2.terminate_instances(InstanceIds=made)


def states(aws: Account, cluster: str) -> list[str]:
    wanted = [{"Name": "tag:Cluster", "Values": [cluster]}]
    found = aws.client("ec2").describe_instances(Filters=wanted)["Reservations"]
    live = [one for reservation in found for one in reservation["Instances"]]
    return sorted(one["State"]["Name"] for one in live[-3:])


@pytest.fixture
def settings(tmp_path: Path, pages: Pages) -> Iterator[dict[str, object]]:
    spark = tmp_path / "spark-defaults.conf"
    spark.write_text(f"spark.org.apache.spark.ui.JWSFilter.param.secretKey {KEY}\n")
    tcp = tmp_path / "tcp"
    tcp.write_text(TCP + LISTEN + ELSEWHERE)
    # Kernels have sockets there, whose paths may not be long.
    with tempfile.TemporaryDirectory() as runtime:
        yield {
            "cluster": "grove",
            "region": REGION,
            "hours": 2 / 3600,
            "seconds_between": 0.2,
            "page": pages.url,
            "spark_settings": str(spark),
            "jupyter_runtime": runtime,
            "connections": [str(tcp)],
        }


def watch(
    aws: Account, settings: dict[str, object], folder: Path, seconds: float
) -> tuple[int | None, str]:
    """Run the watch as its unit does; return its exit status, None if it still watches."""
    file = folder / "idle.json"
    file.write_text(json.dumps(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cluster.idle", "watch", str(file)],
        env=aws.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        return None, process.communicate(timeout=SECONDS)[1]
    return process.returncode, said


def test_an_idle_cluster_stops_itself_and_nobody_elses(
    aws: Account, cluster: str, settings: dict[str, object], tmp_path: Path
) -> None:
    status, said = watch(aws, settings, tmp_path, SECONDS)
    assert status == 0
    assert "stopping grove" in said
    assert states(aws, cluster) == ["stopped", "stopped", "terminated"]
    assert "running" in states(aws, "other")


def test_it_stays_while_somebody_is_logged_in(
    aws: Account, cluster: str, settings: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "tcp").write_text(TCP + LISTEN + LOGIN)
    assert watch(aws, settings, tmp_path, 12)[0] is None
    assert states(aws, cluster) == ["running", "running", "running"]


def test_it_stays_while_an_application_runs(
    aws: Account, cluster: str, settings: dict[str, object], tmp_path: Path, pages: Pages
) -> None:
    old = 1000 * (time.time() - 7200)
    app = {"id": "app-1", "name": "fruits", "starttime": old}
    pages.answers["/json/"] = {"activeapps": [app], "workers": []}
    jobs = "/proxy/app-1/api/v1/applications/app-1/jobs"
    pages.answers[jobs] = [{"status": "RUNNING", "submissionTime": "2026-01-01T00:00:00.000GMT"}]
    assert watch(aws, settings, tmp_path, 12)[0] is None
    assert states(aws, cluster) == ["running", "running", "running"]
    assert all("Bearer " in headers["Authorization"] for _, _, headers in pages.asked)

    # Held open by a notebook that does nothing, it does not keep the cluster up.
    pages.answers[jobs] = [{"status": "SUCCEEDED", "completionTime": "2026-01-01T00:00:00.000GMT"}]
    assert watch(aws, settings, tmp_path, SECONDS)[0] == 0
    assert states(aws, cluster) == ["stopped", "stopped", "terminated"]


def test_it_stays_while_the_master_cannot_be_asked(
    aws: Account, cluster: str, settings: dict[str, object], tmp_path: Path, pages: Pages
) -> None:
    pages.answers.clear()
    assert watch(aws, settings, tmp_path, 12)[0] is None
    assert states(aws, cluster) == ["running", "running", "running"]


def test_a_real_jupyterlab_tells_what_its_kernels_do(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """With the configuration of the door: TLS, a password, and a token in the runtime folder."""
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=test",
            "-keyout",
            str(tmp_path / "key.pem"),
            "-out",
            str(tmp_path / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    (tmp_path / "password").write_text(passwd("correct horse"))
    (tmp_path / "page-key").write_text("k" * 64)
    (port,) = free_ports("127.0.0.1", 1)
    config = tmp_path / "jupyter_server_config.py"
    config.write_text(
        "from pipeline.cluster.door import configure\n"
        f"configure(c, port={port}, certificate={str(tmp_path / 'cert.pem')!r},"
        f" key={str(tmp_path / 'key.pem')!r}, password={str(tmp_path / 'password')!r},"
        f" page_key={str(tmp_path / 'page-key')!r}, pages={{'spark': 8080}},"
        f" notebooks={str(tmp_path)!r})\n"
        "c.ServerApp.ip = '127.0.0.1'\nc.ServerApp.open_browser = False\n"
    )
    log = tmp_path / "jupyter.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--allow-root", f"--config={config}"],
            env=os.environ
            | {"JUPYTER_RUNTIME_DIR": str(settings["jupyter_runtime"]), "HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=tmp_path,
        )  # fmt: skip
    try:
        watching = Watch(**settings)  # type: ignore[arg-type]
        deadline = time.monotonic() + SECONDS
        runtime = Path(str(settings["jupyter_runtime"]))
        while not list(runtime.glob("jpserver-*.json")):
            assert time.monotonic() < deadline and server.poll() is None, log.read_text()
            time.sleep(0.3)
        while True:
            try:
                assert list(watching.notebooks()) == []
                break
            except OSError:
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        (info,) = [json.loads(one.read_text()) for one in runtime.glob("jpserver-*.json")]
        assert info["token"]
        assert info["token"] not in log.read_text()
        began = time.time()
        ask = urllib.request.Request(
            f"https://127.0.0.1:{port}/api/kernels",
            method="POST",
            data=b"{}",
            headers={"Authorization": f"token {info['token']}"},
        )
        urllib.request.urlopen(
            ask, context=ssl._create_unverified_context(), timeout=SECONDS
        ).close()
        uses: list[Use] = []

        def told() -> bool:
            with suppress(OSError):  # while a kernel starts, it may have no time to answer
                uses[:] = watching.notebooks()
            return bool(uses)

        assert eventually(told)
        (use,) = uses
        assert use.what.startswith("kernel python3")
        assert began - 1 <= use.at <= time.time() + 1
    finally:
        server.terminate()
        server.wait(SECONDS)


def test_the_spot_notice_drains_the_worker(pages: Pages, tmp_path: Path) -> None:
    done = tmp_path / "drained"
    worker = subprocess.Popen(
        ["bash", "-c", f"trap 'touch {done}' PWR; while :; do sleep 0.1; done"],
        env={"PATH": "/bin"},
    )
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\n[ "$4" = spark-worker ] && echo {worker.pid}\n')
    systemctl.chmod(0o755)
    pages.answers = {"/latest/api/token": "a-token"}
    code = f"import pipeline.cluster.spot as s; s.SECONDS_BETWEEN = 0.2; s.main(['{pages.url}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={"PATH": str(tmp_path) + ":/bin:/usr/bin"}
    )
    try:
        assert eventually(lambda: len(pages.asked) >= 6)
        assert process.poll() is None
        assert not done.exists()
        pages.answers["/latest/meta-data/spot/instance-action"] = {"action": "terminate"}
        assert process.wait(SECONDS) == 0
        assert eventually(done.exists)
    finally:
        if process.poll() is None:
            process.terminate()
        worker.kill()
        worker.wait(SECONDS)
    token_asked, asked = pages.asked[-2:]
    assert token_asked[0] == "PUT"
    assert asked[2]["X-Aws-Ec2-Metadata-Token"] == "a-token"
