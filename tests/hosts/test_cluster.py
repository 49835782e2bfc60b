"""The playbooks, run on real hosts over SSH, and the cluster that they make, from all sides."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.hosts.cluster import SERVICES, changed, on, secrets_of, workers_alive
from tests.hosts.conftest import FIRST_CHECK, FIRST_RUN, LEFT
from tests.hosts.rehearsal import Rehearsal
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(2400)

DOOR = 8443


# --- an inventory is refused before any host is touched ---------------------------------------


def inventory_with(rehearsal: Rehearsal, folder: Path, **changes: object) -> Path:
    content = yaml.safe_load(rehearsal.inventory.read_text())
    content["all"]["vars"] |= changes.pop("variables", {})
    content["all"]["children"] |= changes
    file = folder / "inventory.yml"
    file.write_text(yaml.safe_dump(content))
    return file


def refusal(rehearsal: Rehearsal, *arguments: str, **options: Path) -> str:
    """Run configure.yml, which must end before any host is touched; return what it said."""
    run = rehearsal.play("configure.yml", *arguments, check=False, quiet=True, **options)
    assert run.returncode != 0
    assert not any(changed(run).values())
    return re.sub(r"\s+", " ", run.stdout + run.stderr)


INVENTORIES = [
    ({"master": {"hosts": {}}}, "Expected exactly one host in the group `master`, found none"),
    ({"workers": {"hosts": {}}}, "Expected at least one host in the group `workers`"),
]
SETTINGS = [
    ({"cluster_bukket": "x"}, "found cluster_bukket"),
    ({"cluster_bucket": "No_Bucket"}, "Expected the name of a bucket"),
    ({"cluster_rpc_secret": "short"}, "Expected `cluster_rpc_secret` of 32"),
    ({"cluster_door_port": 7077}, "Expected ports from 1 to 65535, each used"),
    ({"cluster_door_sources": ["everyone"]}, "Expected networks such as"),
    ({"cluster_s3_secret_key": ""}, "with `cluster_s3_endpoint`"),
    ({"cluster_spark_settings": {"executor": 1}}, "Expected names such as"),
    ({"cluster_tls_key": "key.pem"}, "together, found one of them"),
]
CHANGES = [*INVENTORIES, *(({"variables": settings}, says) for settings, says in SETTINGS)]
ONE_OF_EACH_KIND = (0, 2, 3)  # groups, names, values; the others take as long


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(*one, marks=[] if number in ONE_OF_EACH_KIND else pytest.mark.soak)
        for number, one in enumerate(CHANGES)
    ],
)
def test_a_bad_inventory_is_refused_before_any_host_is_touched(
    converged: Rehearsal, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    said = refusal(converged, inventory=inventory_with(converged, tmp_path, **changes))
    assert says in said
    assert "Look at the host" not in said


def test_a_host_that_is_too_small_is_refused_with_the_smallest_that_fits(
    converged: Rehearsal,
) -> None:
    assert "t3.medium" in refusal(converged, "-e", "cluster_smallest_memory_mb=1000000")


# --- check, converge, and again ---------------------------------------------------------------


def test_a_check_of_fresh_hosts_changes_nothing(converged: Rehearsal) -> None:
    said = (converged.folder / FIRST_CHECK).read_text()
    assert "A run without --check installs and starts everything" in said
    assert (converged.folder / LEFT).read_text() == ""


def test_a_second_run_changes_nothing(converged: Rehearsal) -> None:
    run = converged.play("configure.yml", quiet=True)
    assert set(changed(run).values()) == {0}, run.stdout[-3000:]


def test_a_check_of_a_configured_cluster_finds_nothing_to_change(converged: Rehearsal) -> None:
    run = converged.play("configure.yml", "--check", quiet=True)
    assert set(changed(run).values()) == {0}, run.stdout[-3000:]


def test_the_cluster_is_healthy(converged: Rehearsal) -> None:
    run = converged.play("check.yml", quiet=True)
    for name in ("worker1", "worker2"):
        assert f"{converged.machines.hosts[name].address}" in run.stdout
    assert "read it back: well" in run.stdout


def test_an_unhealthy_cluster_is_told_with_what_to_look_at(converged: Rehearsal) -> None:
    on(converged, "worker2", "systemctl stop spark-worker")
    run = converged.play("check.yml", check=False, quiet=True)
    on(converged, "worker2", "systemctl start spark-worker")
    assert run.returncode != 0
    assert "Expected spark-worker to run on worker2" in re.sub(r"\s+", " ", run.stdout)
    assert eventually(lambda: len(workers_alive(converged)) == 2)


def test_workers_carry_neither_tensorflow_nor_jupyterlab(converged: Rehearsal) -> None:
    for worker in ("worker1", "worker2"):
        folder = "/opt/fruits/environments/*/venv/lib/python3*/site-packages"
        packages = on(converged, worker, f"ls {folder}")
        assert "pyspark" in packages
        assert not {"tensorflow", "jupyterlab", "boto3"} & set(packages.split())


# --- from outside -----------------------------------------------------------------------------


# Every port of every address is given the same three seconds to answer, however slow the machine
# that asks.
SCAN = """
import errno, itertools, resource, select, socket, sys, time
resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))
targets = itertools.product(sys.argv[1:], range(1, 65536))
while batch := list(itertools.islice(targets, 9000)):
    asked = select.poll()
    sockets = {}
    for target in batch:
        one = socket.socket()
        one.setblocking(False)
        assert one.connect_ex(target) == errno.EINPROGRESS
        asked.register(one, select.POLLOUT)
        sockets[one.fileno()] = one, target
    time.sleep(3)
    for number, _ in asked.poll(0):
        one, target = sockets[number]
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            print(*target)
    for one, _ in sockets.values():
        one.close()
