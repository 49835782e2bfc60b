"""What Spark's master says of its workers and applications, on a page that wants a token.

    python -m pipeline.cluster.master event-logs SETTINGS   make the folder of Spark's event logs
    python -m pipeline.cluster.master recovered SETTINGS PAGE
                                            does the master that started know its slots?
    python -m pipeline.cluster.master worker SETTINGS PAGE ADDRESS   is this worker registered?

The playbooks call these on the master; SETTINGS is Spark's file of them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.engine.session import read_settings_of
from pipeline.s3.access import settings_here
from pipeline.storage import Address, open_store

PAGE_KEY = "spark.org.apache.spark.ui.JWSFilter.param.secretKey"
SECONDS_TO_RECOVER = 45.0  # of a master that starts; its unit allows 300


def page_token(key: str) -> str:
    """Return the token that Spark's JWSFilter wants (RFC 7515, HS384).

    Parameters
    ----------
    key
        The base64url form of at least 48 bytes.
    """
    head, claims = (_base64url(json.dumps(part).encode()) for part in ({"alg": "HS384"}, _CLAIMS))
    secret = base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
    signature = hmac.new(secret, f"{head}.{claims}".encode(), hashlib.sha384).digest()
    return f"{head}.{claims}.{_base64url(signature)}"


_CLAIMS = {"sub": "door"}


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def master_state(page: str, token: str | None = None) -> dict[str, Any]:
    """Return what the master's page says of workers and applications.

    Parameters
    ----------
    page
        The address of the master's page.
    token
        What `page_token` made of the page key; None where pages need none.

    Raises
    ------
    OSError
        When it does not answer.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{page}/json/", headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        state: dict[str, Any] = json.load(answer)
    return state


def registered_workers(page: str, token: str | None = None) -> list[dict[str, Any]]:
    """Return the workers that are alive, as the master's page tells them."""
    return alive_workers(master_state(page, token))


def alive_workers(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the workers of a `master_state` that are alive."""
    return [worker for worker in state["workers"] if worker["state"] == "ALIVE"]


def miscounted(
    workers: Iterable[Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]
) -> set[str]:
    """Return the ids of workers that use another number of slots than their master thinks.

    Parameters
    ----------
    workers
        What the master tells of its workers.
    own
        What workers tell of themselves, by id; one that did not answer is not in it.
    """
    return {
        worker["id"]
        for worker in workers
        if worker["id"] in own and own[worker["id"]]["coresused"] != worker["coresused"]
    }


def await_recovery(page: str, token: str, *, looks: int = 5, pause: float = 3.0) -> set[str]:
    """Wait until a master has started; return the workers that it counts wrongly in every look.

    A worker that registers by itself in the moment in which a restarted master (Spark 4.3) asks it
    what it runs is told to kill its executor, and counted as using the slot for ever. Another start
    of the master, which asks again, puts it right.
    """
    deadline = time.monotonic() + SECONDS_TO_RECOVER
    while True:
        try:
            state = master_state(page, token)
        except OSError:
            state = {"status": "not there yet", "activeapps": []}
        if state["status"] == "ALIVE":
            break
        if time.monotonic() > deadline:
            return set()  # it is another's to tell
        time.sleep(0.5)
    if not state["activeapps"]:
        return set()
    wrong: set[str] | None = None
    for _ in range(looks):
        time.sleep(pause)
        try:
            workers = alive_workers(master_state(page, token))
        except OSError:  # it has no time to answer: the next look tells
            continue
        own = {}
        for worker in workers:
            with suppress(OSError):
                own[worker["id"]] = master_state(worker["webuiaddress"], token)
        found = miscounted(workers, own)
        wrong = found if wrong is None else wrong & found
        if not wrong:
            return set()
    return wrong or set()


def make_event_log_folder(settings: Mapping[str, str]) -> bool:
    """Make the folder in which Spark wants to write; tell whether it was missing."""
    folder = open_store(Address.parse(settings["spark.eventLog.dir"]), settings_here(settings))
    if folder.read(".keep") is not None:
        return False
    folder.write(".keep", b"")
    return True


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["event-logs", settings]:
            made = make_event_log_folder(read_settings_of(Path(settings)))
            sys.stdout.write("made\n" if made else "unchanged\n")
        case ["recovered", settings, page]:
            token = page_token(read_settings_of(Path(settings))[PAGE_KEY])
            if wrong := await_recovery(page, token):
                sys.exit(f"expected free slots on {', '.join(sorted(wrong))}, found them counted")
        case ["worker", settings, page, address]:
            token = page_token(read_settings_of(Path(settings))[PAGE_KEY])
            hosts = {worker["host"] for worker in registered_workers(page, token)}
            if address not in hosts:
                sys.exit(f"expected a worker at {address}, found {', '.join(hosts) or 'none'}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
