"""Throw-away Debian hosts on one machine, which a playbook takes for EC2's Debian instances.

Each has its own address, name, disk, sshd and systemd as process 1; the login user is `admin`, who
may sudo. They share one kernel. `python -m tests.hosts.machines --help` tells how to use them by
hand.

    with Machines(folder) as machines:
        machines.up("master", "worker1")
        machines.run("master", "ping -c 1 worker1")
        machines.kill("worker1")  # a power cut; machines.start("worker1") boots the same disk
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from tests.hosts import boot
from tests.hosts.boot import Limits
from tests.hosts.commands import PATH, HostsError, last_line, prepare_machine, say, unfit
from tests.hosts.disk import clone_disk, ensure_disk
from tests.hosts.image import IMAGES, LOGIN, base_image, remove_images
from tests.hosts.ledger import Ledger
from tests.hosts.network import Network
from tests.hosts.registries import registry_endpoints, resolvers

FOLDER = Path(".fruits/hosts")
SECONDS_TO_BOOT = 300.0


@dataclass(frozen=True)
class Host:
    """What one needs to know to reach a host."""

    name: str
    address: str
    key: Path
    ssh_config: Path
    known_hosts: Path
    user: str = LOGIN


@dataclass(frozen=True)
class Status:
    """How a host is: whether it runs, whether its cable carries, and the bytes of its disk."""

    host: Host
    runs: bool
    is_plugged: bool
    disk: int


class Machines:
    """A set of hosts on one network.

    Parameters
    ----------
    folder
        Where their disks, keys and logs are, for root's eyes only.
    images
        Where base images are kept, for all sets of hosts.
    suite
        The Debian release of new disks.
    tag, subnet
        What the names of bridge, namespaces, firewall table and control groups begin with, and the
        addresses. Two sets on one machine need a tag and a subnet each.
    ports
        The TCP ports of this machine that hosts may reach, at `gateway`.
    memory, cpus
        What each host may use: "2G", 0.5; without limit if None.
    """

    def __init__(
        self,
        folder: Path = FOLDER,
        *,
        images: Path = IMAGES,
        suite: str = "bookworm",
        tag: str = "fruits",
        subnet: str = "10.77.0.0/24",
        ports: Iterable[int] = (),
        memory: str | None = None,
        cpus: float | None = None,
    ) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,10}", tag):  # with "-255", a link's 15
            raise HostsError(f"a tag has 1 to 11 small letters and digits, unlike {tag!r}")
        self.ledger = Ledger(folder.absolute())
        self.network = Network(tag, IPv4Network(subnet))
        self.images = images
        self.suite = suite
        self.ports = set(ports)
        self.limits = Limits(memory, cpus)

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def gateway(self) -> str:
        """This machine's address, as hosts see it."""
        return str(self.network.gateway)

    @property
    def hosts(self) -> dict[str, Host]:
        """The hosts by name, running or not."""
        files = (self.ledger.key, self.ledger.ssh_config, self.ledger.known_hosts)
        return {name: Host(name, address, *files) for name, address in self._addresses().items()}

    # Their life

    def up(self, *names: str, before: Callable[[], object] | None = None) -> list[Host]:
        """Make and boot hosts, beside those that run already, and wait until they are ready.

        What a crash left behind is cleaned up first, hosts whose supervisor is gone among it. What
        is to be done `before` they boot, such as to start a server for them, finds their network.
        """
        prepare_machine()
        image = base_image(self.images, self.suite)
        with self.ledger.locked():
            self._sweep()
            if not self.network.is_up():
                self.network.up(resolvers(), registry_endpoints(image), self.ports)
            for name in names:
                self.ledger.number("hosts", name)
            for name in self.ledger.hosts():
                self._ensure_disk(name, image)
            self._introduce()
            if before:
                before()
            for name in names:
                self._boot(name)
        for name in names:
            self._wait_until_ready(name)
        return [self.hosts[name] for name in names]

    def start(self, name: str) -> Host:
        """Boot a host from the disk it has, and wait until it is ready."""
        self.ledger.number_of(name)
        with self.ledger.locked():
            self._boot(name)
        self._wait_until_ready(name)
        return self.hosts[name]

    def stop(self, name: str) -> None:
        """Shut a host down in good order, as `poweroff` does."""
        self.ledger.number_of(name)
        with self.ledger.locked():
            if not boot.stop(self._full_name(name)):
                say(f"{name} did not stop within {boot.SECONDS_TO_STOP:.0f} s; its power is cut")
            self._end(name)

    def kill(self, name: str) -> None:
        """Cut a host's power: all that runs on it is gone at once, its disk stays."""
        self.ledger.number_of(name)
        with self.ledger.locked():
            self._end(name)

    def keep(self, folder: Path) -> None:
        """Move the disks of all hosts, which are stopped, to a folder that `clone` knows."""
        with self.ledger.locked():
            for name in self.ledger.hosts():
                home = self.ledger.home(name)
                kept = folder / name
                kept.mkdir(parents=True)
                (home / "upper").rename(kept / "disk")
                for file in ("image", "host-key.pub"):
                    (home / file).rename(kept / file)
                shutil.rmtree(home)
            for file in (self.ledger.key, self.ledger.key.with_suffix(".pub")):
                shutil.copy(file, folder)

    def clone(
        self, folder: Path, *names: str, before: Callable[[], object] | None = None
    ) -> list[Host]:
        """Make and boot hosts whose disks begin as those that were kept; these stay as they are."""
        with self.ledger.locked():
            for file in (self.ledger.key, self.ledger.key.with_suffix(".pub")):
                shutil.copy(folder / file.name, file)
            for name in names:
                self.ledger.number("hosts", name)
                clone_disk(self.ledger.home(name), folder / name)
        return self.up(*names, before=before)

    def fresh(self, name: str) -> Host:
        """Replace a host by a new one of the same name and address: a new disk, a new host key."""
        self.ledger.number_of(name)
        image = base_image(self.images, self.suite)
        with self.ledger.locked():
            self._end(name)
            shutil.rmtree(self.ledger.home(name))
            self._ensure_disk(name, image)
            self._introduce()
        return self.start(name)

    def down(self) -> None:
        """End everything that bears the tag, and remove the folder; base images stay."""
        with self.ledger.locked():
            self._sweep(keep_running=False)
            boot.remove_cgroups(self._full_name("*"))
            self.ledger.remove()

    def purge(self) -> None:
        """Take the hosts down, and remove the base images, too."""
        self.down()
        remove_images(self.images)

    # Their network

    def cut(self, name: str) -> None:
        """Pull a host's network cable."""
        self.network.cut(self.ledger.number_of(name))

    def mend(self, name: str) -> None:
        """Put a host's network cable back; one without power gets a new one when it boots."""
        number = self.ledger.number_of(name)
        if self._supervisor(name) is not None:
            self.network.mend(number)

    def open_port(self, port: int) -> None:
        """Let hosts reach a TCP port of this machine from now on."""
        self.ports.add(port)
        self.network.open_port(port)

    def outsider(self, name: str = "outsider") -> str:
        """Make a plain network namespace on the bridge, no host, and return its address."""
        with self.ledger.locked():
            number = self.ledger.number("outsiders", name)
            self.network.plug(name, number)
        return str(self.network.address(number))

    # Their use

    def run(
        self, name: str, command: str, *, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on a host over SSH, as the login user."""
        return _run(f"{name}: {command}", self._ssh(name, command), check=check, timeout=timeout)

    def run_outside(
        self, *command: str, name: str = "outsider", check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of this machine in an outsider's namespace, as root."""
        words = ["ip", "netns", "exec", self.network.namespace(name), *command]
        return _run(f"{name}: {' '.join(command)}", words, check=check, timeout=timeout)

    def status(self) -> list[Status]:
        """Tell how each host is."""
        return [
            Status(
                host,
                runs=self._supervisor(name) is not None,
                is_plugged=self.network.is_plugged(self.ledger.number_of(name)),
                disk=_size(self.ledger.home(name) / "upper"),
            )
            for name, host in self.hosts.items()
        ]

    def leftovers(self) -> list[str]:
        """Return what there is of these hosts on the machine: nothing, when they are down."""
        prefix = self._full_name("")
        mounts = Path("/proc/mounts").read_text().splitlines()
        return [
            *(f"process {pid} of {name}" for pid, name in boot.processes(prefix).items()),
            *(f"mount {line}" for line in mounts if line.startswith(prefix)),
            *(f"control group {path}" for path in boot.cgroups(f"{prefix}*")),
            *self.network.leftovers(),
            *([f"folder {self.ledger.folder}"] if self.ledger.folder.exists() else []),
        ]

    # How it is done

    def _full_name(self, name: str) -> str:
        return self.network.namespace(name)

    def _addresses(self) -> dict[str, str]:
        numbers = self.ledger.hosts()
        return {name: str(self.network.address(number)) for name, number in numbers.items()}

    def _supervisor(self, name: str) -> int | None:
        return boot.supervisor(self._full_name(name), self.ledger.home(name))

    def _sweep(self, *, keep_running: bool = True) -> None:
        """End all that bears the tag, but for this folder's supervised hosts and its outsiders."""
        kept = set[str]()
        if keep_running and self.network.is_up():
            kept = {name for name in self.ledger.hosts() if self._supervisor(name) is not None}
            kept |= self.ledger.outsiders().keys() if kept else set()
        prefix = self._full_name("")
        running = {name.removeprefix(prefix) for name in boot.processes(prefix).values()}
        for name in {*running, *self.network.names()} - kept:
            self._end(name)
        if not kept:
            self.network.down()

    def _end(self, name: str) -> None:
        self.network.unplug(name, self.ledger.hosts().get(name))
        boot.kill(self._full_name(name))
        boot.remove_cgroups(self._full_name(name))

    def _ensure_disk(self, name: str, image: Path) -> None:
        ensure_disk(self.ledger.home(name), name, image, self.ledger.public_key())

    def _introduce(self) -> None:
        """Tell SSH and the hosts themselves where each host is."""
        addresses = self._addresses()
        self.ledger.write_ssh_files(addresses)
        lines = [f"{address} {name}" for name, address in addresses.items()]
        for name in addresses:
            file = self._disk_in_use(name) / "etc/hosts"
            known = file.read_text()
            missing = [line for line in lines if line not in known.splitlines()]
            if missing:  # what a playbook wrote there stays
                file.write_text(known + "".join(f"{line}\n" for line in missing))

    def _disk_in_use(self, name: str) -> Path:
        """Return a host's disk as the host sees it; parts of a mounted overlay are not for us."""
        running, home = self._supervisor(name), self.ledger.home(name)
        return Path(f"/proc/{running}/root{home}/root") if running else home / "upper"

    def _boot(self, name: str) -> None:
        if self._supervisor(name) is None:
            boot.kill(self._full_name(name))  # what a supervisor that was killed has left
            self.network.plug(name, self.ledger.number_of(name))
            boot.boot(self._full_name(name), name, self.ledger.home(name), self.limits)

    def _wait_until_ready(self, name: str) -> None:
        """Wait until SSH lets the login user in and systemd has started all it has to."""
        deadline = time.monotonic() + SECONDS_TO_BOOT
        while time.monotonic() < deadline and self._supervisor(name) is not None:
            with suppress(HostsError):
                left = max(1.0, deadline - time.monotonic())
                asked = "systemctl is-system-running --wait"
                if self.run(name, asked, check=False, timeout=left).stdout.strip():
                    return  # be it "degraded": a playbook's service may have failed
            time.sleep(0.1)
        console = self.ledger.home(name) / "console.log"
        words = last_line(console.read_text(errors="replace"))
        raise HostsError(f"{name} did not come up; {console} ends: {words}")

    def _ssh(self, name: str, command: str) -> list[str]:
        self.ledger.number_of(name)
        return ["ssh", "-F", str(self.ledger.ssh_config), name, command]


def _run(
    what: str, words: list[str], *, check: bool, timeout: float
) -> subprocess.CompletedProcess[str]:
    try:
        run = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PATH": PATH},
        )
    except subprocess.TimeoutExpired:
        raise HostsError(f"{what}: not done after {timeout:.0f} s") from None
    if check and run.returncode != 0:
        last = last_line(run.stderr) or last_line(run.stdout) or "without a word"
        raise HostsError(f"{what}: exit status {run.returncode}: {last}")
    return run


