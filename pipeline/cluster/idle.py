"""Sees whether anybody uses the cluster, and stops it on EC2 when nobody has for some hours.

    python -m pipeline.cluster.idle look SETTINGS     what goes on, for people
    python -m pipeline.cluster.idle watch SETTINGS    look again and again, on the master

SETTINGS is a JSON file that the playbooks write; `Watch` says what is in it.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.cluster.master import PAGE_KEY, master_state, page_token, registered_workers
from pipeline.engine.session import read_settings_of

ESTABLISHED, SSH = "01", 22


@dataclass(frozen=True)
class Use:
    """Something that uses the cluster, and when it last did (seconds since 1970)."""

    what: str
    at: float


@dataclass(frozen=True)
class Watch:
    """What to look at, and for how long nothing may go on.

    Parameters
    ----------
    cluster, region
        Whose instances are stopped.
    hours
        How long the cluster may be idle.
    seconds_between
        How often to look.
    page
        The master's page on this host.
    spark_settings
        The cluster's spark-defaults.conf, which has the key to the page.
    jupyter_runtime
        The folder in which JupyterLab says where it is, and how to ask it.
    connections
        The kernel's tables of TCP connections.
    """

    cluster: str
    region: str
    hours: float
    seconds_between: float
    page: str
    spark_settings: str
    jupyter_runtime: str
    connections: tuple[str, ...] = ("/proc/net/tcp", "/proc/net/tcp6")

    def uses(self) -> Iterator[Use]:
        """Yield all that uses the cluster; what cannot be asked counts as in use."""
        for ask in (self.applications, self.notebooks, self.logins):
            try:
                yield from ask()
            except (OSError, ValueError, KeyError) as error:
                yield Use(f"cannot ask for {ask.__name__}: {error}", time.time())

    def applications(self) -> Iterator[Use]:
        """Yield Spark's applications: one that is only held open by an idle notebook grows old."""
        token = self._page_token()
        headers = {"Authorization": f"Bearer {token}"}
        for application in master_state(self.page, token)["activeapps"]:
            name, number = application["name"], application["id"]
            api = f"{self.page}/proxy/{number}/api/v1/applications/{number}/jobs"
            jobs = _get(api, headers)
            running = any(job["status"] == "RUNNING" for job in jobs)
            ends = [_seconds(job["completionTime"]) for job in jobs if "completionTime" in job]
            at = time.time() if running else max([application["starttime"] / 1000, *ends])
            yield Use(f"application {name} ({'running' if running else 'between jobs'})", at)

    def notebooks(self) -> Iterator[Use]:
        """Yield JupyterLab's kernels and terminals."""
        for file in Path(self.jupyter_runtime).glob("jpserver-*.json"):
            server = json.loads(file.read_text())
            if not Path(f"/proc/{server['pid']}").exists():
                continue
            address = f"https://127.0.0.1:{server['port']}{server['base_url']}"
            headers = {"Authorization": f"token {server['token']}"}
            for kernel in _get(f"{address}api/kernels", headers):
                busy = kernel["execution_state"] == "busy"
                at = time.time() if busy else _seconds(kernel["last_activity"])
                yield Use(f"kernel {kernel['name']} ({kernel['execution_state']})", at)
            for terminal in _get(f"{address}api/terminals", headers):
                yield Use(f"terminal {terminal['name']}", _seconds(terminal["last_activity"]))

    def logins(self) -> Iterator[Use]:
        """Yield the SSH connections to this host."""
        for table in self.connections:
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == SSH:
                    yield Use("SSH session", time.time())

    def workers(self) -> list[str]:
        """Say which workers the master knows."""
        return [
            f"worker {one['host']}: {one['coresused']} of {one['cores']} slots in use"
            for one in registered_workers(self.page, self._page_token())
        ]

    def _page_token(self) -> str:
        return page_token(read_settings_of(Path(self.spark_settings))[PAGE_KEY])

    def in_words(self) -> list[str]:
        """Say what uses the cluster, and when it last did."""
        uses = list(self.uses())
        return [f"{use.what}, {(time.time() - use.at) / 60:.0f} min ago" for use in uses] or [
            "nobody uses the cluster"
        ]

    def run(self, ec2: Any) -> None:
        """Look until the cluster has been idle for long enough, then stop it."""
        last = time.time()
        while True:
            looked = time.time()  # to look takes a while, too
            uses = list(self.uses())
            last = max([last, *(use.at for use in uses)])
            if looked - last >= self.hours * 3600:
                sys.stderr.write(f"idle for {self.hours:g} hours: stopping {self.cluster}\n")
                stop(ec2, self.cluster)
                return
            time.sleep(self.seconds_between)


def stop(ec2: Any, cluster: str) -> None:
    """Stop a cluster's instances, the master last; spot workers cannot be stopped and end.

    Parameters
    ----------
    ec2
        A client of EC2.
    """
    wanted = [
        {"Name": "tag:Cluster", "Values": [cluster]},
        {"Name": "instance-state-name", "Values": ["pending", "running"]},
    ]
    found: dict[str, list[str]] = {"spot": [], "worker": [], "master": []}
    for page in ec2.get_paginator("describe_instances").paginate(Filters=wanted):
        for reservation in page["Reservations"]:
            for one in reservation["Instances"]:
                tags = {tag["Key"]: tag["Value"] for tag in one["Tags"]}
                kind = "spot" if tags.get("Market") == "spot" else tags["Role"]
                found[kind].append(one["InstanceId"])
    if found["spot"]:
        ec2.terminate_instances(InstanceIds=found["spot"])
    for role in ("worker", "master"):
        if found[role]:
            ec2.stop_instances(InstanceIds=found[role])


def _get(address: str, headers: Mapping[str, str]) -> Any:
    # The certificate is this host's own, and loopback leads nowhere else.
    context = ssl._create_unverified_context() if address.startswith("https:") else None  # noqa: S323
    request = urllib.request.Request(address, headers=dict(headers))  # noqa: S310
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310
        return json.load(answer)


def _seconds(text: str) -> float:
    """Read a time as JupyterLab (2026-01-31T12:00:00.5Z) or Spark (...500GMT) writes it."""
    return datetime.fromisoformat(text.replace("GMT", "Z")).astimezone(UTC).timestamp()


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["look", settings]:
            watch = Watch(**json.loads(Path(settings).read_text()))
            sys.stdout.write("\n".join([*watch.workers(), *watch.in_words()]) + "\n")
        case ["watch", settings]:
            import boto3

            watch = Watch(**json.loads(Path(settings).read_text()))
            watch.run(boto3.client("ec2", region_name=watch.region))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
