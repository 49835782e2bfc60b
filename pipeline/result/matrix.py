"""Projects the feature table on the principal components and writes the matrix.

`matrix.parquet/` is written by all workers; `matrix.csv` is one file, sorted by path, with plain
numbers that any tool reads.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
from pyspark import TaskContext
from pyspark.core.broadcast import Broadcast
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.drift import SCORES, Spreads
from pipeline.errors import StateError
from pipeline.pca import PCA, feature_matrix
from pipeline.storage import Store
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import FeatureTable, with_features
from pipeline.table.parts import Parts, for_each

BYTES_OF_NUMBER, BYTES_OF_PATH = 19, 60  # about, in the CSV
BYTES_OF_RANGE = 32 << 20
PART = pa.schema([("part", pa.string()), ("size", pa.int64()), ("rows", pa.int64())])
FAR = pa.schema([("path", pa.string()), ("label", pa.string()), ("distance", pa.float64())])
MOST_RANGES = 9_000  # an object of S3 is joined of 10,000 parts at most


def write_matrix(
    spark: SparkSession,
    table: FeatureTable,
    snapshot: Snapshot,
    features: int,
    pca: PCA,
    output: Store,
    place: str,
    since: int | None = None,
) -> Spreads | None:
    """Write `matrix.parquet/` and `matrix.csv` into a folder below OUTPUT.

    Parameters
    ----------
    features
        How many rows of the table have features, each of which gives a row.
    pca
        The projection; the matrix gets columns path, label, pc_1 .. pc_k (double).
    since
        The table's version in the result before; None where there is none.

    Returns
    -------
    Spreads
        Those of the scores, where rows were there before.

    Raises
    ------
    StateError
        When the matrix has not a row for each of them.
    """
    names = [f"pc_{number}" for number in range(1, pca.k + 1)]
    schema = pa.schema(
        [("path", pa.string()), ("label", pa.string()), *((name, pa.float64()) for name in names)]
    )
    folder = output.address / place
    model = spark.sparkContext.broadcast(pca.to_bytes())
    tallies = table.parts.beside(folder / f"spreads-{uuid.uuid4().hex}")
    project = Project(table.parts, model, names, tallies, since)
    rows = for_each(spark, list(snapshot.files), project, schema)
    rows.write.mode("overwrite").parquet((folder / "matrix.parquet").uri)
    matrix = spark.read.schema(rows.schema).parquet((folder / "matrix.parquet").uri)
    ranges = ranges_of(snapshot.rows, pca.k)
    in_ranges = matrix.repartitionByRange(ranges, "path") if ranges > 1 else matrix.repartition(1)
    csv = f"csv-{uuid.uuid4().hex}"
    write = WriteRange(table.parts.beside(folder / csv), ["path", "label", *names])
    told = in_ranges.sortWithinPartitions("path").mapInArrow(write, from_arrow_schema(PART))
    parts = sorted(told.collect(), key=lambda row: str(row["part"]))
    found = sum(row["rows"] for row in parts)
    if found != features:
        raise StateError(
            f"expected {features:,} rows in the matrix, found {found:,}: a part of it was lost, or "
            "the table is damaged. Run again."
        )
    joined = [(f"{place}/{csv}/{row['part']}", row["size"]) for row in parts]
    output.join(joined, f"{place}/matrix.csv")
    output.delete(f"{place}/{csv}")
    if since is None:
        return None
    spreads = Spreads(min(SCORES, pca.k))
    written = f"{place}/{tallies.address.path.rpartition('/')[2]}"
    for entry in output.list(f"{written}/"):
        for batch in tallies.read(entry.key.rpartition("/")[2]):
            spreads.merge(pa.Table.from_batches([batch]))
    output.delete(written)
    return spreads


def ranges_of(rows: int, k: int) -> int:
    """Return in how many ranges of paths the CSV is written, of some 32 MiB each."""
    size = rows * (k * BYTES_OF_NUMBER + BYTES_OF_PATH)
    return int(min(max(1, size // BYTES_OF_RANGE), MOST_RANGES))


@dataclass(frozen=True)
class WriteRange:
    """What a task does with a range of the matrix, sorted by path: its part of the CSV."""

    parts: Parts
    names: list[str]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the part's name, which sorts as the ranges do, and its bytes."""
        number = TaskContext.get().partitionId()  # type: ignore[union-attr]
        content = io.BytesIO()
        if number == 0:
            content.write(to_csv(self.names, []))
        as_needed = pv.WriteOptions(include_header=False, quoting_style="needed")
        rows = 0
        for batch in batches:
            pv.write_csv(batch, content, as_needed)
            rows += batch.num_rows
        part = f"{number:06d}.csv"
        self.parts.put(part, content)
        told = {"part": [part], "size": [content.tell()], "rows": [rows]}
        yield pa.RecordBatch.from_pydict(told, PART)


