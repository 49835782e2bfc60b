"""What a worker does: reads images ahead, decodes them, runs the network; rewrites files.

An image that cannot be read as it was listed, or cannot be decoded, gets a row with the reason.
"""

from __future__ import annotations

import gc
import hashlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.accumulators import Accumulator
from pyspark.core.broadcast import Broadcast

from pipeline.errors import StateError
from pipeline.listing.images import LISTING
from pipeline.networks.decode import MAX_BYTES, BadImageError, decode
from pipeline.networks.model import load_network
from pipeline.plan import TODO, Touched
from pipeline.storage import ImageReader
from pipeline.table.feature_table import (
    DECODE,
    DECODER,
    READ,
    ROWS_PER_FILE,
    RUNTIME,
    TABLE,
    told,
    written,
)
from pipeline.table.parts import Parts, Slice

# Images are read in bursts, one ahead of the network: single GETs wake threads on both sides for
# each image, which costs up to 2 ms of a core. A burst takes 50 ms, the network 300 ms for it.
GETS_AT_ONCE = 32
BYTES_AT_ONCE = 24_000_000  # keeps a Python worker small when the images are large


@dataclass(frozen=True)
class PassOverImages:
    """What a Spark task does with its share of the listing: rows of the table, in files of it.

    Attributes
    ----------
    work
        Where the slices of the listing lie.
    table
        Where the table's files go, below the folder `commit`.
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

    def __call__(self, slices: Iterator[Slice]) -> Iterator[pa.RecordBatch]:
        """Yield for each file that was written what a commit needs to know of it (WRITTEN)."""
        network = _network(self.model)
        read = _checked(_opened(self.reader))
        for images in self._gathered(slices):
            rows, stay = self._rows(images, network, read)
            if len(stay):
                yield self._keep(images.take(stay))
            if rows.num_rows:
                yield written(self.table, self.commit, rows, self.dimensions)

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
        self, images: pa.Table, network: Network, read: Read
    ) -> tuple[pa.Table, npt.NDArray[np.intp]]:
        """Return rows of the table, and which of the images need none: their old row stays."""
        count = images.num_rows
        vectors: list[npt.NDArray[np.float32] | None] = [None] * count
        hashes: list[bytes | None] = [None] * count
        stages: list[str | None] = [None] * count
        reasons: list[str | None] = [None] * count
        stays = np.zeros(count, bool)
        known = images.select(["known_sha256", "known_reason", "same_maker"]).to_pylist()
        listed = images.select(LISTING.names)
        for row, outcome in enumerate(_read_ahead(listed.to_pylist(), read)):
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                hashes[row] = hashlib.sha256(outcome).digest()
                # A copied bucket, another upload of the same bytes: read, and not computed again.
                if known[row]["same_maker"] and hashes[row] == known[row]["known_sha256"]:
                    stays[row] = True
                else:
                    vectors[row] = network(decode(outcome, self.input_size)).astype("<f4")
            except _Unreadable as error:
                stages[row], reasons[row] = READ, str(error)
                stays[row] = known[row]["known_reason"] == str(error)
            except BadImageError as error:
                stages[row], reasons[row] = DECODE, str(error)
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
            ],
            schema=TABLE,
        )
        return rows.filter(pa.array(~stays)), np.flatnonzero(stays)


def _lists(vectors: list[npt.NDArray[np.float32] | None], d: int) -> pa.Array:
    """Return vectors as an Arrow column of lists, null where there is none."""
    is_null = np.array([vector is None for vector in vectors])
    offsets = np.concatenate([[0], np.cumsum(~is_null * d)]).astype(np.int32)
    flat = [vector for vector in vectors if vector is not None]
    values = np.concatenate(flat) if flat else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(is_null))


class _Unreadable(Exception):  # noqa: N818
    """An image that could not be read as it was listed."""


Network = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
Read = Callable[[dict[str, Any]], "bytes | _Unreadable | BadImageError"]

_networks: dict[int, Network] = {}
_readers: dict[ImageReader, Callable[[str], tuple[bytes, str]]] = {}


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


def _checked(read: Callable[[str], tuple[bytes, str]]) -> Callable[[dict[str, Any]], Any]:
    """Read an image as it was listed; give back its bytes, or why it could not be read.

    An S3 that does not answer is not the image's fault: that error ends the task, Spark tries the
    task again, and a job that fails keeps the batches before it.
    """

    def read_row(row: dict[str, Any]) -> bytes | _Unreadable | BadImageError:
        if row["length"] > MAX_BYTES:
            return BadImageError(
                f"{row['length']:,} bytes are more than the {MAX_BYTES:,} that are read"
            )
        try:
            content, version = read(row["path"])
        except (FileNotFoundError, NotADirectoryError):
            return _Unreadable("deleted since it was listed")
        except IsADirectoryError:
            return _Unreadable("a folder, not a file")
        except (PermissionError, ValueError) as error:
            return _Unreadable(str(error))
        if version != row["version"]:
            return _Unreadable("replaced since it was listed; the next run takes the new one")
        return content

    return read_row


def _read_ahead(
    rows: list[dict[str, Any]],
    read: Callable[[dict[str, Any]], bytes | _Unreadable | BadImageError],
) -> Iterator[bytes | _Unreadable | BadImageError]:
    """Yield what `read` gives for each row, in order; the next burst is read meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(GETS_AT_ONCE) as pool:
        bursts = ([pool.submit(read, row) for row in burst] for burst in _bursts(rows))
        coming = next(bursts, [])
        while coming:
            current, coming = coming, next(bursts, [])
            while current:
                yield current.pop(0).result()


def _bursts(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cut rows into runs that are read at once, bounded in number and in bytes."""
    burst: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        size += row["length"]
        if burst and (len(burst) == GETS_AT_ONCE or size > BYTES_AT_ONCE):
            yield burst
            burst, size = [], row["length"]
        burst.append(row)
    if burst:
        yield burst


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
