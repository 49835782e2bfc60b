"""What a person sees in the terminal: stages, a progress bar, a summary, errors in one line."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from pipeline.drift import words
from pipeline.features import Progress
from pipeline.listing.names import told_of
from pipeline.record import Run

STAGES = {
    "list": "Listing the images",
    "model": "Preparing the network",
    "spark": "Starting the application",
    "features": "Computing features",
    "pca": "Fitting the PCA",
    "matrix": "Writing the matrix",
    "report": "Writing the report",
    "publish": "Publishing the result",
}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class ConsoleObserver:
    """Draws a line for each stage of a job, and a bar while features are computed."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task: Any = None

    def stage(self, name: str) -> None:
        """Finish the line of the stage before and begin another."""
        self.finish()
        self.task = self.bars.add_task(STAGES.get(name, name), total=None, note="")

    def progress(self, progress: Progress) -> None:
        """Move the bar."""
        note = f"{progress.quarantined} quarantined" if progress.quarantined else ""
        if progress.total:
            self.bars.update(self.task, total=progress.total, completed=progress.done, note=note)

    def files(self, done: int, total: int) -> None:
        """Move the bar of an upload."""
        self.bars.update(self.task, total=max(total, 1), completed=done if total else 1)

    def finish(self) -> None:
        """Stop the clock of the current line."""
        if self.task is not None:
            total = self.bars.tasks[self.task].total
            self.bars.update(self.task, total=total or 1, completed=total or 1)
            self.bars.stop_task(self.task)


class _Figures(ProgressColumn):
    """Images done, images/s, time left and quarantined, as far as a stage has them."""

    def render(self, task: Task) -> Text:
        if not task.total or task.total == 1:
            return Text("")
        parts = [f"{task.completed:,.0f}/{task.total:,.0f}"]
        seconds = task.finished_time or task.elapsed
        if seconds and task.completed:
            parts.append(f"{task.completed / seconds:,.0f} images/s")
        if not task.finished and task.time_remaining:
            parts.append(f"{duration(task.time_remaining)} left")
        if task.fields["note"]:
            parts.append(task.fields["note"])
        return Text("  ".join(parts), no_wrap=True)


def duration(seconds: float) -> str:
    """Write a time as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))


@contextmanager
def observing() -> Iterator[ConsoleObserver]:
    """Show the stages of what is done inside; on a terminal they are live."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        _Figures(),
    )
    with Bars(*columns, console=err) as bars:
        observer = ConsoleObserver(bars)
        yield observer
        observer.finish()


def summary(run: Run, where: str) -> Table:
    """Return a run's figures as a small table."""
    counts, pca, speed = run.counts, run.pca, run.images_per_second
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("images", f"{counts.listed:,} listed, {counts.quarantined:,} quarantined")
    if run.left_out:
        table.add_row("left out", told_of(run.left_out))
    computed = f"{counts.computed:,} computed, {counts.reused:,} reused"
    if counts.dropped:
        computed += f", {counts.dropped:,} dropped (gone since the last run)"
    if counts.unsure:
        computed += f", {counts.unsure:,} left alone (too young for the inventory)"
    if counts.other_makers:
        computed += f", {counts.other_makers:,} made by another decoder or runtime (--recompute)"
    table.add_row("features", computed + (f", {speed:,.0f} images/s" if speed else ""))
    if run.drift and run.made and run.made.run_id == run.run_id:
        colour = "yellow" if run.drift.is_unlike else ""
        table.add_row("added", Text(words(run.drift), style=colour))
    table.add_row("network", run.model.id)
    table.add_row("PCA", f"{pca.k} components keep {pca.variance:.1%} of the variance")
    table.add_row("time", f"{run.timings['total']:.1f} s")
    table.add_row("result", where)
    return table


def versions_told(found: Sequence[tuple[datetime, Run]]) -> Table:
    """Return the versions of a result as a table, the newest first."""
    table = Table("version", "published", "images", "components", "variance kept", box=None)
    table.add_column("run", no_wrap=True, min_width=23)
    for published, run in reversed(found):
        table.add_row(
            str(run.version),
            f"{published:%Y-%m-%d %H:%M}",
            f"{run.counts.features:,}",
            str(run.pca.k),
            f"{run.pca.variance:.1%}",
            run.folder,
        )
    return table


def explain(error: BaseException) -> str:
    """Return the cause of an error that Spark or the system raised, and a remedy, in one line."""
    text = str(error)
    if "No space left on device" in text or "There is not enough space" in text:
        if isinstance(error, OSError):
            where = error.filename or tempfile.gettempdir()
            return (
                f"no space left on this machine's disk, at {where}. Free some, or name another "
                "folder in TMPDIR, then run again to continue."
            )
        return "no space left on a disk of the cluster. Free some, then run again to continue."
    if "/table/" in text and "NotFoundError" in text:
        return (
            "files of the feature table are gone: fruits vacuum or forget deleted an older version "
            "while it was read. Run again to continue."
        )
    # Of Python's and Java's traces, or one inside the other, the last that names its cause.
    named = r"^(?:Caused by: |: )?([\w.$]*(?:Error|Exception): .+)$"
    causes = re.findall(named, text, re.MULTILINE)
    cause = (causes or text.strip().splitlines() or [type(error).__name__])[-1]
    return f"{cause[:400].rstrip('.')}. Run again to continue; --debug shows the whole trace."
