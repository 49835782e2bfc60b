"""Finds Chromium on this machine and prints pages with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, sync_playwright

from pipeline.errors import BrowserError

MILLISECONDS = 180_000  # a page needs one or two thousand, on a machine that stands still more
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# It asks its maker's servers for updates and the like at every start, unless it is told not to.
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]


@contextmanager
def chromium(program: str | None = None) -> Iterator[Browser]:
    """Start Chromium without a window, and end it.

    Parameters
    ----------
    program
        What to start; None takes CHROMIUM, a Chromium on the PATH, or Playwright's own.

    Raises
    ------
    BrowserError
        When there is none, or it does not start.
    """
    found = (
        program or os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    )
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=found,
                args=QUIET,
                timeout=MILLISECONDS,
                # Chromium's own sandbox cannot be set up by root; what is opened here is our own.
                chromium_sandbox=os.geteuid() != 0,
            )
        except Error as error:
            raise BrowserError(
                f"expected a Chromium that starts, found {found or 'none'}: "
                f"{str(error).splitlines()[0]}. Install one (sudo apt install chromium, or "
                ".venv/bin/playwright install chromium), or name it: CHROMIUM=/path/to/chrome"
            ) from error
        try:
            yield browser
        finally:
            browser.close()


def print_to_pdf(page: Path, target: Path, query: str, ready: str) -> None:
    """Print an HTML file, in the size that it asks for itself.

    Parameters
    ----------
    query
        What follows the `?` of its address.
    ready
        A condition in JavaScript, true once it may be printed.
    """
    with chromium() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(MILLISECONDS)
        tab.goto(f"{page.absolute().as_uri()}?{query}", wait_until="load")
        tab.wait_for_function(ready)
        tab.pdf(path=target, prefer_css_page_size=True, print_background=True)
