"""What an admin does to a cluster that is used: a change while a job runs, growth, the end."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.cluster import SERVICES, changed, on, secrets_of, workers_alive
from tests.hosts.rehearsal import REPOSITORY, Rehearsal
from tests.waiting import SECONDS, eventually

pytestmark = pytest.mark.timeout(1800)

PYTHON = "/opt/fruits/bin/python"


# An application that goes from round to round, with a shuffle in each, until it is told to stop.
ROUNDS = """
import time
from pathlib import Path
from pipeline.engine.session import make_session
context = make_session("rounds").sparkContext
rounds = 0
def pair(number):
    time.sleep(0.2)
    return number % 5, 1
while not Path("/tmp/enough").exists():
    counts = context.parallelize(range(40), 40).map(pair).reduceByKey(int.__add__, 5).collect()
    assert sorted(counts) == [(number, 8) for number in range(5)], counts
    rounds += 1
    print("round", rounds, flush=True)
"""


@pytest.fixture(scope="class")
def rounds(converged: Rehearsal) -> Iterator[subprocess.Popen[str]]:
    """The application, at work; after all that is done meanwhile it must still be, and end well."""
    job = f". /etc/profile.d/fruits.sh; exec {PYTHON} -c {shlex.quote(ROUNDS)}"
    ssh = ["ssh", "-F", str(converged.machines.hosts["master"].ssh_config), "master"]
    running = subprocess.Popen(
        [*ssh, f"cd /; sudo -u analyst sh -c {shlex.quote(job)}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout
    assert running.stdout.readline() == "round 1\n"
    try:
        yield running
        assert running.poll() is None
    finally:
        on(converged, "master", "touch /tmp/enough")
        running.communicate(timeout=SECONDS)
        on(converged, "master", "rm /tmp/enough")
    assert running.returncode == 0


def starts(rehearsal: Rehearsal) -> dict[str, str]:
    """Return when Spark was started on each host."""
    property_of = "systemctl show --property ExecMainStartTimestampMonotonic --value"
    return {
        host: on(rehearsal, host, f"{property_of} {services[0]}")
        for host, services in SERVICES.items()
    }


@pytest.fixture
def a_start_that_fails(converged: Rehearsal) -> Iterator[str]:
    """The master's next start ends with an error, as when it counts slots wrongly.

    Yields the path of a file that is there until that has happened.
    """
    once, drop_in = "/run/once", "/etc/systemd/system/spark-master.service.d"
    fails = f"[Service]\nExecStartPost=+/bin/sh -c 'test ! -e {once} || ! rm {once}'\n"
    lay = f"touch {once}; mkdir {drop_in}; printf %s {shlex.quote(fails)} >{drop_in}/once.conf"
    on(converged, "master", f"{lay}; systemctl daemon-reload")
    yield once
    on(converged, "master", f"rm -rf {drop_in} {once}; systemctl daemon-reload")


# From outside: a login at the door, then where the launcher's entry for the running job leads.
ENTRY = """
import json, sys, time, requests, urllib3
urllib3.disable_warnings()
door, password = sys.argv[1], sys.stdin.read()
browser = requests.Session()
browser.verify = False
browser.trust_env = False
browser.get(f"{door}/login")
browser.post(f"{door}/login", data={"password": password, "_xsrf": browser.cookies["_xsrf"]})
ask = lambda: browser.get(f"{door}/running-application/", allow_redirects=False)
while (entry := ask()).status_code == 503:
    time.sleep(1)  # it asks for that: the master has no time to answer
to = entry.headers["Location"]
page, environment = browser.get(f"{door}{to}"), browser.get(f"{door}{to}environment/")
print(json.dumps({"to": to, "page": page.text, "environment": environment.text,
                  "status": page.status_code}))
"""


@pytest.fixture
def running_application(converged: Rehearsal, rounds: object) -> dict[str, Any]:
    """Where the launcher's entry leads, the page there, and the environment page behind it."""
    door = f"https://{converged.machines.hosts['master'].address}:8443"
    converged.machines.outsider()
    outside = ["ip", "netns", "exec", converged.machines.network.namespace("outsider")]
    run = subprocess.run(
        [*outside, sys.executable, "-c", ENTRY, door],
        input=(converged.secrets / "password").read_text().strip(),
        text=True,
        capture_output=True,
        check=True,
        timeout=SECONDS,
    )
    return json.loads(run.stdout)


