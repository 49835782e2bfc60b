"""The way from JupyterLab's launcher to the page of the application that runs now.

Its address changes with every application: this server extension of JupyterLab asks the master and
redirects. `pipeline.cluster.door` turns it on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_server.base.handlers import JupyterHandler
from tornado import web

from pipeline.cluster.door import RUNNING
from pipeline.cluster.master import master_state


class RunningApplication(JupyterHandler):
    """Redirects to the newest running application; to the master's page when none runs."""

    def initialize(self, page: str, token: str) -> None:
        """Keep where the master's page is, and what opens it."""
        self.page, self.page_token = page, token

    @web.authenticated
    async def get(self) -> None:
        """Answer with the redirect."""
        try:
            state = await asyncio.to_thread(master_state, self.page, self.page_token)
        except OSError as error:
            raise web.HTTPError(
                503, f"The Spark master does not answer ({error}). Try again in a minute."
            ) from error
        running = sorted(state["activeapps"], key=lambda application: application["starttime"])
        below = f"proxy/{running[-1]['id']}/" if running else ""
        self.redirect(f"{self.base_url}spark/{below}")


def _load_jupyter_server_extension(server: Any) -> None:
    where = dict(server.config.RunningApplication)
    address = f"{server.web_app.settings['base_url']}{RUNNING}/"
    server.web_app.add_handlers(".*$", [(address, RunningApplication, where)])


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "pipeline.cluster.running"}]
