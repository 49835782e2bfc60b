"""A result is a version: its files never change, and one small exclusive write publishes it.

    versions/<run id>/        the files of a result
    versions/00000007.json    publishes them: the record of the run, with their names and sizes
    matrix.csv, run.json ...  copies of the newest, for people who open them by hand

The record with the highest number is the current one. Whoever reads through it sees one whole
result at any moment. The copies are made after publishing, `run.json` last; who has copied looks
again, so that they end at the newest, and the next run mends what a kill left of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise

from pipeline.errors import StateError, StorageError
from pipeline.record import Run
from pipeline.s3.access import S3Settings
from pipeline.storage import TEMPORARY, Entry, Store, open_store

RECORD = "run.json"
RESULT = (
    "matrix.parquet",
    "matrix.csv",
    "explained_variance.csv",
    "model",
    "quarantine.csv",
    "report-data",
    "report.html",
)
VERSIONS = "versions"
OLD_PLACE = "_next"  # where results were prepared before there were versions
KEPT = 3  # versions
DAY = timedelta(days=1)
YOUNG = DAY  # what is younger is kept, too: somebody may be reading it
COPIED_AGAIN = 20  # times, while other runs publish
_NAME = re.compile(rf"{VERSIONS}/(\d{{8}})\.json")
_PRUNED = b"{}"  # of a record whose files are gone: its number is never used again


def folder_of(run: Run) -> str:
    """Return where the files of a version lie below OUTPUT."""
    return f"{VERSIONS}/{run.folder}"


def newest(output: Store) -> Run | None:
    """Return the record of the current version, None where there is none."""
    for number in sorted((number for number, _ in _records(output)), reverse=True):
        if (run := _read(output, number)) is not None:
            return run
    return None


def at(output: Store, number: int) -> Run:
    """Return the record of a version.

    Raises
    ------
    StateError
        When there is none of this number, or it is pruned.
    """
    run = _read(output, number)
    if run is None:
        pruned = number in (known for known, _ in _records(output))
        kept = ", ".join(str(run.version) for _, run in all_versions(output))
        raise StateError(
            f"expected version {number} in {output.address}, found "
            f"{'that it is pruned' if pruned else 'none'}. There are: {kept or 'none'}."
        )
    return run


def all_versions(output: Store) -> list[tuple[datetime, Run]]:
    """Return when each version that is kept was published, and its record, the newest last."""
    found = ((entry.modified, _read(output, number)) for number, entry in _records(output))
    return [(published, run) for published, run in found if run is not None]


def files_below(output: Store, folder: str) -> dict[str, int]:
    """Return the bytes of each file in a folder of versions, by name."""
    root = f"{VERSIONS}/{folder}/"
    return {entry.key.removeprefix(root): entry.length for entry in output.list(root)}


def lacking(output: Store, run: Run) -> list[str]:
    """Return which of a version's files are gone, or of another size."""
    found = files_below(output, run.folder)
    return sorted(name for name, size in run.files.items() if found.get(name) != size)


def publish(
    output: Store, run: Run, is_current: Callable[[], bool], *, single_writer: bool = False
) -> Run:
    """Make the files in `run.folder` the newest version, and return its record.

    Parameters
    ----------
    is_current
        Tells whether the feature table is still that of which the result was made.
    single_writer
        Do without an exclusive write, on an S3 that has none.

    Raises
    ------
    StateError
        When a part is not there, or the table has changed: nothing is published then.
    """
    found = files_below(output, run.folder)
    files = {name: size for name, size in found.items() if name.partition("/")[0] in RESULT}
    for part in RESULT:
        if not any(name.partition("/")[0] == part for name in files):
            raise StateError(
                f"expected {part} in {output.address}/{folder_of(run)}, found it gone. Run again: "
                "the features are kept."
            )
    while True:
        # First the number: whoever changes the table and publishes after this look has taken it.
        number = _next_number(output)
        if not is_current():
            raise StateError(
                f"another run has changed the feature table below {output.address} since this one "
                "read it; its result is the newer one. No feature is lost. Run again to be sure."
            )
        run = replace(run, version=number, files=files)
        if _claim(output, number, run.to_bytes(), single_writer=single_writer):
            return run


def copy_newest(output: Store) -> None:
    """Bring the copies at their fixed places to the newest version."""
    disturbed = False
    for turn in range(1, COPIED_AGAIN + 1):
        run = newest(output)
        if run is None or (not disturbed and _is_copied(output, run)):
            return
        try:
            _copy(output, run)
        except StorageError:  # who else copies, or forgets, has taken something away
            if turn == COPIED_AGAIN:
                raise
        after = newest(output)
        disturbed = after is not None and after.version != run.version


def _copy(output: Store, run: Run) -> None:
    output.delete(RECORD)
    for part in RESULT:
        output.delete(part)
    for name in sorted(run.files, key=lambda name: name.endswith("/_SUCCESS")):
        output.copy(f"{folder_of(run)}/{name}", name)  # that marker is true once all is there
    output.write(RECORD, run.to_bytes())


