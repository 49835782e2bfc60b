"""What a worker does: reads images ahead, decodes them, runs the network; rewrites files.

An image that cannot be read as it was listed, or cannot be decoded, gets a row with the reason.
"""

from __future__ import annotations

import gc
import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark import TaskContext
from pyspark.accumulators import Accumulator
from pyspark.core.broadcast import Broadcast

from pipeline.errors import StateError, StorageError
from pipeline.listing.images import LISTING
from pipeline.networks.apart import LIMITS, Apart, Limits, Pixels, go_first, within
from pipeline.networks.decode import decode
from pipeline.networks.model import load_network
from pipeline.plan import TODO, Touched
from pipeline.quarantine import READ, BadImageError, Reason, word_of
from pipeline.reading import ImageReader, Outcome, Row, read_ahead, read_listed, told_by_listing
from pipeline.table.feature_table import (
    DECODER,
    ROWS_PER_FILE,
    RUNTIME,
    TABLE,
    WRITTEN,
    told,
    written,
)
from pipeline.table.parts import Parts, Slice


@dataclass(frozen=True)
class PassOverImages:
    """What a Spark task does with its share of the listing: rows of the table, in files of it.

    Attributes
    ----------
    work
        Where the slices of the listing lie.
    table
        Where the table's files go, below the folder `commit`.
    since
        The table's version before that commit.
    """

    model: Broadcast[bytes]
    input_size: int
    dimensions: int
    reader: ImageReader
    work: Parts
    table: Parts
    commit: str
    done: Accumulator[int]
    quarantined: Accumulator[int]
    since: int = 0
    limits: Limits = LIMITS

    def __call__(self, slices: Iterator[Slice]) -> Iterator[pa.RecordBatch]:
        """Yield what a commit needs to know (WRITTEN): of each file, and of the reads."""
        network = _network(self.model)
        read = read_listed(_opened(self.reader))
        reads = Reads()
        try:
            with _decoder(self.limits) as decode_one:
                for images in self._gathered(slices):
                    rows, stay = self._rows(images, decode_one, network, read, reads)
                    if len(stay):
                        yield self._keep(images.take(stay))
                    if rows.num_rows:
                        yield written(self.table, self.commit, rows, self.dimensions)
                reads.verify(read)
        except StorageError as error:  # told at once: another attempt would not help
            reads.trouble = str(error)
        yield reads.told()

    def _gathered(self, slices: Iterator[Slice]) -> Iterator[pa.Table]:
        """Yield the listed images of all slices (TODO), as many at a time as a file holds."""
        held = TODO.empty_table()
        for some in slices:
            rows = self.work.read_slice(some)
            nothing = pa.nulls(rows.num_rows)
            columns = [rows[name] if name in rows.column_names else nothing for name in TODO.names]
            held = pa.concat_tables([held, pa.table(columns, TODO.names).cast(TODO)])
            while held.num_rows >= ROWS_PER_FILE:
                yield held.slice(0, ROWS_PER_FILE)
                held = held.slice(ROWS_PER_FILE)
        if held.num_rows:
            yield held

    def _keep(self, stay: pa.Table) -> pa.RecordBatch:
        """Write down which rows of the table stay as they are, but for their version."""
        kept = f"kept-{uuid.uuid4().hex}.parquet"
        self.work.write(kept, stay.select(LISTING.names))
        nothing = TABLE.empty_table()
        return told(1, nothing, self.dimensions, kept=kept, kept_rows=stay.num_rows)

    def _rows(
        self,
        images: pa.Table,
        decode_one: Decode,
        network: Network,
        read: Callable[[Row], Outcome],
        reads: Reads,
    ) -> tuple[pa.Table, npt.NDArray[np.intp]]:
        """Return rows of the table, and which of the images need none: their old row stays."""
        count = images.num_rows
        vectors: list[npt.NDArray[np.float32] | None] = [None] * count
        hashes: list[bytes | None] = [None] * count
        stages: list[str | None] = [None] * count
        reasons: list[str | None] = [None] * count
        stays = np.zeros(count, bool)
        since: list[int | None] = [self.since] * count
        todo = images.to_pylist()
        listed = images.select(LISTING.names)
        for row, outcome in enumerate(read_ahead(todo, read)):
            known = todo[row]
            reads.count(known, outcome)
            try:
                if isinstance(outcome, BadImageError):
                    raise outcome
                hashes[row] = hashlib.sha256(outcome).digest()
                # A copied bucket, another upload of the same bytes: read, and not computed again.
                is_same = hashes[row] == known["known_sha256"]
                if is_same:  # nothing was added, whoever makes its features
                    since[row] = known["known_since"]
                if known["same_maker"] and is_same:
                    stays[row] = True
                else:
                    vectors[row] = network(decode_one(outcome, self.input_size)).astype("<f4")
            except BadImageError as error:
                stages[row], reasons[row] = error.reason.stage, str(error)
                stays[row] = _stays(known, error.reason)
            self.done.add(1)
            if stages[row]:
                self.quarantined.add(1)
        rows = pa.table(
            [
                *listed.columns,
                pa.array(hashes, pa.binary()),
                pa.array([DECODER] * count),
                pa.array([RUNTIME] * count),
                _lists(vectors, self.dimensions),
                pa.array(stages, pa.string()),
                pa.array(reasons, pa.string()),
                pa.array(since, pa.int64()),
            ],
            schema=TABLE,
        )
        return rows.filter(pa.array(~stays)), np.flatnonzero(stays)


