"""Waits on a spot instance for EC2's two minutes' notice, then lets Spark's worker hand over.

    python -m pipeline.cluster.spot [ADDRESS_OF_THE_METADATA_SERVICE]

Ends after the notice was passed on. The metadata service is asked by IMDSv2 only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA = "http://169.254.169.254"
SECONDS_BETWEEN = 5.0
MAIN_PROCESS = ("systemctl", "show", "--property=MainPID", "--value", "spark-worker")


def notice(metadata: str = METADATA) -> str | None:
    """Return what EC2 will do to this instance and when, as JSON; None while it will do nothing."""
    ask = urllib.request.Request(  # noqa: S310
        f"{metadata}/latest/api/token",
        method="PUT",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
    )
    with urllib.request.urlopen(ask, timeout=2) as answer:  # noqa: S310
        token = answer.read().decode()
    ask = urllib.request.Request(  # noqa: S310
        f"{metadata}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token},
    )
    try:
        with urllib.request.urlopen(ask, timeout=2) as answer:  # noqa: S310
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def drain() -> None:
    """Tell Spark's worker, which runs as the same user, to hand over and to take no more tasks."""
    shown = subprocess.run(MAIN_PROCESS, check=True, capture_output=True, text=True)  # noqa: S603
    os.kill(int(shown.stdout), signal.SIGPWR)


def main(arguments: list[str]) -> None:
    """Wait for the notice, then drain the worker."""
    metadata = arguments[0] if arguments else METADATA
    while True:
        try:
            found = notice(metadata)
        except OSError as error:
            sys.stderr.write(f"the metadata service did not answer: {error}\n")
        else:
            if found is not None:
                sys.stderr.write(f"EC2 takes this instance back: {found}\n")
                drain()
                return
        time.sleep(SECONDS_BETWEEN)


if __name__ == "__main__":
    main(sys.argv[1:])
