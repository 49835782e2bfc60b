"""How much memory does a Python worker take while it computes features?

`python_worker_peak_memory_mb`: the largest VmHWM (the kernel's own high-water mark of resident
memory) in /proc of any process of `pyspark.daemon` below this cluster, looked up five times a
second during a whole feature job. Pages shared with the daemon that forked a worker are counted.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from pipeline.reading import ImageReader
from tests.benchmarks._common import MANY, Setup, application, images_on_s3
from tests.benchmarks.features import features_per_second
from tests.benchmarks.results import Result


def measure(setup: Setup) -> list[Result]:
    """Return the peak of the largest Python worker."""
    with ExitStack() as stack:
        place = stack.enter_context(images_on_s3(setup, MANY, setup.images))
        spark = stack.enter_context(application(place.cluster))
        reader = ImageReader(place.images, place.cluster.s3)
        with _watched() as peaks:
            features_per_second(place, spark, reader, "memory")
    return [
        Result("python_worker_peak_memory_mb", max(peaks.values()), "MB", "<= 400"),
        Result("python_workers_seen", len(peaks), "processes"),
    ]


@contextmanager
def _watched() -> Iterator[dict[int, float]]:
    """Yield the peaks in MB (1,000,000 bytes) by process, kept up to date until the end."""
    peaks: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError):
                    if "pyspark.daemon" in process.cmdline():
                        peaks[process.pid] = _peak(process.pid)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def _peak(pid: int) -> float:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0
