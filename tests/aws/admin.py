"""The admin of a cluster on EC2: a folder with an inventory and knobs, and the playbooks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from functools import cached_property
from pathlib import Path

import yaml

from tests.aws.account import REGION, Account

REPOSITORY = Path(__file__).parents[2]


class Admin:
    """An admin's machine: knobs, a key, and the playbooks, run as processes against the account.

    `run` starts a command as an admin does; `play` forks it from an Ansible that was imported.
    """

    def __init__(self, folder: Path, aws: Account, **knobs: object) -> None:
        self.folder = folder
        self.aws = aws
        (folder / "inventory/group_vars").mkdir(parents=True)
        for name in ("aws_ec2.yml", "group_vars/aws_ec2.yml"):
            (folder / "inventory" / name).write_text((REPOSITORY / "inventory" / name).read_text())
        self.key = folder / "id_ed25519.pub"
        self.key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMadeUpForTests admin@test\n")
        # Hosts are made up, too: SSH is a program that notes the attempt and reaches nobody.
        self.ssh_log = folder / "ssh.log"
        ssh = folder / "ssh"
        ssh.write_text(f'#!/bin/sh\necho "$@" >>"{self.ssh_log}"\nexit 255\n')
        ssh.chmod(0o755)
        self.ssh: dict[str, str] = {"ANSIBLE_SSH_EXECUTABLE": str(ssh)}
        self.knobs: dict[str, object] = {
            "cluster_name": "orchard",
            "cluster_region": REGION,
            "cluster_bucket": "orchard-bucket",
            "cluster_secrets": str(folder / "secrets"),
            "ec2_admin_cidrs": ["203.0.113.7/32"],
            "ec2_ssh_public_key": str(self.key),
        } | knobs
        self.set()

    def set(self, **knobs: object) -> None:
        """Write the knobs, as an admin does with an editor."""
        self.knobs = self.knobs | knobs
        text = yaml.safe_dump(self.knobs)
        (self.folder / "inventory/group_vars/all.yml").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        return self.aws.environment | {
            "ANSIBLE_INVENTORY": str(self.folder / "inventory/aws_ec2.yml"),
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            **self.ssh,
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp"),
            "SPARK_CONF_DIR": str(self.folder / "conf"),
            "ANSIBLE_NOCOLOR": "1",
            "COLUMNS": "200",
        }

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            timeout=1500,
        )

    @cached_property
    def _ansible(self) -> subprocess.Popen[str]:
        """Ansible with this admin's environment, which it reads when it is imported."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.aws.preloaded"],
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        weakref.finalize(self, _end, process)
        return process

    def try_to_play(self, playbook: str, *arguments: str) -> Play:
        """Run a playbook, whatever becomes of it."""
        output = self.folder / "output.txt"
        request = {"arguments": [f"ansible/{playbook}", *arguments], "output": str(output)}
        assert self._ansible.stdin and self._ansible.stdout
        print(json.dumps(request), file=self._ansible.stdin, flush=True)
        status = self._ansible.stdout.readline()
        assert status, "expected the preloaded Ansible to answer, found that it has ended"
        return Play(int(status), output.read_text())

    def play(self, playbook: str, *arguments: str, fails: bool = False) -> Play:
        """Run a playbook, and expect that it passes, or that it fails."""
        play = self.try_to_play(playbook, *arguments)
        assert (play.status != 0) == fails, play.output[-6000:]
        return play


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)


class Play:
    """What a playbook said, and its exit status."""

    def __init__(self, status: int, output: str) -> None:
        self.status, self.output = status, output

    @property
    def changed(self) -> int:
        return int(re.findall(r"^localhost +:.* changed=(\d+)", self.output, re.MULTILINE)[-1])

    def says(self, text: str) -> bool:
        return text in " ".join(self.output.replace("\\n", " ").split())
