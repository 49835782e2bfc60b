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
from datetime import UTC, datetime, timedelta

from pipeline.errors import StateError
from pipeline.record import Run
from pipeline.storage import Entry, S3Settings, Store, open_store

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
KEPT = 3  # versions
YOUNG = timedelta(days=1)  # what is younger is kept, too: somebody may be reading it
COPIED_AGAIN = 20  # times, while other runs publish
_NAME = re.compile(rf"{VERSIONS}/(\d{{8}})\.json")
_PRUNED = b"{}"  # of a record whose files are gone: its number is never used again


def folder_of(run: Run) -> str:
    """Return where the files of a version lie below OUTPUT."""
    return f"{VERSIONS}/{run.folder}"


def newest(output: Store) -> Run | None:
    """Return the record of the current version, None where there is none."""
    kept = [number for number, entry in _records(output) if entry.length > len(_PRUNED)]
    return at(output, max(kept)) if kept else None


def at(output: Store, number: int) -> Run:
    """Return the record of a version.

    Raises
    ------
    StateError
        When there is none of this number, or it is pruned.
    """
    content = output.read(_record(number))
    if content in (None, _PRUNED):
        kept = ", ".join(str(n) for n, e in _records(output) if e.length > len(_PRUNED))
        raise StateError(
            f"expected version {number} in {output.address}, found "
            f"{'that it is pruned' if content else 'none'}. There are: {kept or 'none'}."
        )
    return Run.from_bytes(content or b"", f"{output.address}/{_record(number)}")


def all_versions(output: Store) -> list[tuple[datetime, Run]]:
    """Return when each version that is kept was published, and its record, the newest last."""
    kept = [(n, e.modified) for n, e in _records(output) if e.length > len(_PRUNED)]
    return [(published, at(output, number)) for number, published in sorted(kept)]


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
    files = files_below(output, run.folder)
    for part in RESULT:
        if not any(name == part or name.startswith(f"{part}/") for name in files):
            raise StateError(
                f"expected {part} in {output.address}/{folder_of(run)}, found it gone. Run again: "
                "the features are kept."
            )
    while is_current():
        number = max((number for number, _ in _records(output)), default=0) + 1
        run = replace(run, version=number, files=files)
        name, content = _record(number), run.to_bytes()
        if single_writer:
            output.write(name, content)
            return run
        # A write whose answer was lost was sent again, and refused for its own sake.
        if output.write_new(name, content) or output.read(name) == content:
            return run
    raise StateError(
        f"another run has changed the feature table below {output.address} since this one read it; "
        "its result is the newer one. Nothing of this run's features is lost. Run again to be sure."
    )


def copy_newest(output: Store) -> None:
    """Bring the copies at their fixed places to the newest version."""
    for _ in range(COPIED_AGAIN):
        run = newest(output)
        if run is None or _is_copied(output, run):
            return
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
    there = {entry.key: entry.length for part in RESULT for entry in _below(output, part)}
    return (told.version, told.folder) == (run.version, run.folder) and there == run.files


def _below(output: Store, part: str) -> Iterator[Entry]:
    yield from (e for e in output.list(part) if e.key == part or e.key.startswith(f"{part}/"))


def prune(output: Store, kept: int = KEPT, young: timedelta = YOUNG) -> None:
    """Delete old versions, and what a killed run left without a record.

    Parameters
    ----------
    kept
        So many of the newest stay.
    young
        What is younger stays, too.
    """
    since = datetime.now(UTC) - young
    records = sorted(_records(output), key=lambda found: found[0])
    live = [(number, entry) for number, entry in records if entry.length > len(_PRUNED)]
    stale = [
        number for number, entry in live[: max(0, len(live) - kept)] if entry.modified <= since
    ]
    named = {at(output, number).folder for number, _ in live if number not in stale}
    for number in stale:
        output.write(_record(number), _PRUNED)
    for folder, touched in _folders(output).items():
        if folder not in named and touched <= since:
            output.delete(f"{VERSIONS}/{folder}")


def delete_all(output: Store) -> None:
    """Delete the files of every version; the numbers stay used."""
    for number, _ in _records(output):
        output.write(_record(number), _PRUNED)
    for folder in _folders(output):
        output.delete(f"{VERSIONS}/{folder}")


def restore(output: Store, number: int) -> Run:
    """Publish the files of an older version once more, as the newest; the table stays as it is.

    Raises
    ------
    StateError
        When there is no such version, or a file of it is gone.
    """
    run = at(output, number)
    gone = lacking(output, run)
    if gone:
        raise StateError(f"expected {gone[0]} in {output.address}/{folder_of(run)}, found it gone.")
    again = publish(output, run, lambda: True)
    copy_newest(output)
    return again


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
    found = ((_NAME.fullmatch(entry.key), entry) for entry in output.list(f"{VERSIONS}/0"))
    return [(int(name[1]), entry) for name, entry in found if name]


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
