"""The folder of one set of hosts: who has which number, where the disks are, how SSH finds them."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.commands import HostsError
from tests.hosts.disk import make_key
from tests.hosts.image import LOGIN

_SSH = """Host *
  User {user}
  IdentityFile "{folder}/key"
  IdentitiesOnly yes
  UserKnownHostsFile "{folder}/known_hosts"
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 10
  ServerAliveInterval 5"""


@dataclass(frozen=True)
class Ledger:
    """A folder that only root may read, and that one command at a time may change."""

    folder: Path

    @property
    def key(self) -> Path:
        """The login user's private key."""
        return self.folder / "key"

    @property
    def ssh_config(self) -> Path:
        """What `ssh -F` needs to reach every host by name."""
        return self.folder / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        """The host keys, as made here: nothing is trusted on first sight."""
        return self.folder / "known_hosts"

    def home(self, name: str) -> Path:
        """Return the folder of a host's disk, log and pid."""
        return self.folder / "hosts" / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the folder to oneself; make it if it is new, refuse it if it is something else."""
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._lock.exists():
            raise HostsError(f"{self.folder} holds something else; name a new folder for the hosts")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        with self._lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    def remove(self) -> None:
        """Remove all that is known here, and the folder if that was all."""
        shutil.rmtree(self.folder / "hosts", ignore_errors=True)
        public = self.key.with_suffix(".pub")
        for file in (self.key, public, self.ssh_config, self.known_hosts, self._state, self._lock):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def hosts(self) -> dict[str, int]:
        """Return the number of each host."""
        return self._numbers()["hosts"]

    def outsiders(self) -> dict[str, int]:
        """Return the number of each name on the network that is no host."""
        return self._numbers()["outsiders"]

    def number_of(self, name: str) -> int:
        """Return a host's number."""
        numbers = self.hosts()
        if name not in numbers:
            raise HostsError(
                f"no host is named {name!r}; there are: {', '.join(numbers) or 'none'}"
            )
        return numbers[name]

    def number(self, kind: str, name: str) -> int:
        """Return the number of one of the `hosts` or `outsiders`; a new one gets the first free."""
        numbers = self._numbers()
        if name not in numbers[kind]:
            taken = {name: number for each in numbers.values() for name, number in each.items()}
            if name in taken or not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", name):
                raise HostsError(f"{name!r} is taken, or is no name of small letters and digits")
            free = (number for number in range(1, 256) if number not in taken.values())
            numbers[kind][name] = next(free)
            _write(self._state, [json.dumps(numbers)])
        return numbers[kind][name]

    def public_key(self) -> str:
        """Return the login user's public key; make the pair if there is none."""
        if not self.key.exists():
            make_key(self.key, f"{LOGIN} of the hosts")
        return self.key.with_suffix(".pub").read_text().strip()

    def write_ssh_files(self, addresses: Mapping[str, str]) -> None:
        """Write ssh_config and known_hosts for hosts at these addresses."""
        known, places = [], []
        for name, address in addresses.items():
            kind, key, *_ = (self.home(name) / "host-key.pub").read_text().split()
            known.append(f"{name},{address} {kind} {key}")
            places.append(f"Host {name} {address}\n  HostName {address}")
        _write(self.known_hosts, known)
        _write(self.ssh_config, [*places, _SSH.format(folder=self.folder, user=LOGIN)])

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    @property
    def _state(self) -> Path:
        return self.folder / "numbers.json"

    def _numbers(self) -> dict[str, dict[str, int]]:
        found = json.loads(self._state.read_text()) if self._state.exists() else {}
        return {"hosts": {}, "outsiders": {}, **found}


def _write(file: Path, lines: Iterable[str]) -> None:
    """Write a file in one step, so that a crash leaves the old or the new one."""
    new = file.with_name(f"{file.name}.new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.replace(file)
