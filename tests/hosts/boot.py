"""Boots a disk as a host with systemd as its process 1, and ends it.

A host is a systemd-nspawn under a small shell, its supervisor, in a mount namespace of their own:
the machine's mount table never changes. There the disk is an overlay, over the base image, that
carries the host's full name as its source. Every process of a host shows that name in its mount
table, which is how they are found, even after a crash and without any pid file.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.commands import PATH, HostsError, last_line

SECONDS_TO_STOP = 60.0
SECONDS_FOR_THE_DISK = 120.0  # others may be writing gigabytes to it
_CGROUPS = Path("/sys/fs/cgroup")
# A slave, so that a host lets go of the namespaces of others as soon as the machine does.
_IN_MOUNT_NAMESPACE = ("unshare", "--mount", "--propagation", "slave")
_REBOOT = 133  # nspawn's exit status after a reboot inside


@dataclass(frozen=True)
class Limits:
    """What one host may use: bytes of memory (or "512M", "2G") and a number of cores."""

    memory: str | None = None
    cpus: float | None = None


def boot(full_name: str, name: str, folder: Path, limits: Limits) -> None:
    """Start the disk in `folder` (image, layer, upper, work, root) in its network namespace.

    Raises
    ------
    HostsError
        When there is no supervisor after some seconds.
    """
    (folder / "pid").unlink(missing_ok=True)
    groups = [] if _machine_runs_systemd() else _make_groups(full_name, limits)
    layers = [folder / name for name in ("layer", "image") if (folder / name).exists()]
    script = _supervisor(full_name, groups, layers, _nspawn(full_name, name, folder, limits))
    console = folder / "console.log"
    with console.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *_IN_MOUNT_NAMESPACE, "sh", "-c", script],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": PATH, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
                 "SYSTEMD_NSPAWN_TMPFS_TMP": "0"},
            check=True,
        )  # fmt: skip
    deadline = time.monotonic() + SECONDS_FOR_THE_DISK
    while not supervisor(full_name, folder):
        if time.monotonic() > deadline:
            words = last_line(console.read_text(errors="replace"))
            raise HostsError(f"{name} did not start; {console} ends: {words}")
        time.sleep(0.02)


def _supervisor(
    full_name: str, groups: Iterable[Path], layers: Iterable[Path], nspawn: list[str]
) -> str:
    """Return the shell program that mounts the disk and boots it, again after each reboot."""
    joins = [f"echo $$ >{shlex.quote(str(group))}/cgroup.procs" for group in groups]
    # Over cgroup v1, nspawn and systemd would set up the hybrid layout of old; real hosts have v2.
    is_v2 = _hierarchy("cgroup2") == _CGROUPS or _machine_runs_systemd()
    only_v2 = [] if is_v2 else [f"mount -t cgroup2 cgroup2 {_CGROUPS}"]
    lower = ":".join(str(layer.resolve()) for layer in layers)
    return "\n".join([
        "set -eu", *joins, *only_v2,
        f"mount -t overlay {full_name} -o lowerdir={lower},upperdir=upper,workdir=work root",
        "echo $$ >pid.new; mv pid.new pid",
        "while :; do",
        f"    status=0; {shlex.join(nspawn)} || status=$?",
        f'    [ "$status" = {_REBOOT} ] || exit "$status"',
        "done",
    ])  # fmt: skip


def _nspawn(full_name: str, name: str, folder: Path, limits: Limits) -> list[str]:
    return [
        *("systemd-nspawn", "--quiet", "--boot", "--register=no", *_scope(limits)),
        *(f"--directory={folder}/root", f"--machine={full_name}", f"--hostname={name}"),
        f"--network-namespace-path=/run/netns/{full_name}",
        "--capability=CAP_NET_ADMIN",  # its root may have a firewall, as on a real host
        *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--suppress-sync=yes"),
        "--kill-signal=SIGRTMIN+4",  # systemd then powers off
    ]


def _scope(limits: Limits) -> list[str]:
    """Return how nspawn comes by its cgroup: a scope from systemd, or the one it is in."""
    if not _machine_runs_systemd():
        return ["--keep-unit"]
    memory = [f"--property=MemoryMax={limits.memory}"] if limits.memory else []
    return memory + ([f"--property=CPUQuota={limits.cpus:.0%}"] if limits.cpus else [])


def supervisor(full_name: str, folder: Path) -> int | None:
    """Return the pid of a host's supervisor if it lives."""
    with suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text())
        if full_name in _overlays_of(pid):  # another process may have got the number since
            return pid
    return None


