"""The hosts that playbooks are tested on: real enough, walled in, and gone without a trace."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.hosts import boot
from tests.hosts.commands import HostsError, unfit
from tests.hosts.machines import Machines, main
from tests.hosts.network import forwarding_notes

pytestmark = pytest.mark.skipif(unfit() is not None, reason=unfit() or "fit")

# An address for documentation: nobody is there, should a packet get out.
NOWHERE = "198.51.100.7"


def traces() -> dict[str, str]:
    """What hosts might change on the machine, but for what other hosts have up meanwhile.

    Those have a bridge and cables, and namespaces that are mounted under /run/netns; and the outer
    link forwards as long as one of them is up. Of what bears a tag of its own, `leftovers` tells.
    Another process of the tests may have a small disk mounted in its own temporary folder.
    """
    forwarding = {
        file.parent.name: file.read_text().strip()
        for file in Path("/proc/sys/net/ipv4/conf").glob("*/forwarding")
        if not re.fullmatch(r"\w+-(br|\d+)", file.parent.name)
    }
    forwarding |= dict(forwarding_notes().values())  # as it was before the first of them
    this_process = os.environ.get("PYTEST_XDIST_WORKER", "main")
    others = re.compile(rf"/netns|/popen-(?!{this_process}/)")
    mounts = Path("/proc/mounts").read_text().splitlines()
    return forwarding | {"mounts": "\n".join(line for line in mounts if not others.search(line))}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return traces()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, before: object) -> Iterator[Machines]:
    """Two hosts, beside any that a person has up."""
    folder = tmp_path_factory.mktemp("machines") / "hosts"
    with Machines(folder, tag="hoststest", subnet="10.76.0.0/24", memory="1G", cpus=1) as machines:
        machines.up("one", "two")
        yield machines


def connects(machines: Machines, name: str, address: str, port: int, seconds: int = 60) -> bool:
    """Tell whether a host can open a TCP connection, in time."""
    probe = f"timeout {seconds} bash -c 'exec 3<>/dev/tcp/{address}/{port}'"
    return machines.run(name, probe, check=False).returncode == 0


def test_a_host_is_a_running_debian_with_an_admin_who_may_sudo(machines: Machines) -> None:
    facts = "systemctl is-system-running; hostname; cat /proc/1/comm; id -un; sudo -n id -un"
    assert machines.run("one", facts).stdout.split() == [
        "running",
        "one",
        "systemd",
        "admin",
        "root",
    ]


def test_only_the_host_key_made_here_is_trusted(machines: Machines) -> None:
    one, two = machines.up("one", "two")
    assert one.known_hosts.read_text().count("ssh-ed25519") == 2
    assert (one.ssh_config.parent.stat().st_mode & 0o777) == 0o700
    stranger = [
        "ssh",
        "-F",
        str(one.ssh_config),
        "-o",
        f"HostKeyAlias={two.name}",
        one.name,
        "true",
    ]
    run = subprocess.run(stranger, capture_output=True, text=True)
    assert run.returncode != 0
    assert "verification failed" in run.stderr


def test_hosts_reach_each_other_by_name(machines: Machines) -> None:
    machines.run("one", "ping -c 1 -W 2 two")
    assert connects(machines, "two", "one", 22)


def test_package_lists_come_and_nothing_else_of_the_world(machines: Machines) -> None:
    machines.run("one", "sudo apt-get update")
    assert not connects(machines, "one", NOWHERE, 443, seconds=2)
    assert not connects(machines, "one", NOWHERE, 53, seconds=2)
    refusal = machines.run("one", f"ping -c 1 -W 2 {NOWHERE}", check=False)
    assert "filtered" in refusal.stdout  # by this machine: nothing went out


def test_only_an_opened_port_of_this_machine_answers(machines: Machines) -> None:
    with socket.create_server((machines.gateway, 0)) as server:
        port = server.getsockname()[1]
        assert not connects(machines, "one", machines.gateway, port, seconds=2)
        machines.open_port(port)
        assert connects(machines, "one", machines.gateway, port)


def test_one_who_is_no_host_reaches_hosts_from_an_address_of_its_own(machines: Machines) -> None:
    address = machines.outsider()
    ssh = ["ssh", "-F", str(machines.hosts["one"].ssh_config), "one"]
    assert machines.run_outside(*ssh, "echo $SSH_CLIENT").stdout.split()[0] == address


def test_a_cut_cable_is_silent_until_it_is_mended(machines: Machines) -> None:
    machines.cut("two")
    with pytest.raises(HostsError, match="one: ping"):
        machines.run("one", "ping -c 1 -W 1 two")
    machines.mend("two")
    machines.run("one", "ping -c 1 -W 2 two")


def test_after_a_power_cut_a_host_boots_from_the_same_disk(machines: Machines) -> None:
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    machines.run("two", "echo kept > kept")
    first = machines.run("two", boot_id).stdout
    machines.kill("two")
    assert [status.runs for status in machines.status()] == [True, False]
    machines.start("two")
    assert machines.run("two", "cat kept").stdout == "kept\n"
    assert machines.run("two", boot_id).stdout != first
    machines.stop("two")
    machines.start("two")
    machines.run("two", "systemctl is-system-running")


def test_a_fresh_host_has_a_new_disk_and_a_new_key(machines: Machines) -> None:
    known, address = machines.hosts["two"].known_hosts.read_text(), machines.hosts["two"].address
    machines.run("two", "touch gone")
    assert machines.fresh("two").address == address
    assert machines.run("two", "ls").stdout == ""
    assert machines.hosts["two"].known_hosts.read_text() != known


def test_what_a_crash_left_is_cleaned_up_and_boots_again(machines: Machines) -> None:
    supervisors = [
        boot.supervisor(f"hoststest-{n}", machines.ledger.home(n)) for n in machines.hosts
    ]
    for pid in supervisors:
        assert pid
        os.kill(pid, signal.SIGKILL)
    orphans = boot.processes("hoststest-").keys() - supervisors
    assert len(orphans) > 2
    machines.up("one", "two")
    assert not orphans & boot.processes("hoststest-").keys()
    machines.run("one", "ping -c 1 -W 2 two")


def test_down_leaves_nothing_behind(machines: Machines, before: dict[str, str]) -> None:
    machines.up("one")
    assert {line.split()[0] for line in machines.leftovers()} > {"process", "link", "nft"}
    machines.down()
    assert machines.leftovers() == []
    assert traces() == before


def test_an_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^hosts: no host is named 'nobody'.*none$"):
        main(["--folder", str(tmp_path / "hosts"), "--tag", "hoststest", "kill", "nobody"])
    with pytest.raises(SystemExit, match="holds something else"):
        main(["--folder", str(PROJECT), "--tag", "hoststest", "down"])
