"""The programs that hosts need, and how they are called: one result, or an error in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# Without this, a root shell made by plain `su` has no `ip` and no `nft`.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"

_PACKAGES = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}


class HostsError(RuntimeError):
    """Hosts cannot be made or used here; the message is one line."""


def call(*command: object, given: str | None = None) -> str:
    """Run a command and return what it printed.

    Raises
    ------
    HostsError
        When it fails; the message ends with the command's last words.
    """
    words = [str(word) for word in command]
    try:
        run = subprocess.run(
            words,
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            capture_output=True,
            text=True,
            env=os.environ
            | {"PATH": PATH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except OSError as error:
        raise HostsError(f"`{words[0]}` cannot be run: {error.strerror}") from None
    if run.returncode != 0:
        last = last_line(run.stderr) or last_line(run.stdout) or f"exit status {run.returncode}"
        raise HostsError(f"`{' '.join(words[:4])}` failed: {last}")
    return run.stdout


def last_line(text: str) -> str:
    """Return the last line that says what happened; `mount` closes with a hint at dmesg."""
    lines = [line.strip() for line in text.splitlines() if "dmesg(1)" not in line]
    return next((line for line in reversed(lines) if line), "")


def say(text: str) -> None:
    """Tell the person at the terminal what is going on."""
    sys.stderr.write(f"hosts: {text}\n")


def os_release() -> dict[str, str]:
    """Return what /etc/os-release says; empty on a system that has none."""
    with suppress(OSError):
        text = Path("/etc/os-release").read_text()
        return dict(re.findall(r'^(\w+)="?([^"\n]*)', text, re.MULTILINE))
    return {}


def unfit() -> str | None:
    """Say why this machine cannot have hosts; None if it can, be it after installing tools."""
    release = os_release()
    if not {"debian", "ubuntu"} & {release.get("ID"), *release.get("ID_LIKE", "").split()}:
        return f"hosts need Debian or Ubuntu; this is {release.get('PRETTY_NAME', sys.platform)}"
    return None if os.geteuid() == 0 else "hosts need root, for namespaces and mounts; try sudo"


def prepare_machine() -> None:
    """See to the programs that hosts need; apt installs those that are missing.

    Raises
    ------
    HostsError
        When this machine cannot have hosts.
    """
    if reason := unfit():
        raise HostsError(reason)
    missing = [
        package
        for need, package in _PACKAGES.items()
        if not (Path(need).exists() if need.startswith("/") else shutil.which(need, path=PATH))
    ]
    if missing:
        say(f"installing {', '.join(missing)} with apt ...")
        call("apt-get", "update", "-qq")
        wait = ("-o", "DPkg::Lock::Timeout=600")  # another apt may be at work
        call("apt-get", "install", *wait, "-y", "-qq", "--no-install-recommends", *missing)