def processes(prefix: str) -> dict[int, str]:
    """Return, by pid, the full name of the host of every process whose host's begins with it."""
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    found = ((pid, name) for pid in pids for name in _overlays_of(pid))
    return {pid: name for pid, name in found if name.startswith(prefix)}


def _overlays_of(pid: int) -> list[str]:
    """Return the sources of the overlays that a process sees, which is none if it is dead."""
    with suppress(OSError):
        return re.findall(r" - overlay (\S+) ", Path(f"/proc/{pid}/mountinfo").read_text())
    return []


def stop(full_name: str) -> bool:
    """Shut a host down in good order; tell whether that was done in time."""
    for pid in _pids(full_name):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd-nspawn":
                os.kill(pid, signal.SIGTERM)
    return _wait_until_gone(full_name, SECONDS_TO_STOP)


def kill(full_name: str) -> None:
    """End every process of a host at once, as a power cut does."""
    deadline = time.monotonic() + SECONDS_FOR_THE_DISK
    while pids := _pids(full_name):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if _wait_until_gone(full_name, 0.5):
            return
        if time.monotonic() > deadline:
            raise HostsError(f"the processes {pids} of {full_name} do not end")


def _pids(full_name: str) -> list[int]:
    """Return a host's processes, oldest first: the supervisor, nspawn, systemd, the others."""
    return sorted(pid for pid, name in processes(full_name).items() if name == full_name)


def _wait_until_gone(full_name: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _pids(full_name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def cgroups(pattern: str) -> list[Path]:
    """Return the control groups whose name matches; systemd looks after its own."""
    if _machine_runs_systemd():
        return []
    unified, *old = (_hierarchy(name) for name in ("cgroup2", "memory", "cpu"))
    found = set(unified.glob(pattern)) if unified else set()  # below are the hosts' own
    for root in filter(None, old):  # others come and go below it meanwhile
        for below, names, _ in os.walk(root):
            found.update(Path(below, name) for name in fnmatch.filter(names, pattern))
    return sorted(found)


def remove_cgroups(pattern: str) -> None:
    """Remove control groups, with all below them, whose processes have ended."""
    deadline = time.monotonic() + SECONDS_FOR_THE_DISK
    while found := cgroups(pattern):
        inner = [folder for group in found for folder in group.glob("**/")]
        for folder in sorted({*found, *inner}, reverse=True):  # the deepest first
            with suppress(OSError):
                folder.rmdir()
        if time.monotonic() > deadline:
            raise HostsError(f"the control group {found[0]} cannot be removed")
        time.sleep(0.02)


def _make_groups(full_name: str, limits: Limits) -> list[Path]:
    """Make the control groups that a host's supervisor joins, with the host's limits."""
    unified = _hierarchy("cgroup2")
    if unified is None:
        raise HostsError(f"no cgroup2 is mounted; mount one: mount -t cgroup2 none {_CGROUPS}")
    groups = [unified / full_name]
    groups[0].mkdir(exist_ok=True)
    quota = limits.cpus and int(limits.cpus * 100_000)  # microseconds in each 100 ms
    for controller, file, value in (
        ("memory", "memory.limit_in_bytes", limits.memory),
        ("cpu", "cpu.cfs_quota_us", quota),
    ):
        if value:
            groups.append(_own_group(controller) / full_name)
            groups[-1].mkdir(exist_ok=True)
            (groups[-1] / file).write_text(str(value))
    return groups


def _own_group(controller: str) -> Path:
    """Return this process's group of cgroup v1; limits set on it stay in force below."""
    hierarchy = _hierarchy(controller)
    if hierarchy is None:
        raise HostsError(f"limits of {controller} need systemd or cgroup v1 on this machine")
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next(path for _, controllers, path in lines if controller in controllers.split(","))
    return hierarchy / own.strip("/")


def _hierarchy(kind: str) -> Path | None:
    """Return where cgroup2, or a controller of cgroup v1, is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, system, options, *_ = line.split()
        if kind == system or (system == "cgroup" and kind in options.split(",")):
            return Path(place)
    return None


def _machine_runs_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()
