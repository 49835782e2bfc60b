"""Brings a folder to S3: many objects at once, and only those that are not there yet."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import ThreadPoolExecutor as Pool
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import NoImagesError
from pipeline.listing.names import kind_of
from pipeline.networks.formats import recognised
from pipeline.networks.metadata import without_metadata
from pipeline.storage import Entry, Store

UPLOADS_AT_ONCE = 16


@dataclass(frozen=True)
class Uploaded:
    """How many files were sent, how many were there already, and the bytes sent.

    `kept_back` counts, by kind, the files that were not sent as their metadata could not be taken
    from them.
    """

    sent: int
    skipped: int
    bytes: int
    kept_back: dict[str, int]


@dataclass(frozen=True)
class _Done:
    bytes: int | None = None  # None for a file that was there
    kept_back: str | None = None


def upload(
    source: Store,
    target: Store,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    *,
    strip_metadata: bool = False,
) -> Uploaded:
    """Copy every file of a folder below an address; a rerun sends only what is missing or newer.

    Parameters
    ----------
    source
        The store of a folder.
    on_progress
        Called with (files done, files to do).
    strip_metadata
        Send photos without their metadata, and nothing that may have some all the same.

    Raises
    ------
    NoImagesError
        When the folder holds no file.
    StorageError
        When the target is missing, forbidden or unreachable.
    """
    folder = Path(source.address.path)
    files = [file for file in source.list() if (folder / file.key).exists()]  # no link to nothing
    if not files:
        raise NoImagesError(f"expected files in {source.address}, found none; check the path.")
    there = {entry.key: entry for entry in target.list()}
    # The length of what would be sent is known here only where files are sent as they are.
    todo = [file for file in files if strip_metadata or not _is_there(file, there.get(file.key))]

    def send(file: Entry) -> _Done:
        if strip_metadata:
            return _send_stripped(folder / file.key, file, target, there.get(file.key))
        target.upload(file.key, folder / file.key)
        return _Done(file.length)

    ended: list[_Done] = []
    waiting: set[Future[_Done]] = set()
    with Pool(UPLOADS_AT_ONCE) as pool:
        for file in todo:
            waiting.add(pool.submit(send, file))
            if len(waiting) >= 4 * UPLOADS_AT_ONCE:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                ended += [one.result() for one in finished]
                on_progress(len(ended), len(todo))
        ended += [one.result() for one in waiting]
    on_progress(len(ended), len(todo))
    sizes = [one.bytes for one in ended if one.bytes is not None]
    kept_back = Counter(one.kept_back for one in ended if one.kept_back is not None)
    skipped = len(files) - len(sizes) - kept_back.total()
    return Uploaded(len(sizes), skipped, sum(sizes), dict(kept_back.most_common()))


def _send_stripped(path: Path, file: Entry, target: Store, there: Entry | None) -> _Done:
    content = path.read_bytes()
    stripped = without_metadata(content)
    if stripped is None:
        return _Done(kept_back=kind_of(file.key) or recognised(content) or "unknown")
    if _is_there(file, there, len(stripped)):
        return _Done()
    with tempfile.NamedTemporaryFile(prefix="fruits-") as sent:
        sent.write(stripped)
        sent.flush()
        target.upload(file.key, Path(sent.name))
    return _Done(len(stripped))


def _is_there(file: Entry, other: Entry | None, length: int | None = None) -> bool:
    # S3 tells the time of an upload in whole seconds.
    return (
        other is not None
        and other.length == (file.length if length is None else length)
        and other.modified >= file.modified.replace(microsecond=0)
    )
