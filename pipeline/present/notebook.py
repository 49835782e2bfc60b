"""What only a notebook needs: its share of the cluster, links to Spark's pages, progress."""

from __future__ import annotations

import html
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from IPython.core.getipython import get_ipython
from IPython.core.interactiveshell import ExecutionResult
from IPython.display import HTML, display
from py4j.protocol import Py4JError
from pyspark import SparkContext
from pyspark.sql import SparkSession

from pipeline.cluster.master import PAGE_KEY, alive_workers, master_state, page_token
from pipeline.console import STAGES, duration
from pipeline.engine.session import make_session, read_settings, task_slots
from pipeline.errors import ClusterError
from pipeline.features import Progress
from pipeline.local.place import fetch_weights
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, open_store

# Executors that have nothing to do go after a minute and come back with the next cell: a notebook
# that was left open holds no core. What they shuffled is kept a little longer.
GIVE_BACK = {
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.timeout": "120s",
    "spark.dynamicAllocation.cachedExecutorIdleTimeout": "120s",
    "spark.dynamicAllocation.executorIdleTimeout": "60s",
}


def connect(share: float = 0.5, name: str = "notebook") -> SparkSession:
    """Start an application that takes part of the cluster, and show where its pages are.

    Parameters
    ----------
    share
        The part of the cluster's cores and memory that this notebook takes at most: with one half,
        two notebooks run side by side.
    name
        Shown in Spark's pages.

    Raises
    ------
    ClusterError
        When no cluster is described, its master does not answer, or it has no worker.
    ValueError
        When `share` is not above 0 and up to 1.
    """
    settings = read_settings()
    workers = _workers(settings)
    spark = make_session(name, settings={**share_of(workers, share), **GIVE_BACK})
    shell = get_ipython()
    if shell is not None:
        shell.events.register("post_run_cell", _cancel_when_interrupted)
    _show(_links(spark, settings, sum(worker["cores"] for worker in workers)))
    return spark


def _cancel_when_interrupted(result: ExecutionResult) -> None:
    # PySpark cancels on Ctrl-C in a script; the kernel has put its own handler in the place of its.
    # (The session of this thread is not known after an interruption: PySpark talks to another of
    # the JVM's threads from then on.)
    context = SparkContext._active_spark_context
    if context is None or not _was_interrupted(result.error_in_exec):
        return
    # Py4J has the JVM close all connections that it finds then, even one made for this very call.
    for wait in (0.1, 0.5, 1):
        with suppress(Py4JError):
            context.cancelAllJobs()
            return
        time.sleep(wait)
    context.cancelAllJobs()


def _was_interrupted(error: BaseException | None) -> bool:
    """Look also at what the error came from: on its way out, PySpark talks to the JVM once more."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _workers(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    page, key = settings.get("spark.fruits.page"), settings.get(PAGE_KEY)
    if page is None:
        raise ClusterError(
            "expected a cluster, found none: SPARK_CONF_DIR names no spark-defaults.conf of one. "
            "Open the notebook by `make lab`, or in JupyterLab on a cluster's master."
        )
    try:
        return alive_workers(master_state(page, page_token(key) if key else None))
    except OSError as error:
        raise ClusterError(
            f"expected the Spark master to answer, found: {error}. Try again in a minute; if it "
            "stays so, the admin's check.yml tells why."
        ) from error


def share_of(workers: list[dict[str, Any]], share: float) -> dict[str, str]:
    """Return the settings that keep an application to a share of the cluster.

    Parameters
    ----------
    workers
        As the master's page tells them.
    share
        As for `connect`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share above 0 and up to 1, found {share}.")
    if not workers:
        raise ClusterError(
            "expected at least one worker, found none that is alive. Try again in a minute; if it "
            "stays so, the admin's check.yml tells why."
        )
    cores = max(1, math.floor(share * sum(worker["cores"] for worker in workers)))
    memory = min(worker["memory"] for worker in workers)
    return {
        "spark.cores.max": str(cores),
        "spark.executor.memory": f"{max(SMALLEST_EXECUTOR_MB, math.floor(share * memory))}m",
    }


SMALLEST_EXECUTOR_MB = 512  # Spark refuses less than 450


