"""What the tests of the cluster share: how they look at hosts, start jobs and read results."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.master import page_token
from pipeline.storage import Address, open_store
from tests.hosts.commands import unfit
from tests.hosts.machines import Machines
from tests.hosts.rehearsal import BUCKET, Rehearsal

SERVICES = {
    "master": [
        "spark-master", "spark-history", "jupyterlab", "fruits-prometheus", "fruits-node-exporter",
    ],
    "worker1": ["spark-worker", "fruits-node-exporter"],
    "worker2": ["spark-worker", "fruits-node-exporter"],
}  # fmt: skip
COMPONENTS = 8


@contextmanager
def hosts_of(
    folder: Path, *, tag: str, subnet: str, suite: str = "bookworm"
) -> Iterator[Rehearsal]:
    """Give hosts a folder and addresses of their own; see that nothing of them is left."""
    if reason := unfit():
        pytest.skip(f"needs hosts of its own: {reason}")
    machines = Machines(folder / "hosts", tag=tag, subnet=subnet, suite=suite)
    with Rehearsal(folder, machines) as rehearsal:
        yield rehearsal
    assert machines.leftovers() == []


def recap(output: str) -> dict[str, dict[str, int]]:
    """Read Ansible's closing table: counts by host."""
    lines = re.findall(r"^(\S+)\s+: (ok=.*)$", output, re.MULTILINE)
    return {
        host: {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", counts)}
        for host, counts in lines
    }


def changed(run: subprocess.CompletedProcess[str]) -> dict[str, int]:
    return {host: counts["changed"] for host, counts in recap(run.stdout).items()}


def on(rehearsal: Rehearsal, host: str, command: str, check: bool = True) -> str:
    """Run a command as root on a host and return what it prints."""
    run = rehearsal.machines.run(host, f"sudo sh -c {shlex.quote(command)}", check=check)
    return run.stdout


def secrets_of(rehearsal: Rehearsal) -> dict[str, str]:
    """Return every secret of the cluster by its name."""
    kept = {file.name: file.read_text().strip() for file in rehearsal.secrets.iterdir()}
    token = page_token(kept["pages"])
    return {**kept, "token": token, "s3": str(rehearsal.s3.secret_key)}


def workers_alive(rehearsal: Rehearsal, idle: bool = False) -> list[str]:
    """Return the addresses of the workers that the master knows to be alive, or alive and idle."""
    script = (
        "from pathlib import Path; from pipeline.cluster.master import *; "
        "key = read_settings_of(Path('/etc/fruits/spark/spark-defaults.conf'))[PAGE_KEY]; "
        "all = registered_workers('http://127.0.0.1:8080', page_token(key)); "
        f"print(*[w['host'] for w in all if not ({idle} and w['coresused'])])"
    )
    command = f"/opt/fruits/bin/python -c {shlex.quote(script)}"
    return on(rehearsal, "master", command, check=False).split()


# --- jobs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The images on the hosts' S3, and the options that name the network."""

    rehearsal: Rehearsal
    images: Address
    network: tuple[str, ...]

    def start(self, output: str, conf: str = "/etc/fruits/spark") -> subprocess.Popen[str]:
        """Start the job as the analyst on the master; its output is read when it ends."""
        options = shlex.join([*self.network, "--components", str(COMPONENTS)])
        job = (
            "cd /var/lib/fruits/analyst; . /etc/profile.d/fruits.sh; "
            f"HOME=$PWD SPARK_CONF_DIR={conf} exec /usr/local/bin/fruits run "
            f"{self.images} s3a://{BUCKET}/{output} {options}"
        )
        ssh = ["ssh", "-F", str(self.rehearsal.machines.hosts["master"].ssh_config), "master"]
        return subprocess.Popen(
            [*ssh, f"sudo -u analyst sh -c {shlex.quote(job)}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, output: str, conf: str = "/etc/fruits/spark") -> str:
        """Run the job to its end and return what it said."""
        return finish(self.start(output, conf))

    def report(self, output: str) -> dict:
        """Return a run's run.json."""
        return json.loads(self._read(output, "run.json"))

    def matrix(self, output: str) -> Matrix:
        """Return a run's matrix."""
        return read_matrix(self._read(output, "matrix.csv").decode())

    def _read(self, output: str, name: str) -> bytes:
        content = open_store(Address(BUCKET, output), self.rehearsal.s3).read(name)
        assert content, f"no {name} in {output}"
        return content


def finish(job: subprocess.Popen[str]) -> str:
    told, _ = job.communicate(timeout=1200)
    assert job.returncode == 0, told[-3000:]
    return told


@dataclass(frozen=True)
class Matrix:
    """Paths, and the images' scores: (images, COMPONENTS)."""

    paths: list[str]
    scores: np.ndarray

    def assert_equals(self, other: Matrix) -> None:
        assert self.paths == other.paths
        np.testing.assert_allclose(self.scores, other.scores, rtol=0, atol=1e-4)


def read_matrix(content: str) -> Matrix:
    rows = sorted(csv.DictReader(io.StringIO(content)), key=lambda row: row["path"])
    names = [f"pc_{number}" for number in range(1, COMPONENTS + 1)]
    scores = [[float(row[name]) for name in names] for row in rows]
    return Matrix([row["path"] for row in rows], np.array(scores))
