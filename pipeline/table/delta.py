"""The one door to a Delta table on S3 or in a folder: which files are live, and every commit.

The table is read and committed by delta-rs, on the driver, without Spark. Each commit is one
conditional PUT on the snapshot from which it was computed: delta-rs's own retries, which let stale
removals and files that are not there go through, are off. Who comes second is told so.

Each commit carries names of its own: who made it (`fruits.commit`), whether it changed rows
(`fruits.kind`), and what is known of the table's rows after it (`fruits.state`).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import StateError
from pipeline.s3.access import S3Settings, delta_options
from pipeline.storage import Address, Store, open_store

if TYPE_CHECKING:
    from deltalake import DeltaTable

ROWS, UPKEEP = "rows", "upkeep"  # what a commit changes: rows, or only the files that hold them
OLDEST_FILE = timedelta(days=1)  # what is older may be swept away as an orphan while it is added
COMMIT, KIND, STATE = "fruits.commit", "fruits.kind", "fruits.state"


@dataclass(frozen=True)
class File:
    """A Parquet file of the table: its path below the table's address, bytes and rows."""

    path: str
    size: int
    rows: int


@dataclass(frozen=True)
class Snapshot:
    """The table as one version has it.

    Attributes
    ----------
    version
        Delta's number of it.
    files
        The live files, by path.
    state
        The name that its newest commit gave to what is known of its rows; None where another
        program made that commit.
    """

    version: int
    files: Mapping[str, File]
    state: str | None

    @property
    def rows(self) -> int:
        """How many rows are live."""
        return sum(file.rows for file in self.files.values())


@dataclass(frozen=True)
class Change:
    """What a commit does: files to add, and paths of files to remove."""

    add: tuple[File, ...] = ()
    remove: tuple[str, ...] = ()
    kind: str = ROWS


class StaleSnapshotError(StateError):
    """Upkeep has replaced files that a change would remove: it has to be computed again."""


