"""What a run tells while it is at work: its id, its stages and how long each takes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from pipeline.features import Progress


class Observer(Protocol):
    """Who is told how a run gets on."""

    def stage(self, name: str) -> None:
        """Hear that a stage begins: list, model, spark, features, pca, matrix, report."""

    def progress(self, progress: Progress) -> None:
        """Hear how far the features are."""


class Journal:
    """Names a run and times its stages.

    Attributes
    ----------
    timings
        Seconds of each stage that is over.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.began = time.monotonic()
        self.started = datetime.now(UTC)
        self.run_id = f"{self.started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell of a stage, and time what is done inside."""
        self.observer.stage(name)
        began = time.monotonic()
        yield
        self.timings[name] = time.monotonic() - began

    def with_total(self) -> dict[str, float]:
        """Return the timings, and as `total` the seconds since the run began."""
        return {**self.timings, "total": time.monotonic() - self.began}


def now() -> str:
    """Return the time in UTC as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat()
