"""Parquet files that Spark's tasks read and write by Arrow, without a row passing through the JVM.

A file is small enough to be one object of S3, written by one PUT: it is there whole, or not at all.
What is done with each of a list of things (files, slices of files) is a DataFrame of the answers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.engine.session import task_slots
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, FolderStore, s3_client

# Floats hardly shrink: what is read again and again had better be quick to unpack.
CODEC = "lz4_raw"
ROWS_PER_BATCH = 1024
TASKS_PER_SLOT = 4  # slow tasks and quick ones even out; a progress bar moves as tasks end

Item = TypeVar("Item")


@dataclass(frozen=True)
class Slice:
    """Some rows of a file, one after the other."""

    path: str
    start: int
    count: int


def cut(slices: Sequence[Slice], number: int) -> list[Slice]:
    """Cut slices so that about `number` of them, of about the same size, come out."""
    size = max(1, -(-sum(some.count for some in slices) // max(1, number)))
    return [
        Slice(some.path, some.start + first, min(size, some.count - first))
        for some in slices
        for first in range(0, some.count, size)
    ]


@dataclass(frozen=True)
class Parts:
    """The Parquet files below an address, as a task on any host sees them."""

    address: Address
    s3: S3Settings

    def write(self, path: str, rows: pa.Table) -> int:
        """Write a file whole or not at all, and return its bytes."""
        content = io.BytesIO()
        pq.write_table(rows, content, compression=CODEC, use_dictionary=_words(rows.schema))
        self.put(path, content)
        return content.tell()

    def put(self, path: str, content: io.BytesIO) -> None:
        """Write any file whole or not at all."""
        if self.address.bucket is None:
            FolderStore(self.address).write(path, content.getvalue())
        else:
            self._client.put(path, content.getvalue())

    def beside(self, address: Address) -> Parts:
        """Return the parts below another address, reached in the same way."""
        return Parts(address, self.s3)

    def read(self, path: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield a file's rows; where columns are named, no other is read.

        Raises
        ------
        FileNotFoundError
            When the file is gone.
        """
        # By no other thread: a task has one slot, and one network reads ahead of itself already.
        yield from self._open(path, whole=columns is None or "features" in columns).iter_batches(
            ROWS_PER_BATCH, columns=columns, use_threads=False
        )

    def read_slice(self, some: Slice) -> pa.Table:
        """Return the rows of a slice."""
        return (
            self._open(some.path, whole=True).read(use_threads=False).slice(some.start, some.count)
        )

    def _open(self, path: str, *, whole: bool) -> pq.ParquetFile:
        if self.address.bucket is None:
            return pq.ParquetFile(pa.memory_map(str(Path(self.address.path) / path)))
        if whole:
            return pq.ParquetFile(pa.BufferReader(self._client.get(path).bytes().to_bytes()))
        return pq.ParquetFile(pa.PythonFile(_Ranged(self._client, path), "r"))

    @cached_property
    def _client(self) -> Any:
        return s3_client(self.address, self.s3)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the client behind: a task opens its own."""
        return {"address": self.address, "s3": self.s3}


class _Ranged(io.RawIOBase):
    """An object of S3 as a file: what is read is asked for, and no more."""

    def __init__(self, client: Any, path: str) -> None:
        self.client = client
        self.path = path
        self.size = int(client.head(path)["size"])
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self.size - self.place)
        if length > 0:
            found = self.client.get_range(self.path, start=self.place, length=length)
            buffer[:length] = memoryview(found)
            self.place += length
        return max(0, length)


def for_each(
    spark: SparkSession,
    items: Sequence[Item],
    do: Callable[[Iterator[Item]], Iterator[pa.RecordBatch]],
    schema: pa.Schema,
) -> DataFrame:
    """Return what `do` yields for items, which are dealt out to tasks evenly and in order.

    Parameters
    ----------
    do
        Called once in each task, with its items.
    schema
        Of what it yields.
    """

    def part(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        numbers = (number for batch in batches for number in batch.column(0).to_pylist())
        yield from do(items[number] for number in numbers)

    tasks = tasks_for(spark, len(items))
    return spark.range(0, len(items), 1, tasks).mapInArrow(part, from_arrow_schema(schema))


def picked(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    """Return some columns of a schema."""
    return pa.schema([schema.field(name) for name in columns])


def tasks_for(spark: SparkSession, items: int) -> int:
    """Return to how many tasks so many items are dealt out."""
    return max(1, min(items, task_slots(spark) * TASKS_PER_SLOT))


def _words(schema: pa.Schema) -> list[str]:
    """Name the columns in which the same few words come again and again."""
    return [
        name for name in ("label", "decoder", "runtime", "stage", "reason") if name in schema.names
    ]
