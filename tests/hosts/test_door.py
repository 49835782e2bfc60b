"""The analyst's day, from a browser that reaches nothing but the door."""

from __future__ import annotations

import json
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from pipeline.present.browser import MILLISECONDS, chromium
from tests.hosts.cluster import Work, on, secrets_of, workers_alive
from tests.hosts.rehearsal import Rehearsal
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(2400)

SECOND = 1000  # Playwright counts milliseconds
expect.set_options(timeout=MILLISECONDS)
NOTEBOOK = "fruits.ipynb"


@pytest.fixture(scope="module")
def door(converged: Rehearsal) -> str:
    return f"https://{converged.machines.hosts['master'].address}:8443"


@pytest.fixture(scope="module")
def outside(
    converged: Rehearsal, door: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrowserContext]:
    """A browser in a network namespace of its own, whose only way leads to the hosts."""
    converged.machines.outsider()
    program = tmp_path_factory.mktemp("browser") / "chromium"
    namespace = converged.machines.network.namespace("outsider")
    program.write_text(f'#!/bin/sh\nexec ip netns exec {namespace} chromium "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with chromium(str(program)) as browser:
        context = browser.new_context(
            base_url=door, ignore_https_errors=True, viewport={"width": 1400, "height": 900}
        )
        context.set_default_timeout(MILLISECONDS)
        yield context


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a screenshot of each step is kept."""
    return tmp_path_factory.mktemp("pictures-of-the-door")


@pytest.fixture(scope="module")
def inside(outside: BrowserContext, converged: Rehearsal, pictures: Path) -> BrowserContext:
    """The same browser, logged in."""
    page = outside.new_page()
    page.goto("/lab?reset")
    log_in(page, "not-the-password")
    expect(page.get_by_text("Invalid credentials")).to_be_visible()
    page.screenshot(path=pictures / "1-wrong-password.png")
    log_in(page, secrets_of(converged)["password"])
    expect(page.get_by_role("button", name="Spark master and workers")).to_be_visible()
    page.screenshot(path=pictures / "2-launcher.png")
    page.close()
    return outside


def log_in(page: Page, password: str) -> None:
    page.locator("#password_input").fill(password)
    page.locator("#login_submit").click()


def content(page: Page) -> list[dict]:
    """Return the code cells of the notebook as JupyterLab last saved it."""
    answer = page.request.get(f"/api/contents/{NOTEBOOK}")
    cells = answer.json()["content"]["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and cell["source"]]


def run_all(page: Page) -> None:
    # JupyterLab runs nothing, and says nothing, before the notebook has its kernel.
    expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def scroll_to(page: Page, target: Locator, seconds: float) -> None:
    """Look for something from the top of the notebook down: what is far away is not drawn."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        top, height = 0, 1
        while top < height:
            height = page.evaluate(SCROLL, top)
            page.wait_for_timeout(0.3 * SECOND)
            if target.count() and target.first.is_visible():
                target.first.evaluate("element => element.scrollIntoView({block: 'center'})")
                page.wait_for_timeout(SECOND)
                return
            top += 600
    raise AssertionError(f"expected {target} in the notebook within {seconds} s")


SCROLL = """top => {
    const panel = document.querySelector(".jp-WindowedPanel-outer");
    panel.scrollTo(0, top);
    return panel.scrollHeight;
}"""


def save(page: Page) -> list[dict]:
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2 * SECOND)
    return content(page)


def query(page: Page, expression: str) -> dict[str, float]:
    """Ask Prometheus through the door; return values by host."""
    answer = page.request.get("/prometheus/api/v1/query", params={"query": expression})
    assert answer.status == 200, answer.text()
    found = answer.json()["data"]["result"]
    return {one["metric"].get("host", ""): float(one["value"][1]) for one in found}


@pytest.fixture(scope="module")
def analysed(inside: BrowserContext, work: Work, pictures: Path) -> dict:
    """What the notebook held when all its cells had run, and what was seen meanwhile.

    In the middle a worker loses its power; it is back when the notebook has ended.
    """
    notebook = f"/var/lib/fruits/analyst/notebooks/{NOTEBOOK}"
    on(work.rehearsal, "master", f"sed -i 's/share = 0.5/share = 1/' {notebook}")
    page = inside.new_page()
    page.goto(f"/lab/tree/{NOTEBOOK}")
    expect(page.get_by_role("heading", name="From fruit photos to a matrix")).to_be_visible()
    run_all(page)
    link = page.get_by_role("link", name="this application")
    scroll_to(page, link, seconds=600)
    address = link.get_attribute("href")
    assert address
    scroll_to(page, page.get_by_text(re.compile(r"\d+ of \d+ images")), seconds=600)
    seen = {"3-notebook": page.screenshot()}

    spark = inside.new_page()
    spark.goto(address)
    seen["4-application"] = spark.screenshot(full_page=True)
    spark.goto(address.replace("/jobs/", "/executors/"))
    table = spark.locator("#active-executors-table")
    hosts = [work.rehearsal.machines.hosts[name].address for name in ("worker1", "worker2")]

    def both_are_there() -> bool:
        """An executor that had nothing to do for a minute was given back; it returns."""
        spark.reload()
        table.wait_for()
        spark.wait_for_timeout(SECOND)
        return all(host in table.inner_text() for host in hosts)

    eventually(both_are_there, 60)
    executors = table.inner_text()
    seen["5-executors"] = spark.screenshot(full_page=True)
    spark.close()

    work.rehearsal.machines.kill("worker2")
    try:
        cells = save(page)
        at_the_loss = [cell["execution_count"] for cell in cells]
        deadline = time.monotonic() + 900
        while cells[-1]["execution_count"] is None and time.monotonic() < deadline:
            cells = save(page)
        page.evaluate(SCROLL, 100_000)
        page.wait_for_timeout(2 * SECOND)
        page.screenshot(path=pictures / "6-end.png")
        page.close()
    finally:
        work.rehearsal.machines.start("worker2")
    for name, picture in seen.items():  # only now: the disk may be slow, and the notebook is not
        (pictures / f"{name}.png").write_bytes(picture)
    assert eventually(lambda: len(workers_alive(work.rehearsal)) == 2)
    return {
        "cells": cells,
        "at_the_loss": at_the_loss,
        "address": address,
        "executors": executors,
    }


