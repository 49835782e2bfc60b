"""Brings a folder to S3: many objects at once, and only those that are not there yet."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import ThreadPoolExecutor as Pool
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import NoImagesError
from pipeline.storage import Entry, Store

UPLOADS_AT_ONCE = 16


@dataclass(frozen=True)
class Uploaded:
    """How many files were sent, how many were there already, and the bytes sent."""

    sent: int
    skipped: int
    bytes: int


def upload(
    source: Store, target: Store, on_progress: Callable[[int, int], None] = lambda *_: None
) -> Uploaded:
    """Copy every file of a folder below an address; a rerun sends only what is missing or newer.

    Parameters
    ----------
    source
        The store of a folder.
    on_progress
        Called with (files done, files to do).

    Raises
    ------
    NoImagesError
        When the folder holds no file.
    StorageError
        When the target is missing, forbidden or unreachable.
    """
    files = list(source.list())
    if not files:
        raise NoImagesError(f"expected files in {source.address}, found none; check the path.")
    there = {entry.key: entry for entry in target.list()}
    todo = [file for file in files if not _is_there(file, there.get(file.key))]
    done = 0
    waiting: set[Future[None]] = set()
    with Pool(UPLOADS_AT_ONCE) as pool:
        for file in todo:
            path = Path(source.address.path) / file.key
            waiting.add(pool.submit(target.upload, file.key, path))
            if len(waiting) >= 4 * UPLOADS_AT_ONCE:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                done += _count(finished)
                on_progress(done, len(todo))
        done += _count(waiting)
    on_progress(done, len(todo))
    return Uploaded(len(todo), len(files) - len(todo), sum(file.length for file in todo))


def _is_there(file: Entry, other: Entry | None) -> bool:
    # S3 tells the time of an upload in whole seconds.
    return (
        other is not None
        and other.length == file.length
        and other.modified >= file.modified.replace(microsecond=0)
    )


def _count(finished: set[Future[None]]) -> int:
    for upload_of_one in finished:
        upload_of_one.result()
    return len(finished)