class Delta:
    """A Delta table at an address.

    With `single_writer` the user answers for what an S3 without conditional PUT cannot: that nobody
    else writes to it at the same time.
    """

    def __init__(self, address: Address, s3: S3Settings, *, single_writer: bool = False) -> None:
        self.address = address
        self.s3 = s3
        self.single_writer = single_writer

    @cached_property
    def store(self) -> Store:
        """The table's files, its log among them."""
        return open_store(self.address, self.s3)

    def snapshot(self) -> Snapshot | None:
        """Return the newest version, None where there is no table."""
        table = self._open()
        return None if table is None else self._snapshot_of(table)

    def create(self, schema: pa.Schema, state: str) -> Snapshot:
        """Make an empty table, unless another run was quicker, and return its newest version."""
        from deltalake import DeltaTable, Schema
        from deltalake.exceptions import DeltaError

        try:
            DeltaTable.create(
                self._uri,
                schema=Schema.from_arrow(schema),
                storage_options=self._options,
                # No minima and maxima: a checkpoint would keep the paths of images long removed.
                # The log is cleaned by `clean_log` alone, never behind a commit.
                configuration={
                    "delta.dataSkippingNumIndexedCols": "0",
                    "delta.enableExpiredLogCleanup": "false",
                },
                commit_properties=self._properties(ROWS, state, uuid.uuid4().hex),
            )
        except DeltaError:
            if self._open() is None:
                raise
        found = self.snapshot()
        if found is None:
            raise StateError(f"expected the table that was just made in {self.address}, found none")
        return found

    def commit(self, base: Snapshot, change: Change, state: str) -> Snapshot:
        """Make a change to a snapshot the newest version.

        Parameters
        ----------
        base
            The snapshot from which the change was computed.
        state
            The name of what is known of the rows after it, which is already written.

        Raises
        ------
        StaleSnapshotError
            When upkeep has meanwhile replaced a file that the change removes.
        StateError
            When another run has changed rows meanwhile, a file to add is not there as it should
            be, or one to remove is not live. Nothing is changed then.
        """
        from deltalake.exceptions import CommitFailedError

        self._check(base, change)
        name = uuid.uuid4().hex
        while True:
            table = self._open()
            if table is None:
                raise StateError(f"expected a table in {self.address}, found none. Run again.")
            if table.version() != base.version:
                base = self._moved_on(base, change)
                continue
            try:
                table.create_write_transaction(
                    self._actions(base, change),
                    "append",
                    table.schema(),
                    commit_properties=self._properties(change.kind, state, name),
                )
            except Exception as error:
                # An answer that was lost on its way may have been a yes.
                if not any(entry.get(COMMIT) == name for entry in self._since(base)):
                    if not isinstance(error, CommitFailedError):
                        raise
                    base = self._moved_on(base, change)
                    continue
            made = self._snapshot_of(self._reopened())
            if made.state != state:  # whoever came after us has changed rows
                raise self._somebody_else(1)
            return made

    def unnamed_files(self, retention: timedelta) -> list[str]:
        """Return the files that no version younger than the retention names."""
        hours = int(retention.total_seconds() // 3600)
        return self._reopened().vacuum(
            hours, dry_run=True, enforce_retention_duration=False, full=True
        )

    def clean_log(self) -> None:
        """Delete entries of the log that are older than a month and in a checkpoint."""
        table = self._reopened()
        table.create_checkpoint()
        table.cleanup_metadata()

    def states(self, retention: timedelta) -> set[str]:
        """Return the names of the states of the newest commit, and of others of this age."""
        commits = self._reopened().history()
        since = (time.time() - retention.total_seconds()) * 1000
        kept = [commits[0], *(entry for entry in commits if entry["timestamp"] >= since)]
        return {str(entry[STATE]) for entry in kept if STATE in entry}

    def _check(self, base: Snapshot, change: Change) -> None:
        """Prove what delta-rs believes: files to add are there and whole, those to remove live."""
        gone = [path for path in change.remove if path not in base.files]
        if gone:
            raise StateError(
                f"expected {gone[0]} among the live files of {self.address}, found it gone. "
                "Run again."
            )
        folders = {file.path.rpartition("/")[0] for file in change.add}
        there = {
            entry.key: entry
            for folder in folders
            for entry in self.store.list(f"{folder}/" if folder else "")
        }
        for file in change.add:
            entry = there.get(file.path)
            found = None if entry is None else entry.length
            if entry is None or found != file.size:
                raise StateError(
                    f"expected {self.address}/{file.path} with {file.size:,} bytes, found "
                    f"{'none' if found is None else f'{found:,}'}. Run again."
                )
            if entry.modified < datetime.now(UTC) - OLDEST_FILE:
                raise StateError(
                    f"expected {self.address}/{file.path} to be less than a day old, found it "
                    f"written at {entry.modified:%Y-%m-%d %H:%M} UTC. Run again."
                )

    def _moved_on(self, base: Snapshot, change: Change) -> Snapshot:
        """Return the snapshot on which a change still holds, when only upkeep came between."""
        newer = self._since(base)
        newest = self._snapshot_of(self._reopened())
        if len(newer) != newest.version - base.version:
            newer.append({})  # a commit whose record is gone: whose it was is not known
        if any(entry.get(KIND) != UPKEEP for entry in newer):
            raise self._somebody_else(len(newer))
        if not newer:
            raise StateError(
                f"{self.address} did not take a commit, though nothing stands against it. Look at "
                "S3's answers and the rights of these credentials, then run again."
            )
        if any(path not in newest.files for path in change.remove):
            raise StaleSnapshotError(
                f"the files of {self.address} were merged while this run worked on them. Run again."
            )
        return newest

    def _somebody_else(self, commits: int) -> StateError:
        return StateError(
            f"expected nobody else to write to {self.address} while this run does, found "
            f"{commits} other commits. Run again: what they did is kept, and this run goes on "
            "from there."
        )

    def _since(self, base: Snapshot) -> list[dict[str, Any]]:
        """Return the records of the commits after a snapshot that are still kept."""
        table = self._reopened()
        newer = table.version() - base.version
        return [e for e in table.history(newer) if e["version"] > base.version] if newer else []

    def _actions(self, base: Snapshot, change: Change) -> list[Any]:
        from deltalake.transaction import AddAction, RemoveAction

        now, changes_rows = int(time.time() * 1000), change.kind == ROWS
        return [
            RemoveAction(path, changes_rows, now, base.files[path].size, {})
            for path in change.remove
        ] + [
            AddAction(
                file.path, file.size, {}, now, changes_rows, json.dumps({"numRecords": file.rows})
            )
            for file in change.add
        ]

    def _properties(self, kind: str, state: str, name: str) -> Any:
        from deltalake import CommitProperties

        return CommitProperties(
            custom_metadata={KIND: kind, STATE: state, COMMIT: name}, max_commit_retries=0
        )

    def _open(self) -> DeltaTable | None:
        from deltalake import DeltaTable
        from deltalake.exceptions import TableNotFoundError

        try:
            return DeltaTable(self._uri, storage_options=self._options)
        except TableNotFoundError:
            return None

    def _reopened(self) -> DeltaTable:
        table = self._open()
        if table is None:
            raise StateError(f"expected a table in {self.address}, found it gone. Run again.")
        return table

    def _snapshot_of(self, table: DeltaTable) -> Snapshot:
        actions = pa.table(table.get_add_actions(flatten=True))
        columns = (actions[name].to_pylist() for name in ("path", "size_bytes", "num_records"))
        files = {path: File(path, size, rows) for path, size, rows in zip(*columns, strict=True)}
        (newest,) = table.history(1) or [{}]
        of_this = newest.get("version") == table.version()
        return Snapshot(table.version(), files, newest.get(STATE) if of_this else None)

    @property
    def _uri(self) -> str:
        address = self.address
        return address.path if address.bucket is None else f"s3://{address.bucket}/{address.path}"

    @property
    def _options(self) -> dict[str, str] | None:
        if self.address.bucket is None:
            return None
        own = {
            "aws_conditional_put": "disabled" if self.single_writer else "etag",
            "aws_s3_allow_unsafe_rename": "true" if self.single_writer else None,
        }
        chosen = {name: value for name, value in own.items() if value is not None}
        return delta_options(self.address.bucket, self.s3) | chosen