def weights_in(home: str, given: str, s3: S3Settings) -> str | None:
    """Return a local file of weights, None where the bucket has none to choose.

    Parameters
    ----------
    home
        Where the cluster keeps things; its `weights/` is looked at when nothing is given.
    given
        A file or an address on S3; empty takes the only `.h5` file of `weights/`.
    """
    if not given:
        below = Address.parse(f"{home}/weights")
        found = [entry.key for entry in open_store(below, s3).list() if entry.key.endswith(".h5")]
        if len(found) != 1:
            return None
        given = str(below / found[0])
    if "://" not in given:
        return given
    scratch = tempfile.mkdtemp(prefix="fruits-")
    return str(fetch_weights(Address.parse(given), s3, Path(scratch)))


def _links(spark: SparkSession, settings: Mapping[str, str], cores: int) -> str:
    """Tell what the application has, and link to Spark's pages as a browser reaches them."""
    master = html.escape(str(spark.sparkContext.master))
    if settings.get("spark.ui.reverseProxy") == "true":
        door = settings["spark.ui.reverseProxyUrl"]
        links = {
            "this application": f"{door}/proxy/{spark.sparkContext.applicationId}/jobs/",
            "master and workers": f"{door}/",
            "history": f"{settings['spark.master.ui.historyServerUrl']}/",
        }
    else:
        links = {
            "this application": f"{spark.sparkContext.uiWebUrl}/jobs/",
            "master and workers": settings["spark.fruits.page"],
        }
    anchors = " · ".join(
        f'<a href="{html.escape(page)}" target="_blank">{name}</a>' for name, page in links.items()
    )
    return (
        f"Spark {spark.version} at {master}, up to {task_slots(spark)} of "
        f"the cluster's {cores} cores (<code>share = 1</code> takes all)"
        f"<br>Spark's pages: {anchors}"
    )


def _show(content: str) -> Any:
    """Show HTML below the cell; return a handle by which it is changed."""
    return display(HTML(content), display_id=True)  # type: ignore[no-untyped-call]


class Cell:
    """Draws how a job gets on below a cell; hears the same as the command line's observer."""

    def __init__(self, spark: SparkSession) -> None:
        self.spark = spark
        self.rows: list[_Row] = []
        self.shown = _show("")

    def stage(self, name: str) -> None:
        """Finish the line of the stage before and begin another."""
        self.finish()
        self.rows.append(_Row(STAGES.get(name, name), time.monotonic()))
        self._draw()

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        self.rows[-1].progress = progress
        self.rows[-1].tasks = self._tasks_by_host()
        self._draw()

    def finish(self) -> None:
        """Stop the clock of the current line."""
        if self.rows and self.rows[-1].ended is None:
            self.rows[-1].ended = time.monotonic()
            self._draw()

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.rows:
            self.rows[-1].failed = kind is not None
        self.finish()

    def _tasks_by_host(self) -> dict[str, int]:
        # PySpark's own tracker does not tell executors; Spark's does.
        tracker = self.spark.sparkContext._jsc.sc().statusTracker()
        tasks: Counter[str] = Counter()
        for executor in tracker.getExecutorInfos():
            tasks[executor.host()] += executor.numRunningTasks()
        return dict(sorted((host, count) for host, count in tasks.items() if count))

    def _draw(self) -> None:
        if self.shown is not None:
            self.shown.update(HTML("".join(row.html() for row in self.rows)))  # type: ignore[no-untyped-call]


class _Row:
    """One stage: its name, its clock and, where it has one, its bar."""

    def __init__(self, name: str, began: float) -> None:
        self.name, self.began = name, began
        self.ended: float | None = None
        self.failed = False
        self.progress: Progress | None = None
        self.tasks: dict[str, int] = {}

    def html(self) -> str:
        seconds = (self.ended or time.monotonic()) - self.began
        mark = "…" if self.ended is None else "✗" if self.failed else "✓"
        told = f"{mark} {html.escape(self.name)}, {duration(seconds)}"
        return f"<div>{told}{self._figures(seconds)}</div>"

    def _figures(self, seconds: float) -> str:
        progress = self.progress
        if progress is None or not progress.total:
            return ""
        told = [f"{progress.done:,} of {progress.total:,} images"]
        speed = progress.done / seconds if seconds else 0.0
        if speed:
            told.append(f"{speed:,.0f} images/s")
        if speed and self.ended is None:
            told.append(f"{duration((progress.total - progress.done) / speed)} left")
        told.append(f"{progress.quarantined:,} in quarantine")
        if self.ended is None:
            told += [f"{host}: {count} running" for host, count in self.tasks.items()]
        bar = f'<progress value="{progress.done}" max="{progress.total}"></progress>'
        return f" {bar} {html.escape(' · '.join(told))}"