@dataclass
class Reads:
    """What a task saw of images that were read for the first time: it decides whom to believe.

    Attributes
    ----------
    tried, failed
        Images that were asked for, and of them those that were not given.
    example
        The first of those, and why.
    refused
        The first that S3 refused: whose fault that is, is not known here.
    good, good_row
        An image that was read, and how it was listed.
    trouble
        What is wrong with the run.
    """

    tried: int = 0
    failed: int = 0
    example: str | None = None
    refused: str | None = None
    good: str | None = None
    trouble: str | None = None
    good_row: Row = field(default_factory=dict, compare=False)

    def count(self, row: Row, outcome: Outcome) -> None:
        """Count an image in."""
        is_new = row["known_reason"] is None
        if is_new and told_by_listing(row) is not None:
            return
        self.tried += is_new
        if not isinstance(outcome, BadImageError):
            if self.good is None:
                self.good, self.good_row = row["path"], row
        elif outcome.reason.stage == READ:
            told = f"{row['path']}: {outcome}"
            self.failed += is_new
            self.example = self.example or (told if is_new else None)
            if outcome.reason.is_refusal and word_of(row["known_reason"] or "") != (
                outcome.reason.word
            ):
                self.refused = self.refused or told

    def verify(self, read: Callable[[Row], Outcome]) -> None:
        """Read again what could be read: where that is refused, too, no image is to blame."""
        if self.refused and self.good:
            again = read({**self.good_row, "known_reason": ""})
            if isinstance(again, BadImageError) and again.reason.is_refusal:
                self.trouble = (
                    f"{self.good} was given a moment ago, and is not any more: {again.detail}. "
                    "Check the role's and the bucket's policy."
                )

    def told(self) -> pa.RecordBatch:
        """Return a row of WRITTEN that adds nothing to the table."""
        nothing = {"sign": 1, "counted": 0, "quarantined": 0, "each_run": 0, "daily": 0}
        seen = {name: getattr(self, name) for name in WRITTEN.names if hasattr(self, name)}
        return pa.RecordBatch.from_pylist([nothing | seen], schema=WRITTEN)


def _stays(known: Row, reason: Reason) -> bool:
    """Tell whether an image that cannot be read now keeps the row that it has."""
    if reason.stage != READ:
        return False
    had_content = known["same_listing"] and known["known_sha256"] is not None
    if had_content and reason not in (Reason.VANISHED, Reason.REPLACED):
        return True  # it was to be computed by another maker, and was archived meanwhile
    return word_of(known["known_reason"] or "") == reason.word


def _lists(vectors: list[npt.NDArray[np.float32] | None], d: int) -> pa.Array:
    """Return vectors as an Arrow column of lists, null where there is none."""
    is_null = np.array([vector is None for vector in vectors])
    offsets = np.concatenate([[0], np.cumsum(~is_null * d)]).astype(np.int32)
    flat = [vector for vector in vectors if vector is not None]
    values = np.concatenate(flat) if flat else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(is_null))


Decode = Callable[[bytes, int], Pixels]
Network = Callable[[Pixels], npt.NDArray[np.float32]]

