"""Host keys are read from the consoles, and pinned under the instances' ids."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

from tests.aws.account import REGION, Account, Answer, Request

CONSOLE = """[   12.3] cloud-init[412]: Cloud-init v. 22.4.2 running 'modules:final'
<14>Jan  1 00:00:00 cloud-init: #############################################################
-----BEGIN SSH HOST KEY KEYS-----
ecdsa-sha2-nistp256 AAAAE2VjZHNh root@ip-10-80-0-4
ssh-ed25519 AAAAC3NzaC1l root@ip-10-80-0-4
-----END SSH HOST KEY KEYS-----
[   13.0] cloud-init[412]: finished
"""


def test_host_keys_are_what_the_console_printed(aws: Account) -> None:
    def console(request: Request) -> Answer | None:
        if request.action != "GetConsoleOutput":
            return None
        text = CONSOLE if request.parameters["InstanceId"] == "i-1" else "booting"
        body = base64.b64encode(text.encode()).decode()
        return Answer(
            200,
            '<GetConsoleOutputResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
            f"<instanceId>i-1</instanceId><output>{body}</output></GetConsoleOutputResponse>",
        )

    with aws.answering(console):
        run = subprocess.run(
            [sys.executable, "-m", "pipeline.cluster.ec2", "host-keys", "i-1", "i-2"],
            env=aws.environment | {"AWS_DEFAULT_REGION": REGION},
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(run.stdout) == {
        "i-1": ["ecdsa-sha2-nistp256 AAAAE2VjZHNh", "ssh-ed25519 AAAAC3NzaC1l"],
        "i-2": [],
    }