"""


def outside(rehearsal: Rehearsal, *command: str, check: bool = True) -> str:
    rehearsal.machines.outsider()
    return rehearsal.machines.run_outside(*command, check=check).stdout


def test_from_outside_only_ssh_and_the_door_answer(converged: Rehearsal) -> None:
    master, worker = (converged.machines.hosts[name].address for name in ("master", "worker1"))
    found = outside(converged, sys.executable, "-c", SCAN, master, worker)
    assert sorted(found.split("\n")[:-1]) == [
        *(f"{master} 22", f"{master} {DOOR}"),
        f"{worker} 22",
    ]


def test_a_hosts_metrics_are_for_the_master_only(converged: Rehearsal) -> None:
    worker = converged.machines.hosts["worker1"].address
    probe = f"bash -c 'exec 3<>/dev/tcp/{worker}/9100'"
    assert converged.machines.run("master", f"timeout 60 {probe}", check=False).returncode == 0
    assert converged.machines.run("worker2", f"timeout 2 {probe}", check=False).returncode != 0


def ask(
    rehearsal: Rehearsal, path: str, scheme: str = "https", method: str = "GET"
) -> tuple[int, str]:
    """Ask the door from outside, without a login and without following redirects."""
    address = rehearsal.machines.hosts["master"].address
    script = """
import ssl, sys, http.client
scheme, address, port, method, path = sys.argv[1:]
context = ssl._create_unverified_context()
kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
options = {"context": context} if scheme == "https" else {}
connection = kind(address, int(port), timeout=60, **options)
try:
    connection.request(method, path)
    answer = connection.getresponse()
    print(answer.status, answer.getheader("Location", ""), answer.read().decode(errors="replace"))
except (OSError, http.client.HTTPException) as error:
    print(0, type(error).__name__)
