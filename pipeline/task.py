"""What a worker does with its share of the images: reads ahead, decodes, runs the network.

An image that cannot be read as it was listed, or cannot be decoded, gets a row with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.accumulators import Accumulator
from pyspark.core.broadcast import Broadcast

from pipeline.networks.decode import MAX_BYTES, BadImageError, decode
from pipeline.networks.model import load_network
from pipeline.storage import ImageReader
from pipeline.table import ARROW_ROWS, DECODE, READ

# Images are read in bursts, one ahead of the network: single GETs wake threads on both sides for
# each image, which costs up to 2 ms of a core. A burst takes 50 ms, the network 300 ms for it.
GETS_AT_ONCE = 32
BYTES_AT_ONCE = 24_000_000  # keeps a Python worker small when the images are large


@dataclass(frozen=True)
class PassOverImages:
    """What a Spark task does with its share of the listing: the function given to mapInArrow."""

    model: Broadcast[bytes]
    input_size: int
    reader: ImageReader
    batch: str
    done: Accumulator[int]
    quarantined: Accumulator[int]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield for each batch of listed images their rows of the table (ARROW_ROWS)."""
        network = _network(self.model)
        read = _checked(_opened(self.reader))
        for batch in batches:
            vectors: list[bytes | None] = [None] * batch.num_rows
            stages: list[str | None] = [None] * batch.num_rows
            reasons: list[str | None] = [None] * batch.num_rows
            for row, outcome in enumerate(_read_ahead(batch.to_pylist(), read)):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    vector = network(decode(outcome, self.input_size))
                    vectors[row] = vector.astype("<f4").tobytes()
                except _Unreadable as error:
                    stages[row], reasons[row] = READ, str(error)
                except BadImageError as error:
                    stages[row], reasons[row] = DECODE, str(error)
            self.done.add(batch.num_rows)
            self.quarantined.add(sum(stage is not None for stage in stages))
            yield pa.RecordBatch.from_arrays(
                [
                    *batch.columns,
                    pa.array([self.batch] * batch.num_rows, pa.string()),
                    pa.array(vectors, pa.binary()),
                    pa.array(stages, pa.string()),
                    pa.array(reasons, pa.string()),
                ],
                schema=ARROW_ROWS,
            )


class _Unreadable(Exception):  # noqa: N818
    """An image that could not be read as it was listed."""


_networks: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {}
_readers: dict[ImageReader, Callable[[str], tuple[bytes, str]]] = {}


def _network(
    model: Broadcast[bytes],
) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
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