@dataclass(frozen=True)
class Project:
    """What a task does with files of the feature table: the scores of their rows.

    With `since`, it also writes the spreads of the scores: rows of that version of the table, or of
    a later one, are those that were added.
    """

    parts: Parts
    model: Broadcast[bytes]
    names: list[str]
    tallies: Parts
    since: int | None

    def __call__(self, files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        """Yield path, label and scores."""
        pca = PCA.from_bytes(self.model.value)
        spreads = Spreads(min(SCORES, pca.k))
        for batch in (batch for file in files for batch in with_features(self.parts, file)):
            rows = feature_matrix(batch.column("features"), len(pca.mean))
            scores = np.asfortranarray(pca.transform(rows))
            columns = [pa.array(scores[:, column]) for column in range(pca.k)]
            yield pa.RecordBatch.from_arrays(
                [batch.column("path"), batch.column("label"), *columns],
                names=["path", "label", *self.names],
            )
            if self.since is not None:
                spreads.add(batch.column("label"), scores, is_added(batch, self.since))
        if self.since is not None:
            number = TaskContext.get().partitionId()  # type: ignore[union-attr]
            self.tallies.write(f"{number}.parquet", spreads.to_table())


def is_added(rows: pa.RecordBatch, since: int) -> npt.NDArray[np.bool_]:
    """Tell which rows were added to the table at a version or later."""
    if "since" not in rows.schema.names:
        return np.zeros(rows.num_rows, bool)
    added = pc.fill_null(pc.greater_equal(rows.column("since"), since), False)
    found: npt.NDArray[np.bool_] = added.to_numpy(zero_copy_only=False)
    return found


@dataclass(frozen=True)
class Farthest:
    """What a task does to find the added images that are farthest from the others of their label.

    Attributes
    ----------
    others
        Mean and standard deviation of the others' scores, by label.
    """

    parts: Parts
    model: Broadcast[bytes]
    since: int
    others: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
    number: int

    def __call__(self, files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        """Yield path, label and distance of a few."""
        pca = PCA.from_bytes(self.model.value)
        found: list[dict[str, Any]] = []
        for file in files:
            if not any(is_added(b, self.since).any() for b in self.parts.read(file, ["since"])):
                continue
            for batch in with_features(self.parts, file):
                rows = batch.filter(pa.array(is_added(batch, self.since)))
                if not rows.num_rows:
                    continue
                scores = pca.transform(feature_matrix(rows.column("features"), len(pca.mean)))
                names = zip(*(rows.column(name).to_pylist() for name in FAR.names[:2]), strict=True)
                for (path, label), row in zip(names, scores, strict=True):
                    if (others := self.others.get(label or "")) is not None:
                        mean, deviation = others
                        apart = np.mean(((row[: len(mean)] - mean) / deviation) ** 2)
                        found.append({"path": path, "label": label, "distance": float(apart**0.5)})
                found = sorted(found, key=lambda one: -one["distance"])[: self.number]
        yield pa.RecordBatch.from_pylist(found, FAR)


def explained_variance_csv(pca: PCA) -> bytes:
    """Return a row for each principal axis: component, variance, ratio, cumulative, kept."""
    ratio = pca.variance_ratio
    rows = zip(pca.variances.tolist(), ratio.tolist(), np.cumsum(ratio).tolist(), strict=True)
    return to_csv(
        ["component", "variance", "ratio", "cumulative", "kept"],
        ([number, *row, number <= pca.k] for number, row in enumerate(rows, 1)),
    )


def to_csv(header: list[str], rows: Iterable[list[Any]]) -> bytes:
    """Return rows as the bytes of a CSV file in UTF-8."""
    text = io.StringIO()
    write_csv(text, header, rows)
    return text.getvalue().encode()


def write_csv(file: TextIO, header: list[str], rows: Iterable[list[Any]]) -> None:
    """Write rows as CSV, one after the other."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