def _size(folder: Path) -> int:
    blocks = 0
    for below, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # hosts are at work
                blocks += Path(below, name).lstat().st_blocks
    return blocks * 512


# The command line

_COMMANDS = {
    "up": "make and boot hosts; one that runs is left alone",
    "down": "end all, leave nothing but base images",
    "status": "what runs, where",
    "ssh": "a shell on a host, or one command",
    "cut": "pull its network cable",
    "mend": "put the cable back",
    "kill": "cut its power; the disk stays",
    "stop": "shut it down in good order",
    "start": "boot it from the disk it has",
    "fresh": "replace it: a new disk and host key, the same name and address",
    "purge": "down, and remove the base images",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error is one line."""
    given = vars(_parser().parse_args(arguments))
    command, names, words = (given.pop(name, []) for name in ("command", "names", "words"))
    try:
        if reason := unfit():
            raise HostsError(reason)
        machines = Machines(**given)
        match command:
            case "up":
                for host in machines.up(*names):
                    print(f"{host.name} is up at {host.address}")
                print(f"next: ssh -F {machines.ledger.ssh_config} {names[0]}")
            case "status":
                print("\n".join(map(_told, machines.status())) or "no hosts")
            case "ssh":
                machines.ledger.number_of(names[0])
                os.execvp("ssh", ["ssh", "-F", str(machines.ledger.ssh_config), *names, *words])
            case _:
                getattr(machines, command)(*names)
    except (HostsError, OSError, ValueError) as error:
        sys.exit(f"hosts: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hosts.machines",
        description=(__doc__ or "").partition("\n")[0],
        epilog="Options come before the command, and are the same for all commands on one set.",
    )
    option = parser.add_argument
    option("--folder", type=Path, default=FOLDER, help="of disks, keys and logs: %(default)s")
    option("--images", type=Path, default=IMAGES, help="of base images: %(default)s")
    option("--suite", default="bookworm", help="the Debian release of new disks: %(default)s")
    option("--tag", default="fruits", help="begins the names of all that is made: %(default)s")
    option("--subnet", default="10.77.0.0/24", help="%(default)s")
    option("--memory", help="of each host: 512M, 2G; no limit")
    option("--cpus", type=float, help="of each host: 0.5, 2; no limit")
    option("--open", type=int, dest="ports", action="append", default=[], metavar="PORT",
           help="a TCP port of this machine that hosts may reach; may be repeated")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, does in _COMMANDS.items():
        one = commands.add_parser(command, help=does)
        if command not in ("down", "status", "purge"):
            one.add_argument("names", metavar="NAME", nargs="+" if command == "up" else 1)
        if command == "ssh":
            one.add_argument("words", metavar="WORD", nargs=argparse.REMAINDER)
    return parser


def _told(status: Status) -> str:
    state = "runs" if status.runs else "is down"
    cable = ", cable cut" if status.runs and not status.is_plugged else ""
    host = status.host
    return f"{host.name} at {host.address} {state}{cable}, {status.disk / 1e6:.0f} MB of disk"


if __name__ == "__main__":
    main()