def _is_copied(output: Store, run: Run) -> bool:
    content = output.read(RECORD)
    if content is None:
        return False
    try:
        told = Run.from_bytes(content, f"{output.address}/{RECORD}")
    except StateError:
        return False
    there = {entry.key: entry for part in RESULT for entry in _below(output, part)}
    written = _below(output, RECORD)
    is_last = written and all(entry.modified <= written[0].modified for entry in there.values())
    sizes = {name: entry.length for name, entry in there.items()}
    return bool(is_last) and (told.version, told.folder, sizes) == (
        run.version,
        run.folder,
        run.files,
    )


def _below(output: Store, part: str) -> list[Entry]:
    return [e for e in output.list(part) if e.key == part or e.key.startswith(f"{part}/")]


def prune(output: Store, kept: int = KEPT, young: timedelta = YOUNG) -> None:
    """Delete old versions, and what a killed run left.

    Parameters
    ----------
    kept
        So many of the newest stay.
    young
        What was current, or written, within this time stays, too. It is measured by the clock of
        the store: from when `run.json` was written.
    """
    written = _below(output, RECORD)
    if not written:
        return
    since = written[0].modified - young
    live = all_versions(output)
    # A version was current until the next one came.
    superseded = list(pairwise(live))[: max(0, len(live) - kept)]
    stale = {run.version for (_, run), (after, _) in superseded if after <= since}
    for number in stale:
        output.write(_record(number), _PRUNED)
    named = {run.folder for _, run in live if run.version not in stale}
    old = [f for f, touched in _folders(output).items() if f not in named and touched <= since]
    if old:  # somebody may have restored one meanwhile
        named = {run.folder for _, run in all_versions(output)}
    for folder in old:
        if folder not in named:
            output.delete(f"{VERSIONS}/{folder}")
    output.delete_keys(entry.key for entry in _left_over(output) if entry.modified <= since)


def delete_all(output: Store, *, single_writer: bool = False) -> None:
    """Delete every version, the copies, and what killed runs left; the numbers stay used."""
    # A run that is about to publish has looked for its number: it must not get it.
    while not _claim(output, _next_number(output), _PRUNED, single_writer=single_writer):
        pass
    for number, _ in _records(output):
        output.write(_record(number), _PRUNED)
    for folder in _folders(output):
        output.delete(f"{VERSIONS}/{folder}")
    for name in (RECORD, *RESULT):
        output.delete(name)
    output.delete_keys(entry.key for entry in _left_over(output))


def _left_over(output: Store) -> Iterator[Entry]:
    """Yield what a killed run has left beside versions; older projects prepared in `_next/`."""
    for prefix in (TEMPORARY, f"{VERSIONS}/{TEMPORARY}", f"{OLD_PLACE}/"):
        yield from output.list(prefix)


def restore(output: Store, number: int, *, single_writer: bool = False) -> Run:
    """Publish the files of an older version once more, as the newest; the table stays as it is.

    Raises
    ------
    StateError
        When there is no such version, or a file of it is gone.
    """
    run = at(output, number)
    _check_whole(output, run)
    again = publish(output, run, lambda: True, single_writer=single_writer)
    _check_whole(output, again)  # another run may have pruned it meanwhile
    copy_newest(output)
    prune(output)
    return again


def _check_whole(output: Store, run: Run) -> None:
    if gone := lacking(output, run):
        raise StateError(f"expected {gone[0]} in {output.address}/{folder_of(run)}, found it gone.")


def current(output: Store) -> Run | None:
    """Return the record of the current result, None where there is none.

    What an older version of the project has left, or a copy of a result, has its record at the top.
    """
    run = newest(output)
    if run is None and (content := output.read(RECORD)) is not None:
        run = Run.from_bytes(content, f"{output.address}/{RECORD}")
    return run


def open_result(output: Store, s3: S3Settings) -> tuple[Run | None, Store]:
    """Return the record of the current result, and where its files lie: one whole version."""
    run = newest(output)
    if run is None:
        return current(output), output
    return run, open_store(output.address / folder_of(run), s3)


def _records(output: Store) -> list[tuple[int, Entry]]:
    """Return the numbers that are used, in order."""
    found = ((_NAME.fullmatch(entry.key), entry) for entry in output.list(f"{VERSIONS}/0"))
    return sorted(((int(name[1]), entry) for name, entry in found if name), key=lambda one: one[0])


def _next_number(output: Store) -> int:
    return max((number for number, _ in _records(output)), default=0) + 1


def _claim(output: Store, number: int, content: bytes, *, single_writer: bool) -> bool:
    """Write the record of a number, unless somebody else has it."""
    name = _record(number)
    if single_writer:
        output.write(name, content)
        return True
    return output.write_new(name, content)


def _read(output: Store, number: int) -> Run | None:
    """Return the record of a version, None where it is pruned, or not written yet."""
    content = output.read(_record(number))
    if content in (None, b"", _PRUNED):
        return None
    return Run.from_bytes(content or b"", f"{output.address}/{_record(number)}")


def _folders(output: Store) -> dict[str, datetime]:
    """Return the folders of versions, and when something was last written into each."""
    touched: dict[str, datetime] = {}
    for entry in output.list(f"{VERSIONS}/"):
        folder, slash, _ = entry.key.removeprefix(f"{VERSIONS}/").partition("/")
        if slash:
            touched[folder] = max(entry.modified, touched.get(folder, entry.modified))
    return touched


def _record(number: int) -> str:
    return f"{VERSIONS}/{number:08d}.json"