@pytest.fixture
def new_code(tmp_path: Path) -> Path:
    """A copy of the project in which a file of the pipeline has changed."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("ansible", "pipeline", "notebooks", "README.md", "LICENSE", "pyproject.toml"):
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(
            REPOSITORY / name, copy / name
        )
    for file in (*REPOSITORY.glob("*.lock"), REPOSITORY / "ansible.cfg"):
        shutil.copy(file, copy)
    changed_file = copy / "pipeline/local/ports.py"
    changed_file.write_text(f"{changed_file.read_text()}NEW = True\n")
    return copy


class TestAnApplicationGoesOn:
    """One application, from before the change to after the restart."""

    def test_while_new_code_and_a_change_of_settings_roll_through(
        self, converged: Rehearsal, rounds: object, new_code: Path
    ) -> None:
        # A run was cut off after it had written the settings of two hosts and before any restart.
        written = r"sed -i -E 's/^(spark.port.maxRetries +)16$/\117/'"
        for host in ("master", "worker1"):
            on(converged, host, f"{written} /etc/fruits/spark/spark-defaults.conf")
        before = starts(converged)
        environment = on(converged, "worker1", "ls -i /opt/fruits/environments")
        content = yaml.safe_load(converged.inventory.read_text())
        content["all"]["vars"] |= {"cluster_port_tries": 17, "cluster_metrics": False}
        converged.inventory.write_text(yaml.safe_dump(content))  # from here on, for all tests below
        play = converged.play("upgrade.yml", quiet=True, repository=new_code)
        assert all(count > 0 for host, count in changed(play).items() if host != "localhost")
        after = starts(converged)
        assert all(before[host] != after[host] for host in SERVICES)
        # The release has the new code, the environment below it and the release before are kept.
        has_new_code = "from pipeline.local.ports import NEW"
        for host in SERVICES:
            on(converged, host, f"{PYTHON} -c {shlex.quote(has_new_code)}")
            assert len(on(converged, host, "ls /opt/fruits/releases").split()) == 2
        assert on(converged, "worker1", "ls -i /opt/fruits/environments") == environment
        for host in SERVICES:  # metrics have been turned off
            assert (
                on(converged, host, "ls /etc/systemd/system | grep -cE 'prometheus|exporter'; true")
                == "0\n"
            )
            assert on(converged, host, "pgrep prometheus", check=False) == ""

    def test_the_launcher_leads_to_it_and_its_page_tells_no_secret(
        self, converged: Rehearsal, running_application: dict[str, Any]
    ) -> None:
        assert re.fullmatch(r"/spark/proxy/app-[0-9]+-[0-9]+/", running_application["to"])
        assert running_application["status"] == 200
        assert "rounds" in running_application["page"]
        environment = running_application["environment"]
        assert "spark.authenticate.secret" in environment
        for name, secret in secrets_of(converged).items():
            assert secret not in environment, name

    def test_while_everything_is_restarted(
        self, converged: Rehearsal, rounds: object, a_start_that_fails: str
    ) -> None:
        play = converged.play("restart.yml", quiet=True)
        assert "busy with rounds: no job was run in the slots" in play.stdout
        assert on(converged, "master", f"ls {a_start_that_fails}", check=False) == ""


def test_a_check_of_metrics_that_are_yet_to_come_passes(converged: Rehearsal) -> None:
    play = converged.play("configure.yml", "--check", "-e", "cluster_metrics=true", quiet=True)
    assert "Write the files of fruits-node-exporter" in play.stdout
    assert on(converged, "master", "ls /etc/systemd/system | grep exporter", check=False) == ""


def test_root_follows_no_link_that_the_analyst_has_laid(converged: Rehearsal) -> None:
    home = "/var/lib/fruits/analyst"
    for folder in (".scratch", "notebooks"):
        lay = f"cd {home} && mv {folder} kept && ln -s /etc {folder}"
        on(converged, "master", f"sudo -u analyst sh -c '{lay}'")
        before = on(converged, "master", "stat -c '%U %a' /etc; ls /etc")
        try:  # as each boot does, and each run of the playbooks that has folders to make
            make = "systemd-tmpfiles --create /etc/tmpfiles.d/fruits.conf 2>&1; true"
            told = on(converged, "master", make)
            on(converged, "master", "systemctl restart jupyterlab", check=False)
        finally:
            mend = f"cd {home} && rm {folder} && mv kept {folder}"
            on(converged, "master", f"sudo -u analyst sh -c '{mend}'")
        assert f"{home}/{folder}" in told  # it says what is in the way
        assert on(converged, "master", "stat -c '%U %a' /etc; ls /etc") == before


def test_a_worker_leaves_after_handing_over(converged: Rehearsal) -> None:
    converged.play("scale.yml", "-e", "leave=worker2")
    assert eventually(lambda: len(workers_alive(converged)) == 1)
    gone, stays = (converged.machines.hosts[name].address for name in ("worker2", "worker1"))
    for host in ("master", "worker1"):
        members = on(converged, host, "nft list set inet fruits members")
        assert stays in members
        assert gone not in members


def test_a_worker_is_brought_in(converged: Rehearsal, new_code: Path) -> None:
    play = converged.play("scale.yml", quiet=True, repository=new_code)
    assert changed(play)["worker1"] == 2  # the firewall's file, and that it was read
    assert eventually(lambda: len(workers_alive(converged)) == 2)
    for host in ("master", "worker1"):
        members = on(converged, host, "nft list set inet fruits members")
        assert converged.machines.hosts["worker2"].address in members


def test_a_cluster_in_use_is_not_reset_by_mistake(converged: Rehearsal) -> None:
    run = converged.play("reset.yml", "-e", "reset=another", check=False, quiet=True)
    assert run.returncode != 0
    assert "-e reset=rehearsal" in re.sub(r"\s+", " ", run.stdout)
    assert eventually(lambda: len(workers_alive(converged)) == 2)


def test_a_reset_leaves_plain_hosts(converged: Rehearsal) -> None:
    converged.play("reset.yml", "-e", "reset=rehearsal")
    for host in converged.machines.hosts:
        left = (
            "ls -d /opt/fruits /etc/fruits /var/lib/fruits /run/fruits /etc/*.d/fruits.conf "
            "/etc/systemd/system/*spark* /etc/systemd/system/fruits-*"
        )
        assert on(converged, host, left, check=False) == ""
        assert on(converged, host, "getent passwd spark analyst spark-history", check=False) == ""
        assert on(converged, host, "nft list tables", check=False).strip() == ""
