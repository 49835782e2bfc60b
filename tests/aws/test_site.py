"""From an empty account to a cluster that works, and back: `site.yml` and the verbs after it.

moto answers for AWS; an instance that it launches has the address of a host, which is reached over
SSH, configured and checked, and loses its power when the instance is terminated.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.storage import Address, BucketStore
from tests.aws.account import Account, Request, account, by_role, instances, tags, things
from tests.aws.admin import Admin
from tests.hosts.cluster import hosts_of, on, recap
from tests.hosts.rehearsal import BUCKET, SLOTS, SMALL_HOSTS, Rehearsal
from tests.hosts.snapshots import PACKS

pytestmark = pytest.mark.timeout(1800)

CLUSTER = "orchard"


class Hardware:
    """The hosts on which moto's instances run: the master's, and the workers' in their order."""

    def __init__(self, aws: Account, rehearsal: Rehearsal) -> None:
        self.aws, self.machines = aws, rehearsal.machines
        self.free = {"master": ["master"], "worker": ["worker1", "worker2", "worker3"]}
        self.host_of: dict[str, str] = {}
        aws.edit = self

    def __call__(self, request: Request, answer: bytes) -> bytes:
        """Give instances that are described the addresses of their hosts."""
        if request.action == "TerminateInstances":
            for name, instance in request.parameters.items():
                if name.startswith("InstanceId."):
                    self.machines.kill(self.host_of[instance])
        if request.action != "DescribeInstances":
            return answer
        document = ElementTree.fromstring(answer)
        space = document.tag.partition("}")[0] + "}"
        for item in document.iter(f"{space}item"):
            instance, address = item.find(f"{space}instanceId"), item.find(f"{space}ipAddress")
            if instance is not None and address is not None:
                address.text = self.machines.hosts[self._host(str(instance.text))].address
        return ElementTree.tostring(document)

    def _host(self, instance: str) -> str:
        if instance not in self.host_of:
            (found,) = [one for one in instances(self.aws) if one["InstanceId"] == instance]
            self.host_of[instance] = self.free[tags(found)["Role"]].pop(0)
        return self.host_of[instance]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with account(tmp_path_factory.mktemp("aws")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """A host for the master and for each of three workers, and an S3 server that they reach."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with hosts_of(folder, tag="fruitsaws", subnet="10.81.0.0/24") as rehearsal:
        rehearsal.up(workers=3)
        yield rehearsal


@pytest.fixture(scope="module")
def hardware(aws: Account, cluster_hosts: Rehearsal) -> Hardware:
    return Hardware(aws, cluster_hosts)


@pytest.fixture(scope="module")
def admin(
    aws: Account,
    hardware: Hardware,
    cluster_hosts: Rehearsal,
    tmp_path_factory: pytest.TempPathFactory,
) -> Admin:
    folder: Path = tmp_path_factory.mktemp("site")
    s3 = cluster_hosts.s3
    aws.direct.append(cluster_hosts.machines.gateway)
    # The hosts have no role of EC2's: they reach their S3 with keys.
    admin = Admin(
        folder,
        aws,
        cluster_name=CLUSTER,
        cluster_bucket=BUCKET,
        cluster_s3_endpoint=s3.endpoint,
        cluster_s3_access_key=s3.access_key,
        cluster_s3_secret_key=s3.secret_key,
        cluster_s3_history_access_key=s3.access_key,
        cluster_s3_history_secret_key=s3.secret_key,
        cluster_packs_in_bucket=False,  # tests/hosts have left them here
        ec2_idle_hours=3,
        **SMALL_HOSTS,
    )
    key = hardware.machines.hosts["master"].key
    shutil.copy(key.with_suffix(".pub"), admin.key)
    admin.ssh = {"ANSIBLE_PRIVATE_KEY_FILE": str(key)}
    return admin


def worker(admin: Admin, hardware: Hardware, host: str) -> str:
    """Return the name in the inventory of the worker that runs on a host."""
    (instance,) = [one for one, its in hardware.host_of.items() if its == host]
    return f"worker-{instance}"


def address(hardware: Hardware, host: str) -> str:
    return hardware.machines.hosts[host].address


def test_one_command_makes_instances_finds_them_and_configures_them(
    admin: Admin, hardware: Hardware
) -> None:
    play = admin.play("site.yml")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}
    assert play.says(f"https://{address(hardware, 'master')}:8443")
    # The hosts' keys were pinned under the names of the instances.
    pinned = str(admin.folder / "secrets/known_hosts")
    for instance in hardware.host_of:
        subprocess.run(["ssh-keygen", "-F", instance, "-f", pinned], check=True)


def test_the_cluster_is_healthy(admin: Admin, hardware: Hardware) -> None:
    play = admin.play("check.yml")
    assert play.says("read it back: well")
    for host in ("worker1", "worker2"):
        assert play.says(address(hardware, host))


def test_the_status_tells_what_goes_on(admin: Admin, hardware: Hardware) -> None:
    play = admin.play("status.yml")
    for host in ("worker1", "worker2"):
        assert play.says(f"worker {address(hardware, host)}: 0 of {SLOTS} slots in use")
    assert play.says("SSH session")


def test_the_master_watches_for_idle_hours_and_tells_so_at_login(
    admin: Admin, hardware: Hardware, cluster_hosts: Rehearsal
) -> None:
    assert on(cluster_hosts, "master", "systemctl is-active fruits-idle") == "active\n"
    told = on(cluster_hosts, "master", "journalctl --no-pager -u fruits-idle")
    assert "Traceback" not in told
    assert "cannot ask" not in told
    rating = on(
        cluster_hosts, "master", "systemd-analyze security --no-pager fruits-idle | tail -1"
    )
    assert float(re.findall(r"([0-9.]+) \w+", rating)[0]) <= 3.0
    login = hardware.machines.run("master", "cat /run/motd.dynamic /etc/motd /etc/motd.d/*")
    assert "This cluster stops itself after 3.0 hours" in login.stdout


def test_it_grows_by_a_worker_that_fetches_its_environment_from_the_bucket(
    admin: Admin, hardware: Hardware, cluster_hosts: Rehearsal
) -> None:
    bucket = BucketStore(Address(BUCKET, "packs"), cluster_hosts.s3)
    for pack in PACKS.glob("*-worker-*.tar.zst"):
        bucket.upload(pack.name, pack)
    in_bucket = ("-e", "cluster_packs_in_bucket=true")
    play = admin.play("scale.yml", "-e", "workers=3", *in_bucket)
    assert play.says("Unpack it as it comes, if its sum is right")
    assert not play.says("Install the locked packages")
    assert by_role(admin.aws) == {"master": 1, "worker": 3}
    # Those that were there let the new one in; nothing else of them changes.
    new = worker(admin, hardware, "worker3")
    changes = {host: counts["changed"] for host, counts in recap(play.output).items()}
    assert changes.pop(new) > 10
    assert changes.pop("localhost") == 1
    assert set(changes.values()) == {2}, play.output[-3000:]
    assert admin.play("check.yml").says(address(hardware, "worker3"))


def test_the_first_worker_leaves(admin: Admin, hardware: Hardware) -> None:
    leaving = worker(admin, hardware, "worker1")
    play = admin.play("scale.yml", "-e", f"leave={leaving}")
    assert not play.says("could not be drained")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}
    running = {status.host.name for status in hardware.machines.status() if status.runs}
    assert running == {"master", "worker2", "worker3"}
    check = admin.play("check.yml")
    assert check.says(address(hardware, "worker2"))
    assert check.says(address(hardware, "worker3"))
    assert not re.search(rf"{re.escape(address(hardware, 'worker1'))}\b", check.output)


def test_destroyed_nothing_is_left(admin: Admin, hardware: Hardware) -> None:
    admin.play("destroy.yml", "-e", f"destroy={CLUSTER}", "-e", f"bucket={BUCKET}")
    assert things(admin.aws) == []
    assert by_role(admin.aws) == Counter()
    assert not any(status.runs for status in hardware.machines.status())