def test_every_cell_ends_well_and_the_plots_are_there(analysed: dict) -> None:
    cells = analysed["cells"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"], outputs
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 7


def test_a_worker_without_power_does_not_stop_it(analysed: dict) -> None:
    assert None in analysed["at_the_loss"]
    assert None not in [cell["execution_count"] for cell in analysed["cells"]]


def test_the_applications_page_is_reached_from_the_notebook_and_shows_both_workers(
    analysed: dict, converged: Rehearsal
) -> None:
    assert re.fullmatch(r"/spark/proxy/app-[0-9-]+/jobs/", analysed["address"])
    for worker in ("worker1", "worker2"):
        assert converged.machines.hosts[worker].address in analysed["executors"]


def test_the_matrix_is_on_s3(analysed: dict, work: Work) -> None:
    run = work.report("notebook")
    assert run["counts"]["features"] == run["counts"]["listed"] > 0
    # A cell before the last had computed all of them.
    assert run["counts"]["reused"] == run["largest_pass"]["images"] == run["counts"]["listed"]


def test_the_history_shows_the_finished_application(
    analysed: dict, inside: BrowserContext, pictures: Path
) -> None:
    application = analysed["address"].split("/")[3]
    page = inside.new_page()

    def it_is_listed() -> bool:
        page.goto("/spark-history/")
        page.wait_for_timeout(3 * SECOND)
        return page.get_by_text(application).count() > 0

    assert eventually(it_is_listed)
    page.screenshot(path=pictures / "7-history.png")
    page.get_by_text(application).first.click()
    expect(page.get_by_text("Completed Jobs").first).to_be_visible()
    assert page.url.startswith(str(page.evaluate("location.origin")))
    page.close()


def test_every_link_of_the_masters_page_works_through_the_door(
    inside: BrowserContext, analysed: dict, door: str, pictures: Path
) -> None:
    page = inside.new_page()
    page.goto("/spark/")
    page.screenshot(path=pictures / "8-master.png", full_page=True)
    hrefs = page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)")
    here = {href.partition("#")[0] for href in hrefs if not href.startswith("javascript:")}
    assert len([href for href in here if "/proxy/worker-" in href]) == 2
    for href in sorted(here):
        assert href.startswith(door), href
        answer = page.request.get(href)
        assert answer.status == 200, href
        assert answer.url.startswith(door), answer.url
    page.close()


def test_metrics_of_every_host_and_of_spark_are_behind_the_door(
    inside: BrowserContext, analysed: dict, pictures: Path, door: str
) -> None:
    launcher = inside.new_page()
    launcher.goto("/lab?reset")
    with inside.expect_page() as opened:
        launcher.get_by_role("button", name="Metrics").click()
    opened.value.wait_for_url("**/prometheus/consoles/cluster.html")
    opened.value.close()
    launcher.close()

    failures: list[str] = []
    page = inside.new_page()
    page.on("requestfailed", lambda request: failures.append(request.url))
    page.on("response", lambda got: failures.append(got.url) if got.status >= 400 else None)
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto("/prometheus/consoles/cluster.html")
    expect(page.locator(".graphs svg path.path").nth(8)).to_be_attached()
    page.wait_for_timeout(2 * SECOND)
    page.screenshot(path=pictures / "9-metrics.png", full_page=True)
    assert "2 of 2" in page.locator(".figures").inner_text()
    assert page.get_by_text("No timeseries returned").count() == 0
    assert not failures
    # Debian's own pages of Prometheus, one of which has an error of its own in a script.
    for link in page.locator("p a").all():
        assert page.request.get(str(link.get_attribute("href"))).status == 200

    everyone = {"master-1", "worker1", "worker2"}
    workers = everyone - {"master-1"}
    jobs = {"host": everyone, "spark-master": {"master-1"}, "spark-worker": workers}
    for job, members in jobs.items():  # one that was slow to answer is asked again every 10 s
        up = f'up{{job="{job}"}} == 1'
        assert eventually(lambda up=up, members=members: query(page, up).keys() == members), job
    # A slot on each worker, seen while the notebook ran.
    most = "max_over_time(sum(metrics_executor_totalCores)[15m:15s])"
    assert list(query(page, most).values()) == [2]
    page.goto("/prometheus/")  # its own page of questions, which its root redirects to
    expect(page.get_by_role("button", name="Execute")).to_be_visible()
    assert page.url.startswith(f"{door}/prometheus/")
    page.close()


def test_the_pictures_are_kept(analysed: dict, pictures: Path, converged: Rehearsal) -> None:
    kept = sorted(file.name for file in pictures.glob("*.png"))
    assert len(kept) == 9, json.dumps(kept)
    on(converged, "master", "rm -rf /var/lib/fruits/analyst/notebooks/.ipynb_checkpoints")
