"""What a notebook's application does for others: it shares, gives back, and stops when told to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import pytest
from jupyter_client import KernelManager
from jupyter_client.blocking import BlockingKernelClient

from pipeline.cluster.master import master_state
from pipeline.errors import ClusterError
from pipeline.local.loopback import Loopback
from pipeline.present.notebook import SMALLEST_EXECUTOR_MB, connect, share_of
from tests.waiting import eventually

WORKERS = [{"cores": 4, "memory": 6000}, {"cores": 4, "memory": 5000}]


def test_a_share_is_of_all_cores_and_of_the_smallest_workers_memory() -> None:
    assert share_of(WORKERS, 0.5) == {
        "spark.cores.max": "4",
        "spark.executor.memory": "2500m",
    }
    assert share_of(WORKERS, 1)["spark.cores.max"] == "8"
    least = share_of(WORKERS, 0.01)
    assert least == {
        "spark.cores.max": "1",
        "spark.executor.memory": f"{SMALLEST_EXECUTOR_MB}m",
    }


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        share_of(WORKERS, share)


def test_without_workers_or_a_cluster_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="at least one worker"):
        share_of([], 0.5)
    monkeypatch.delenv("SPARK_CONF_DIR", raising=False)
    with pytest.raises(ClusterError, match="make lab"):
        connect()


CONNECT = """
import sys, time
import pipeline.present.notebook as notebook
notebook.GIVE_BACK["spark.dynamicAllocation.executorIdleTimeout"] = "3s"
spark = notebook.connect(name={name!r})
def slow(number):
    time.sleep(0.5)
    return number
def work(tasks):
    assert spark.sparkContext.parallelize(range(tasks), tasks).map(slow).sum() == sum(range(tasks))
"""

# Two jobs, with a pause between them in which the executors have nothing to do.
TWO_JOBS = """
for tasks in (60, 4):
    work(tasks)
    print("done", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def analyst(name: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CONNECT.format(name=name) + TWO_JOBS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ,
        text=True,
    ) as running:
        yield running


def cores_of(cluster: Loopback) -> dict[str, int]:
    try:
        applications = master_state(cluster.pages["master"])["activeapps"]
    except OSError:  # a master that has no time to answer is asked again
        return {}
    return {application["name"]: application["cores"] for application in applications}


def answer(client: BlockingKernelClient, message: str, seconds: float = 300) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            reply = client.get_shell_msg(timeout=5)
        except Empty:
            continue
        if reply["parent_header"].get("msg_id") == message:
            return dict(reply["content"])
    raise AssertionError(f"no answer within {seconds:.0f} s")


@pytest.fixture(scope="module")
def anne(cluster: Loopback) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    """A notebook that has connected itself."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=300)
    begun = answer(client, client.execute(CONNECT.format(name="anne")))
    assert begun["status"] == "ok", begun
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_two_notebooks_run_at_once_and_one_left_open_holds_no_core(
    cluster: Loopback, anne: tuple[KernelManager, BlockingKernelClient]
) -> None:
    def both_have(cores: int) -> bool:
        return cores_of(cluster).items() >= {"anne": cores, "bob": cores}.items()

    _, client = anne
    with analyst("bob") as bob:
        assert eventually(lambda: cores_of(cluster).get("bob") == 1), cores_of(cluster)
        running = client.execute("work(20)")
        assert eventually(lambda: both_have(1)), cores_of(cluster)
        assert answer(client, running)["status"] == "ok"
        assert bob.stdin
        assert bob.stdout
        while "done" not in (line := bob.stdout.readline()):
            assert line, "ended without a word"
        assert eventually(lambda: both_have(0)), cores_of(cluster)
        bob.stdin.write("go on\n")
        bob.stdin.flush()
        assert "done" in bob.stdout.readline()
        bob.kill()


# An interrupted Py4J has the JVM close all connections, and may lose the next one that it makes,
# too: the more there are, the likelier.
OTHER_CONNECTIONS = """
import threading
end = threading.Event()
def talk():
    spark.sparkContext._jsc.version()
    end.wait()
for _ in range(20):
    threading.Thread(target=talk, daemon=True).start()
"""


def test_an_interrupted_cell_ends_its_job_and_the_next_one_runs(
    cluster: Loopback, anne: tuple[KernelManager, BlockingKernelClient]
) -> None:
    manager, client = anne
    assert answer(client, client.execute(OTHER_CONNECTIONS))["status"] == "ok"
    slow = "spark.sparkContext.parallelize(range(4), 4).map(lambda n: time.sleep(100)).count()"
    running = client.execute(slow)
    # Executors come when a job asks for them: one that has a core tells that it runs.
    assert eventually(lambda: cores_of(cluster).get("anne") == 1), cores_of(cluster)
    manager.interrupt_kernel()
    stopped = answer(client, running)
    assert stopped["status"] == "error"
    assert "KeyboardInterrupt" in "\n".join(stopped["traceback"])
    after = (
        "deadline = time.monotonic() + 20\n"
        "tracker = spark.sparkContext.statusTracker()\n"
        "while tracker.getActiveJobsIds() and time.monotonic() < deadline: time.sleep(0.5)\n"
        "assert not tracker.getActiveJobsIds()\n"
        "assert spark.range(10).count() == 10"
    )
    done = answer(client, client.execute(after))
    assert done["status"] == "ok", done