"""
    told = outside(
        rehearsal, sys.executable, "-c", script, scheme, address, str(DOOR), method, path
    )
    status, _, rest = told.partition(" ")
    return int(status), rest


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/lab",
        "/spark/",
        "/spark/json/",
        "/spark-history/",
        "/proxy/8080/",
        "/api/contents",
        "/prometheus/",
    ],
)
def test_without_a_login_the_door_shows_nothing(converged: Rehearsal, path: str) -> None:
    status, told = ask(converged, path)
    assert status in (302, 403)
    assert "Spark" not in told
    assert "worker" not in told.lower()


def test_a_worker_cannot_be_ended_without_a_login(converged: Rehearsal) -> None:
    status, _ = ask(converged, "/spark/workers/kill/?host=worker1", method="POST")
    assert status == 403
    assert eventually(lambda: len(workers_alive(converged)) == 2)


def test_plain_http_shows_nothing(converged: Rehearsal) -> None:
    status, told = ask(converged, "/", scheme="http")
    assert status == 0, told


def test_the_masters_page_wants_the_doors_key_even_on_the_master(converged: Rehearsal) -> None:
    script = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/json/')"
    run = converged.machines.run("master", f"python3 -c {shlex.quote(script)}", check=False)
    assert "403" in run.stderr


# --- secrets ----------------------------------------------------------------------------------


def test_no_secret_is_in_a_journal_a_process_list_or_a_file_for_everyone(
    converged: Rehearsal, undisturbed: object
) -> None:
    pattern = "|".join(map(re.escape, secrets_of(converged).values()))
    # Not an argument of grep: sudo would write it into the journal that is searched.
    search = (
        "umask 077; cat >/root/pattern; "
        "find /etc /opt/fruits/environments/*/complete /opt/fruits/releases /opt/fruits/bin "
        "/var /run /tmp /home /root "
        "-xdev -type f -perm -004 -size -20M -print0 | xargs -0 grep -lEf /root/pattern --; "
        "rm /root/pattern"
    )
    command = f"sudo sh -c {shlex.quote(search)}"
    for host in SERVICES:
        assert not re.search(pattern, on(converged, host, "journalctl --no-pager"))
        assert not re.search(
            pattern, on(converged, host, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        )
        readable = subprocess.run(
            ["ssh", "-F", str(converged.machines.hosts[host].ssh_config), host, command],
            input=pattern,
            text=True,
            capture_output=True,
            check=False,
        )
        assert readable.stdout == ""


def test_ansible_tells_no_secret_however_much_it_is_asked_to_tell(converged: Rehearsal) -> None:
    told = (converged.folder / FIRST_RUN).read_text()
    assert "TASK [node : Write the files of spark-master]" in told
    for name, secret in secrets_of(converged).items():
        assert secret not in told, name


@pytest.mark.parametrize("host", sorted(SERVICES))
def test_services_are_confined(converged: Rehearsal, host: str) -> None:
    for service in [*SERVICES[host], "fruits-firewall"]:
        told = on(converged, host, f"systemd-analyze security --no-pager {service} | tail -1")
        exposure = re.search(r"([0-9.]+) \w+", told)
        assert exposure, told
        assert float(exposure[1]) <= 3.0, f"{service}: {told}"


def test_a_process_that_takes_too_much_memory_does_not_stop_its_worker(
    converged: Rehearsal,
) -> None:
    policy = on(converged, "worker1", "systemctl show --property OOMPolicy --value spark-worker")
    assert policy.strip() == "continue"


def test_an_application_without_the_secret_is_refused(converged: Rehearsal) -> None:
    script = (
        "umask 077; mkdir /tmp/stranger; trap 'rm -r /tmp/stranger' EXIT; cd /tmp; "
        "sed 's/^spark.authenticate.secret .*/spark.authenticate.secret wrongwrongwrongwrong/' "
        "/etc/fruits/spark/spark-defaults.conf > stranger/spark-defaults.conf; "
        ". /etc/profile.d/fruits.sh; SPARK_CONF_DIR=/tmp/stranger "
        "timeout 60 /opt/fruits/bin/python -m pipeline.cluster.health "
        "http://127.0.0.1:8080 2>&1"
    )
    run = converged.machines.run("master", f"sudo sh -c {shlex.quote(script)}", check=False)
    assert run.returncode != 0
    assert "read it back: well" not in run.stdout
