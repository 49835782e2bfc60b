"""The real job on the real cluster: undisturbed, and with one fault after the other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.laptop import Loopback
from pipeline.storage import Address, BucketStore, open_store
from tests.hosts.cluster import (
    COMPONENTS,
    SERVICES,
    Matrix,
    Work,
    finish,
    on,
    read_matrix,
    secrets_of,
    workers_alive,
)
from tests.hosts.rehearsal import BUCKET, Rehearsal
from tests.s3_proxy import Behaviour, s3_proxy
from tests.waiting import SECONDS, eventually

pytestmark = pytest.mark.timeout(2400)

SCRATCH = "/var/lib/fruits/spark/local"


# --- undisturbed ------------------------------------------------------------------------------


def event_log(rehearsal: Rehearsal, application: str) -> str:
    """Return the events of an application that has ended, as they lie on S3."""
    store = BucketStore(Address(BUCKET, "spark-events"), rehearsal.s3)
    keys = [entry.key for entry in store.list() if application in entry.key]
    parts = (pa.py_buffer(store.read(key) or b"") for key in sorted(keys) if "/events_" in key)
    return "".join(pa.CompressedInputStream(part, "zstd").read().decode() for part in parts)


def test_both_workers_take_part(work: Work, undisturbed: Matrix) -> None:
    machines = work.rehearsal.machines
    events = event_log(work.rehearsal, work.report("undisturbed")["cluster"]["application"])
    added = [
        json.loads(line) for line in events.splitlines() if "SparkListenerExecutorAdded" in line
    ]
    hosts = {event["Executor Info"]["Host"] for event in added}
    assert hosts == {machines.hosts[name].address for name in ("worker1", "worker2")}


def test_no_secret_is_in_the_event_log(work: Work, undisturbed: Matrix) -> None:
    events = event_log(work.rehearsal, work.report("undisturbed")["cluster"]["application"])
    assert "spark.authenticate.secret" in events  # the settings are there, their values are not
    for name, secret in secrets_of(work.rehearsal).items():
        assert secret not in events, name


def test_the_matrix_is_that_of_the_loopback_cluster(
    work: Work,
    undisturbed: Matrix,
    cluster: Loopback,
    fruits: Callable[..., subprocess.CompletedProcess[str]],
    photos: Path,
    weights: Path | None,
    tmp_path: Path,
) -> None:
    network = ["--weights", weights] if weights else work.network
    run = fruits(
        "run", photos, tmp_path / "output", *network, "--components", COMPONENTS,
        SPARK_CONF_DIR=str(cluster.conf),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    read_matrix((tmp_path / "output" / "matrix.csv").read_text()).assert_equals(undisturbed)


# --- with a fault -----------------------------------------------------------------------------


@pytest.fixture
def job(work: Work, undisturbed: Matrix, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A job that has its network ready, so that it is soon at the images."""
    output = re.sub(r"\W+", "-", request.node.name)
    store = open_store(Address(BUCKET, ""), work.rehearsal.s3)
    for entry in list(store.list("undisturbed/features/")):
        if "/model." in entry.key:
            key = entry.key.replace("undisturbed", output, 1)
            store.write(key, store.read(entry.key) or b"")
    yield Job(work, output, undisturbed)
    # The next test finds a whole cluster, with no slot that is counted as taken.
    assert eventually(lambda: len(workers_alive(work.rehearsal, idle=True)) == 2)


class Job:
    """A job to be disturbed: what it must give all the same."""

    def __init__(self, work: Work, output: str, expected: Matrix) -> None:
        self.work, self.output, self.expected = work, output, expected
        self.rehearsal, self.machines = work.rehearsal, work.rehearsal.machines

    def survives(self, fault: Callable[[], object]) -> None:
        """Run it, let the fault happen while both workers are at the images, see it through."""
        running = self.work.start(self.output)
        self.wait_for_both(running)
        fault()
        finish(running)
        self.work.matrix(self.output).assert_equals(self.expected)

    def wait_for_both(self, running: subprocess.Popen[str]) -> None:
        """Wait until an executor on each worker runs Python."""
        busy = "pgrep -u spark -f pyspark.daemon"
        both = ("worker1", "worker2")
        assert eventually(
            lambda: all(on(self.rehearsal, name, busy, check=False) for name in both)
        ), running.communicate(timeout=60)


