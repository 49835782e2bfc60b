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

from pipeline.local.loopback import Loopback
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
from tests.s3_proxy import Behaviour, Told, s3_proxy
from tests.waiting import SECONDS, eventually

pytestmark = pytest.mark.timeout(2400)

SETTINGS = "/etc/fruits/spark"
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

    def survives(self, *faults: Callable[[Job], object], conf: str = SETTINGS) -> None:
        """Run it, let each fault happen while both workers are at the images, see it through."""
        running = self.work.start(self.output, conf)
        for fault in faults:
            self.wait_for_both(running)
            fault(self)
        finish(running)
        self.work.matrix(self.output).assert_equals(self.expected)

    @contextmanager
    def s3(self, behaviour: Behaviour) -> Iterator[tuple[str, Told]]:
        """Put a proxy before S3; yield the folder of settings that lead there, and its record."""
        conf = f"/var/lib/fruits/analyst/{self.output}"
        endpoint = str(self.rehearsal.s3.endpoint)
        with s3_proxy(endpoint, behaviour, self.machines.gateway) as proxy:
            self.machines.open_port(int(proxy.endpoint.rpartition(":")[2]))
            on(
                self.rehearsal,
                "master",
                f"umask 077; cp -r {SETTINGS} {conf}; sed -i 's#{endpoint}#{proxy.endpoint}#' "
                f"{conf}/spark-defaults.conf; chown -R analyst {conf}",
            )
            yield conf, proxy

    def wait_for_both(self, running: subprocess.Popen[str]) -> None:
        """Wait until an executor on each worker runs Python, also again after a fault."""
        time.sleep(2)  # what was killed is gone by then
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


def kill_9(**victims: str) -> Callable[[Job], None]:
    """Return a fault: of each host, a process is killed, all at once."""

    def strike(job: Job) -> None:
        with ExitStack() as stack:
            kills = [
                stack.enter_context(at_hand(job, host, f"pkill -9 -u spark -f {process}"))
                for host, process in victims.items()
            ]
            for kill in kills:
                kill()

    return strike


an_executor_and_a_python_worker = kill_9(
    worker1="CoarseGrainedExecutorBackend", worker2="pyspark.daemon"
)
a_worker = kill_9(worker1="deploy.worker.Worker")

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


def the_master_which_is_slow_to_return(job: Job) -> None:
    on(job.rehearsal, "master", SLOW_RETURN)


def a_cable_for_half_a_minute(job: Job) -> None:
    job.machines.cut("worker1")
    time.sleep(30)
    job.machines.mend("worker1")


def a_cable_for_good(job: Job) -> None:
    job.machines.cut("worker1")


def power(job: Job) -> None:
    job.machines.kill("worker1")


@pytest.fixture
def mended(converged: Rehearsal) -> Iterator[None]:
    """Afterwards the first worker has its cable and its power."""
    yield
    converged.machines.mend("worker1")
    converged.machines.start("worker1")


def test_one_job_survives_one_loss_after_the_other(job: Job, mended: None) -> None:
    # Far away, images take their time: the job is still at them when the last loss comes.
    with job.s3(Behaviour(delay=8, slow_path=f"/{BUCKET}/images")) as (conf, proxy):
        job.survives(
            an_executor_and_a_python_worker,
            a_worker,
            the_master_which_is_slow_to_return,
            a_cable_for_half_a_minute,
            lambda _: (a_cable_for_good(job), proxy.hurry()),
            conf=conf,
        )
    assert proxy.gets > 600  # some were read again


@pytest.mark.soak
@pytest.mark.parametrize(
    "loss",
    [
        an_executor_and_a_python_worker,
        a_worker,
        the_master_which_is_slow_to_return,
        a_cable_for_half_a_minute,
        a_cable_for_good,
        power,
    ],
)
def test_a_job_survives_each_loss_by_itself(
    job: Job, mended: None, loss: Callable[[Job], object]
) -> None:
    job.survives(loss)


def test_a_driver_killed_on_a_bad_day_of_s3_and_the_job_started_again(job: Job) -> None:
    with job.s3(Behaviour(refused=0.05, hung=0.005)) as (conf, proxy):
        running = job.work.start(job.output, conf)
        store = open_store(Address(BUCKET, job.output), job.rehearsal.s3)

        def features_are_committed() -> bool:
            # The first entry of the log makes the table, the second has rows.
            return any(entry.key.endswith("1.json") for entry in store.list("features/"))

        kill = "pkill -9 -u analyst -f 'pipeline run'; pkill -9 -u analyst java; true"
        with at_hand(job, "master", kill) as kill_it:
            assert eventually(features_are_committed), running.communicate(timeout=60)
            kill_it()
        running.communicate(timeout=SECONDS)
        assert store.read("run.json") is None
        job.work.run(job.output, conf)
    assert proxy.refused
    assert proxy.hung
    assert job.work.report(job.output)["counts"]["computed"] == 0
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
