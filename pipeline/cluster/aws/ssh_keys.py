"""Looks at SSH's keys: the admin's public one, and the hosts', as their consoles printed them."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.aws.account import Account
from pipeline.cluster.aws.asking import Asking

PUBLIC_KEY = re.compile(r"(ssh-(rsa|ed25519)|ecdsa-sha2-\S+|sk-\S+) AAAA\S+")
HOST_KEYS = re.compile(
    r"-----BEGIN SSH HOST KEY KEYS-----(.*?)-----END SSH HOST KEY KEYS-----", re.DOTALL
)


def check_public_key(asking: Asking, found: Account) -> None:
    """Refuse a file that is no public key; a private one would go to AWS."""
    file = Path(asking.knobs["public_key"]).expanduser()
    try:
        text = file.read_text().strip()
    except OSError as error:
        there = error.strerror
    else:
        if PUBLIC_KEY.match(text):
            return
        there = "something else"
    found.add_problem(
        f"Expected an SSH public key in {file} (ec2_ssh_public_key), found: {there}. "
        "Name the right file, or make a key: ssh-keygen -t ed25519"
    )


def host_keys(ec2: Any, instances: Sequence[str]) -> dict[str, list[str]]:
    """Return the SSH host keys that cloud-init printed on each console.

    Parameters
    ----------
    ec2
        A client of EC2.
    instances
        Ids; one whose console has no keys yet (it takes minutes) has an empty list.
    """
    keys = {}
    for instance in instances:
        output = ec2.get_console_output(InstanceId=instance).get("Output", "")
        printed = HOST_KEYS.search(_console(output))
        lines = printed[1].split("\n") if printed else []
        # Each line may follow a time stamp of the kernel; a comment comes last.
        found = (PUBLIC_KEY.search(line) for line in lines)
        keys[instance] = [match[0] for match in found if match]
    return keys


def _console(output: str) -> str:
    """Return the text of a console, which some clients get still encoded."""
    if "SSH HOST KEY" in output:
        return output
    try:
        return base64.b64decode(output, validate=True).decode(errors="replace")
    except ValueError:
        return output