@contextmanager
def at_hand(job: Job, host: str, command: str) -> Iterator[Callable[[], None]]:
    """Log in to a host beforehand, so that a fault comes at once when it is called."""
    config = job.machines.hosts[host].ssh_config
    waits = f"echo ready; read now && sudo sh -c {shlex.quote(command)}"
    with subprocess.Popen(
        ["ssh", "-F", config, host, waits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdout
        assert session.stdout.readline() == "ready\n"

        def strike() -> None:
            _, errors = session.communicate("now\n", timeout=SECONDS)
            assert session.returncode == 0, errors

        yield strike


@pytest.mark.parametrize(
    "victims",
    [
        {"worker1": "CoarseGrainedExecutorBackend", "worker2": "pyspark.daemon"},
        {"worker1": "deploy.worker.Worker"},
    ],
    ids=["an executor and a Python worker", "a worker"],
)
def test_kill_9(job: Job, victims: dict[str, str]) -> None:
    with ExitStack() as stack:
        kills = [
            stack.enter_context(at_hand(job, host, f"pkill -9 -u spark -f {process}"))
            for host, process in victims.items()
        ]

        def kill() -> None:
            for one in kills:
                one()

        job.survives(kill)


# The workers try to reach it every 5 to 15 s. Some of that falls into its start, which takes longer
# here: they register while it is about to ask them what they run.
SLOW_RETURN = """
old=$(systemctl show --property MainPID --value spark-master)
kill -9 $old
while kill -0 $old 2>/dev/null; do sleep 0.1; done
until ss -ltn | grep -q ':7077 '; do sleep 0.1; done
pkill -STOP -u spark -f deploy.master.Master
sleep 9
pkill -CONT -u spark -f deploy.master.Master
"""


def test_the_master_killed_and_slow_to_return(job: Job) -> None:
    job.survives(lambda: on(job.rehearsal, "master", SLOW_RETURN))


def test_a_cable_cut_for_half_a_minute(job: Job) -> None:
    def cut() -> None:
        job.machines.cut("worker1")
        time.sleep(30)
        job.machines.mend("worker1")

    job.survives(cut)


def test_a_cable_cut_for_good(job: Job) -> None:
    try:
        job.survives(lambda: job.machines.cut("worker1"))
    finally:
        job.machines.mend("worker1")


def test_a_worker_without_power(job: Job) -> None:
    try:
        job.survives(lambda: job.machines.kill("worker1"))
    finally:
        job.machines.start("worker1")


def test_the_driver_killed_and_the_job_started_again(job: Job) -> None:
    running = job.work.start(job.output)
    store = open_store(Address(BUCKET, job.output), job.rehearsal.s3)

    def features_are_committed() -> bool:
        return any(entry.key.endswith("/_SUCCESS") for entry in store.list("features/"))

    kill = "pkill -9 -u analyst -f pipeline; pkill -9 -u analyst java; true"
    with at_hand(job, "master", kill) as kill_it:
        assert eventually(features_are_committed), running.communicate(timeout=60)
        kill_it()
    running.communicate(timeout=SECONDS)
    assert store.read("run.json") is None
    job.work.run(job.output)
    assert job.work.report(job.output)["counts"]["computed"] == 0
    job.work.matrix(job.output).assert_equals(job.expected)


def test_an_s3_that_refuses_and_hangs(job: Job) -> None:
    conf = "/var/lib/fruits/analyst/bad-day"
    bad_day = Behaviour(refused=0.05, hung=0.01)
    endpoint = str(job.rehearsal.s3.endpoint)
    with s3_proxy(endpoint, bad_day, job.machines.gateway) as proxy:
        job.machines.open_port(int(proxy.endpoint.rpartition(":")[2]))
        on(
            job.rehearsal,
            "master",
            f"umask 077; cp -r /etc/fruits/spark {conf}; sed -i 's#{endpoint}#{proxy.endpoint}#' "
            f"{conf}/spark-defaults.conf; chown -R analyst {conf}",
        )
        job.work.run(job.output, conf)
    assert proxy.refused
    assert proxy.hung
    job.work.matrix(job.output).assert_equals(job.expected)


def test_a_full_disk_is_told_and_room_is_all_it_takes(job: Job) -> None:
    # A file system of its own, small and full, over the folder of Spark's scratch files.
    fill = (
        f"mount -t tmpfs -o size=4M,mode=700,uid=$(id -u spark) none {SCRATCH}; "
        f"dd if=/dev/zero of={SCRATCH}/all-there-is bs=1M count=8 2>/dev/null; true"
    )
    for worker in ("worker1", "worker2"):
        on(job.rehearsal, worker, fill)
    try:
        running = job.work.start(job.output)
        told, _ = running.communicate(timeout=600)
    finally:
        for worker in ("worker1", "worker2"):
            on(job.rehearsal, worker, f"umount --lazy {SCRATCH}")
    assert running.returncode == 1
    assert told.splitlines()[-1].startswith("fruits: no space left on a disk of the cluster")
    assert "Traceback" not in told
    job.work.run(job.output)
    job.work.matrix(job.output).assert_equals(job.expected)


def test_every_host_rebooted(converged: Rehearsal) -> None:
    for host in SERVICES:
        converged.machines.stop(host)
    for host in SERVICES:
        converged.machines.start(host)
    assert eventually(lambda: len(workers_alive(converged)) == 2)
    for host, services in SERVICES.items():
        on(converged, host, f"systemctl is-active {shlex.join([*services, 'fruits-firewall'])}")
