"""Ansible, imported once and forked for each playbook, which its start makes dear.

    python -m tests.aws.preloaded

reads lines of JSON, the arguments of `ansible-playbook` and the file for what it says, and answers
each with its exit status. What runs is Ansible's own command, in a process of its own. Modules that
were packed for one playbook are there for the next.
"""

from __future__ import annotations

import json
import os
import sys

import boto3.session  # noqa: F401  what the inventory of EC2 imports
from ansible.cli import playbook


def play(arguments: list[str], output: str) -> int:
    """Run a playbook in a process of its own; return its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        playbook.main(["ansible-playbook", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve until the one who asks is gone."""
    for line in sys.stdin:
        request = json.loads(line)
        print(play(request["arguments"], request["output"]), flush=True)


if __name__ == "__main__":
    main()
