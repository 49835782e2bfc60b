"""A host's disk: an overlay's upper folder, filled with what tells one host from another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.hosts.commands import call
from tests.hosts.image import LOGIN, LOGIN_ID
from tests.hosts.registries import environment, pip_settings, resolvers

_HOST_KEY = "etc/ssh/ssh_host_ed25519_key"


def ensure_disk(home: Path, name: str, image: Path, authorized_key: str) -> None:
    """Make a disk in `home` over a base image, unless a whole one is there.

    It has a name, a key of its own for sshd (whose public half is also `home`/host-key.pub), the
    login user's key, and the settings by which this machine reaches its package registries.
    """
    if (home / "image").exists():  # the last thing to be made
        return
    shutil.rmtree(home, ignore_errors=True)
    for folder in ("upper", "work", "root"):
        _folder(home / folder)
    upper = home / "upper"
    _file(upper / "etc/hostname", [name])
    _file(upper / "etc/hosts", ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"])
    _file(upper / "etc/resolv.conf", [f"nameserver {address}" for address in resolvers()])
    if variables := environment():
        _file(upper / "etc/environment", [f"{name}={value}" for name, value in variables.items()])
        # Debian's sudo starts from an empty environment and does not read that file by itself.
        _file(upper / "etc/sudoers.d/10-environment", ["Defaults env_file=/etc/environment"], 0o440)
    if settings := pip_settings():
        pairs = [f"{name} = {value}" for name, value in settings.items()]
        _file(upper / "etc/pip.conf", ["[global]", *pairs])
    _folder(upper / "etc/ssh")
    make_key(upper / _HOST_KEY, f"root@{name}")
    shutil.copy(upper / f"{_HOST_KEY}.pub", home / "host-key.pub")
    keys = upper / f"home/{LOGIN}/.ssh/authorized_keys"
    _file(keys, [authorized_key])
    for path, mode in ((keys, 0o600), (keys.parent, 0o700), (keys.parent.parent, 0o700)):
        os.chown(path, LOGIN_ID, LOGIN_ID)
        path.chmod(mode)
    (home / "image").symlink_to(image)


def clone_disk(home: Path, kept: Path) -> None:
    """Make a disk in `home` over one that was kept, with its name, keys and all that is on it."""
    shutil.rmtree(home, ignore_errors=True)
    for folder in ("upper", "work", "root"):
        _folder(home / folder)
    hosts = kept / "disk/etc/hosts"
    _file(home / "upper/etc/hosts", hosts.read_text().splitlines())
    shutil.copy(kept / "host-key.pub", home)
    (home / "layer").symlink_to(kept / "disk")
    (home / "image").symlink_to((kept / "image").readlink())


def make_key(file: Path, comment: str) -> None:
    """Make an SSH key pair without a passphrase."""
    call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", file)


def _file(file: Path, lines: Iterable[str], mode: int = 0o644) -> None:
    _folder(file.parent)
    file.write_text("".join(f"{line}\n" for line in lines))
    file.chmod(mode)


def _folder(folder: Path) -> None:
    """Make a folder that everyone on the host may read, whatever the umask is here."""
    for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
        missing.mkdir()
        missing.chmod(0o755)
