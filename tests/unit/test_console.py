"""What a person reads in the terminal: the cause of an error in one line, figures, progress."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from pipeline import console
from pipeline.console import STAGES, ConsoleObserver, explain, observing, summary
from pipeline.features import Progress
from pipeline.record import Counts, Run
from tests.records import run_of

PYTHON_WORKER = """An exception was thrown from the Python worker:
Traceback (most recent call last):
  File "features.py", line 21, in read
    raise OSError("s3a://x/y: connection refused")
OSError: s3a://x/y: connection refused
"""
JAVA = """An error occurred while calling o178.parquet.
: org.apache.spark.SparkException: Job aborted due to stage failure: java.io.IOException
\tat org.apache.hadoop.fs.FileSystem.create(FileSystem.java:1234)
Caused by: java.lang.RuntimeException: in between
\tat org.apache.spark.Scheduler.abort(Scheduler.scala:1)
Caused by: java.io.IOException: Mkdirs failed to create /x
\tat org.apache.hadoop.fs.FileSystem.create(FileSystem.java:1234)
\t... 1 more
"""
JAVA_WITHOUT_CAUSE = """An error occurred while calling o9.textFile.
: java.lang.IllegalStateException: the application was stopped
\tat org.apache.spark.SparkContext.check(SparkContext.scala:120)
\tat java.base/java.lang.Thread.run(Thread.java:840)
"""
PYTHON_IN_JAVA = """An error occurred while calling o61.count.
: org.apache.spark.SparkException: Job aborted due to stage failure.
\tat org.apache.spark.Scheduler.abort(Scheduler.scala:1)
Caused by: org.apache.spark.api.python.PythonException: Traceback (most recent call last):
  File "features.py", line 21, in read
    raise OSError("s3a://x/y: connection refused")
OSError: s3a://x/y: connection refused

\tat org.apache.spark.api.python.BasePythonRunner.handle(PythonRunner.scala:1)
\t... 1 more
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (PYTHON_WORKER, "OSError: s3a://x/y: connection refused"),
        (JAVA, "java.io.IOException: Mkdirs failed to create /x"),
        (JAVA_WITHOUT_CAUSE, "java.lang.IllegalStateException: the application was stopped"),
        (PYTHON_IN_JAVA, "OSError: s3a://x/y: connection refused"),
        ("[PATH_NOT_FOUND] Path does not exist: /x.", "[PATH_NOT_FOUND] Path does not exist: /x."),
        ("", "RuntimeError"),
    ],
    ids=["python", "java", "java without a cause", "python in java", "a line", "no words"],
)
def test_a_trace_is_told_by_its_cause_in_one_line(text: str, cause: str) -> None:
    told = explain(RuntimeError(text))
    assert told.startswith(cause)
    assert told.endswith("Run again to continue; --debug shows the whole trace.")
    assert ".." not in told
    assert "\n" not in told
    assert "\tat " not in told


@pytest.mark.parametrize(
    "words", ["[Errno 28] No space left on device", "There is not enough space on the disk"]
)
def test_a_full_disk_is_told_as_such(words: str) -> None:
    told = explain(RuntimeError(JAVA.replace("Mkdirs failed", words)))
    assert told.startswith("no space left on a disk of the cluster. Free some")


def test_a_full_disk_of_this_machine_is_named() -> None:
    here = explain(OSError(28, "No space left on device"))
    assert f"this machine's disk, at {tempfile.gettempdir()}." in here
    assert "at /mnt/output." in explain(OSError(28, "No space left on device", "/mnt/output"))


def test_a_long_cause_is_cut() -> None:
    assert len(explain(ValueError("x" * 10_000))) < 500


def run_with(**counts: int) -> Run:
    run = run_of(images_per_second=123.4 if counts.get("computed") else None)
    nothing = Counts(0, 0, 0, 0, 0, 0, 0)
    return replace(
        run,
        counts=replace(nothing, **counts),
        pca=replace(run.pca, k=42, variance=0.9512),
        model=replace(run.model, id="mobilenet_v2-224-abc"),
        timings={"total": 61.26},
    )


def printed(run: Run, where: str = "s3a://fruits/out") -> str:
    page = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    page.print(summary(run, where))
    return page.export_text()


def test_the_summary_gives_the_figures_of_a_run() -> None:
    text = printed(run_with(listed=12_345, quarantined=5, computed=12_000, reused=345, unsure=7))
    for line in (
        "12,345 listed, 5 quarantined",
        "12,000 computed, 345 reused, 7 left alone (too young for the inventory), 123 images/s",
        "mobilenet_v2-224-abc",
        "42 components keep 95.1% of the variance",
        "61.3 s",
        "s3a://fruits/out",
    ):
        assert line in text
    assert "dropped" not in text


def test_the_summary_tells_dropped_images_and_no_speed_where_nothing_was_computed() -> None:
    text = printed(run_with(listed=10, reused=10, dropped=3))
    assert "0 computed, 10 reused, 3 dropped (gone since the last run)" in text
    assert "images/s" not in text


def test_each_stage_is_a_line_and_the_features_a_bar() -> None:
    bars = Bars(console=Console(quiet=True))
    observer = ConsoleObserver(bars)
    for stage in STAGES:
        observer.stage(stage)
        if stage == "features":
            observer.progress(Progress(done=0, total=0, quarantined=0))
            assert bars.tasks[-1].total is None
            observer.progress(Progress(done=30, total=100, quarantined=2))
            task = bars.tasks[-1]
            assert (task.completed, task.total) == (30, 100)
            assert task.fields["note"] == "2 quarantined"
    observer.finish()
    assert [task.description for task in bars.tasks] == list(STAGES.values())
    assert all(task.finished for task in bars.tasks)


@pytest.mark.parametrize(("done", "total"), [(3, 7), (0, 0)])
def test_an_upload_moves_its_bar_also_when_there_is_nothing_to_send(done: int, total: int) -> None:
    bars = Bars(console=Console(quiet=True))
    observer = ConsoleObserver(bars)
    observer.stage("Uploading")
    observer.files(done, total)
    assert bars.tasks[0].description == "Uploading"
    assert bars.tasks[0].completed == (done if total else 1)
    assert bars.tasks[0].finished is (total == 0)


def test_without_a_terminal_the_stages_are_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    monkeypatch.setattr(console, "err", page)
    with observing() as observer:
        observer.stage("list")
        observer.stage("features")
        observer.progress(Progress(done=4, total=4, quarantined=1))
    text = page.export_text()
    assert "Listing the images" in text
    assert "4/4" in text
    assert "1 quarantined" in text
