"""The one door to a cluster: JupyterLab over TLS, and every Spark page behind its login.

Spark's pages answer only to requests that carry a token made of the cluster's page key. JupyterLab
has the key, so jupyter-server-proxy passes on the requests of whoever is logged in. The playbooks
write a configuration that calls `configure`, and call the commands at the end on the master.

    python -m pipeline.door password FILE          keep the hash of the password on standard input
    python -m pipeline.door token FILE             keep the token of the key on standard input
    python -m pipeline.door event-logs SETTINGS    make the folder of Spark's event logs
    python -m pipeline.door recovered SETTINGS PAGE   does the master that started know its slots?
    python -m pipeline.door worker SETTINGS MASTER_PAGE ADDRESS   is this worker registered?
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.session import read_settings_of
from pipeline.storage import Address, S3Settings, open_store

PAGE_KEY = "spark.org.apache.spark.ui.JWSFilter.param.secretKey"
WHOLE_FILES = "pipeline.notebook_files.WholeFiles"  # by name: workers have no JupyterLab
SECONDS_TO_RECOVER = 45.0  # of a master that starts; its unit allows 300
RUNNING = "running-application"  # the address that pipeline.running answers
TITLES = {
    "spark": "Spark master and workers",
    RUNNING: "Running application",
    "spark-history": "Spark history",
    "prometheus": "Metrics",
}
FIRST_PAGES = {"prometheus": "prometheus/consoles/cluster.html"}  # where it is not the root
TEMPLATES = Path(__file__).with_name("templates")


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


def configure(
    c: Any,
    *,
    port: int,
    certificate: str,
    key: str,
    password: str,
    page_key: str,
    pages: Mapping[str, int],
    notebooks: str,
) -> None:
    """Fill in JupyterLab's configuration object.

    Parameters
    ----------
    certificate, key, password, page_key
        Files: the two of TLS, the hash that `keep_password` writes, the key of Spark's pages.
    pages
        Ports on loopback of Spark's pages, and of Prometheus, by the path that they get.
    """
    c.ServerApp.ip = "0.0.0.0"  # noqa: S104  the firewall says who reaches it
    c.ServerApp.port = port
    c.ServerApp.port_retries = 0
    c.ServerApp.open_browser = False
    c.ServerApp.certfile = certificate
    c.ServerApp.keyfile = key
    c.ServerApp.root_dir = notebooks
    c.ServerApp.contents_manager_class = WHOLE_FILES
    c.ServerApp.allow_remote_access = True
    c.ServerApp.quit_button = False
    c.ServerApp.extra_template_paths = [str(TEMPLATES / "jupyter")]
    # Kernels talk to it over sockets in its runtime folder, not over ports that any user reaches.
    c.KernelManager.transport = "ipc"
    # It asks nobody on the internet for its updates.
    c.LabApp.check_for_updates_class = "jupyterlab.handlers.announcements.NeverCheckForUpdate"
    # Told by JupyterLab in its runtime folder only: for who watches on this host what kernels do.
    c.IdentityProvider.token = secrets.token_hex(32)
    c.PasswordIdentityProvider.hashed_password = Path(password).read_text().strip()
    c.PasswordIdentityProvider.password_required = True
    c.PasswordIdentityProvider.allow_password_change = False  # the admin's playbook keeps it
    c.IdentityProvider.cookie_options = {"SameSite": "Strict"}
    token = page_token(Path(page_key).read_text().strip())
    c.ServerProxy.servers = {
        **{name: _page(name, port, token) for name, port in pages.items()},
        RUNNING: {"launcher_entry": _launcher_entry(RUNNING), "new_browser_tab": True},
    }
    c.ServerApp.jpserver_extensions = {"jupyter_server_proxy": True, "pipeline.running": True}
    c.RunningApplication.page = f"http://127.0.0.1:{pages['spark']}"
    c.RunningApplication.token = token


def _page(name: str, port: int, token: str) -> dict[str, Any]:
    return {
        "port": port,
        "absolute_url": False,
        "request_headers_override": {"Authorization": f"Bearer {token}"},
        "rewrite_response": _keep_inside(f"/{name}"),
        "launcher_entry": _launcher_entry(name),
        "new_browser_tab": True,
    }


def _launcher_entry(name: str) -> dict[str, str]:
    return {
        "title": TITLES[name],
        "path_info": FIRST_PAGES.get(name, f"{name}/"),
        "icon_path": str(TEMPLATES / "spark-page.svg"),
        "category": "Notebook",  # JupyterLab shows icons for this one only
    }


def _keep_inside(prefix: str) -> Callable[[Any], None]:
    """Turn a redirect to Spark's own address into one below the door."""

    def rewrite(response: Any) -> None:
        if "Location" not in response.headers:
            return
        to = urlsplit(response.headers["Location"])
        path = to.path.removeprefix(prefix) or "/"
        response.headers["Location"] = f"{path}?{to.query}" if to.query else path

    return rewrite


def keep_password(file: Path, password: str) -> bool:
    """Write the hash of a password to a file that lacks it; tell whether it was written."""
    from jupyter_server.auth.security import passwd, passwd_check

    if file.exists() and passwd_check(file.read_text().strip(), password):  # type: ignore[no-untyped-call]
        return False
    file.touch(mode=0o600)
    file.write_text(f"{passwd(password)}\n")  # type: ignore[no-untyped-call]
    return True


def keep_token(file: Path, key: str) -> bool:
    """Write the token that a page key makes to a file that lacks it; tell whether it did."""
    token = page_token(key)
    if file.exists() and file.read_text() == token:
        return False
    file.touch(mode=0o600)
    file.write_text(token)
    return True


def make_event_log_folder(settings: Mapping[str, str]) -> bool:
    """Make the folder in which Spark wants to write; tell whether it was missing."""
    folder = open_store(
        Address.parse(settings["spark.eventLog.dir"]), S3Settings.from_spark(settings)
    )
    if folder.read(".keep") is not None:
        return False
    folder.write(".keep", b"")
    return True


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


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["password", file]:
            changed = keep_password(Path(file), sys.stdin.read().strip())
            sys.stdout.write("kept\n" if changed else "unchanged\n")
        case ["token", file]:
            changed = keep_token(Path(file), sys.stdin.read().strip())
            sys.stdout.write("kept\n" if changed else "unchanged\n")
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
