"""The one door to a cluster: JupyterLab over TLS, and every Spark page behind its login.

Spark's pages answer only to requests that carry a token made of the cluster's page key. JupyterLab
has the key, so jupyter-server-proxy passes on the requests of whoever is logged in. The playbooks
write a configuration that calls `configure`, and call the commands at the end on the master.

    python -m pipeline.cluster.door password FILE   keep the hash of the password on standard input
    python -m pipeline.cluster.door token FILE      keep the token of the key on standard input
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.cluster.master import page_token

WHOLE_FILES = "pipeline.cluster.notebook_files.WholeFiles"  # by name: workers have no JupyterLab
RUNNING = "running-application"  # the address that EXTENSION answers
EXTENSION = "pipeline.cluster.running"
TITLES = {
    "spark": "Spark master and workers",
    RUNNING: "Running application",
    "spark-history": "Spark history",
    "prometheus": "Metrics",
}
FIRST_PAGES = {"prometheus": "prometheus/consoles/cluster.html"}  # where it is not the root
TEMPLATES = Path(__file__).with_name("templates")


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
    c.ServerApp.jpserver_extensions = {
        "jupyter_server_proxy": True,
        "pipeline.cluster.running": True,
    }
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


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["password", file]:
            changed = keep_password(Path(file), sys.stdin.read().strip())
            sys.stdout.write("kept\n" if changed else "unchanged\n")
        case ["token", file]:
            changed = keep_token(Path(file), sys.stdin.read().strip())
            sys.stdout.write("kept\n" if changed else "unchanged\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