_networks: dict[int, Network] = {}
_readers: dict[ImageReader, Callable[[str], tuple[bytes, str]]] = {}


@contextmanager
def _decoder(limits: Limits) -> Iterator[Decode]:
    """Give the decoder of this attempt: from the second on, one in a process of its own."""
    task = TaskContext.get()
    if task is not None:
        go_first(500)  # not the executor, which holds what other tasks have done
    if task is not None and task.attemptNumber() > 0:
        with Apart(limits) as apart:
            yield apart.decode
        return

    def here(content: bytes, size: int) -> Pixels:
        with within(limits.seconds):
            return decode(content, size)

    yield here


def _network(model: Broadcast[bytes]) -> Network:
    """Load the model once in the life of a Python worker, not once a task."""
    content = model.value
    if id(content) not in _networks:
        _networks.clear()
        _networks[id(content)] = load_network(content)
        # Spark's worker collects garbage after each task; what lives as long as the process
        # (libraries, the model) need not be looked through each time.
        gc.freeze()
    return _networks[id(content)]


def _opened(reader: ImageReader) -> Callable[[str], tuple[bytes, str]]:
    """Open the reader, and its connections, once in the life of a Python worker."""
    if reader not in _readers:
        _readers[reader] = reader.open()
    return _readers[reader]


@dataclass(frozen=True)
class Rewrite:
    """Writes files of the table again, without the rows that the plan names.

    Rows that are `kept` stay, with length, time and version as they are listed now.
    """

    table: Parts
    work: Parts
    kept: list[str]
    commit: str
    dimensions: int

    def __call__(self, files: Iterator[Touched]) -> Iterator[pa.RecordBatch]:
        """Yield for each file what a commit needs to know: what is left, and what went."""
        plans = [(touched, self._plan_of(touched)) for touched in files]
        kept = self._kept_of({path for _, plan in plans for path in plan})
        for touched, plan in plans:
            if all(path in kept and is_same for path, is_same in plan.items()):
                continue  # all of it could not be read before, and cannot be read now
            rows = pa.Table.from_batches(list(self.table.read(touched.file)))
            paths = rows["path"].to_pylist()
            if missing := plan.keys() - set(paths):
                raise StateError(
                    f"expected a row of {min(missing)} in {touched.file}, found none. Run again."
                )
            goes = pa.array([path in plan and path not in kept for path in paths])
            stays = {number: kept[path] for number, path in enumerate(paths) if path in kept}
            renewed = _listed_anew(rows, stays)
            if renewed.equals(rows) and not pc.any(goes).as_py():
                continue
            left = renewed.filter(pc.invert(goes))
            others: dict[str, str | int | None] = {"replaces": touched.file}
            if left.num_rows:
                path = f"{self.commit}/{uuid.uuid4().hex}.parquet"
                size = self.table.write(path, left)
                others |= {"path": path, "size": size, "rows": left.num_rows}
            yield told(-1, rows.filter(goes), self.dimensions, **others)

    def _plan_of(self, touched: Touched) -> dict[str, bool]:
        """Return the paths that the plan names, and whether they are listed as they were."""
        some = Slice(touched.part, touched.start, touched.todo + touched.gone)
        rows = self.work.read_slice(some)
        same = rows["same_listing"] if "same_listing" in rows.column_names else rows["path"]
        is_same = (value is True for value in same.to_pylist())
        return dict(zip(rows["path"].to_pylist(), is_same, strict=True))

    def _kept_of(self, paths: set[str]) -> dict[str, dict[str, Any]]:
        """Return what is kept of some images."""
        rows = (row for name in self.kept for b in self.work.read(name) for row in b.to_pylist())
        return {row["path"]: row for row in rows if row["path"] in paths}


def _listed_anew(rows: pa.Table, stays: dict[int, dict[str, Any]]) -> pa.Table:
    """Return rows of the table with what is listed of some of them now."""
    for name in ("length", "modified", "version") if stays else ():
        place = rows.column_names.index(name)
        values = rows[name].to_pylist()
        for number, row in stays.items():
            values[number] = row[name]
        field = rows.schema.field(place)
        rows = rows.set_column(place, field, pa.chunked_array([pa.array(values, field.type)]))
    return rows
