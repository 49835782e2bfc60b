"""Projects the feature table on the principal components and writes the matrix.

`matrix.parquet/` is written by all workers; `matrix.csv` is one file, sorted by path, with plain
numbers that any tool reads. Everything is prepared below `_next/` and takes its place at the end.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.core.broadcast import Broadcast
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as st

from pipeline.errors import StateError
from pipeline.pca import PCA, feature_matrix
from pipeline.storage import Store

NEXT = "_next"  # where a result is prepared
RESULT = (
    "matrix.parquet",
    "matrix.csv",
    "explained_variance.csv",
    "model",
    "quarantine.csv",
    "report.html",
)


def write_matrix(spark: SparkSession, features: DataFrame, pca: PCA, output: Store) -> None:
    """Write `matrix.parquet/` and `matrix.csv` below OUTPUT's `_next/`.

    Parameters
    ----------
    features
        Columns path, label, features.
    pca
        The projection; the matrix gets columns path, label, pc_1 .. pc_k (double).
    """
    names = [f"pc_{number}" for number in range(1, pca.k + 1)]
    schema = st.StructType(
        [st.StructField("path", st.StringType()), st.StructField("label", st.StringType())]
        + [st.StructField(name, st.DoubleType()) for name in names]
    )
    folder = output.address / NEXT
    model = spark.sparkContext.broadcast(pca.to_bytes())
    rows = features.select("path", "label", "features").mapInArrow(_project(model, names), schema)
    rows.write.mode("overwrite").parquet((folder / "matrix.parquet").uri)
    matrix = spark.read.schema(schema).parquet((folder / "matrix.parquet").uri)
    one_file = matrix.repartition(1).sortWithinPartitions("path")
    one_file.write.mode("overwrite").csv(
        (folder / "csv").uri,
        header=True,
        escape='"',
        ignoreLeadingWhiteSpace=False,  # names are kept as they are, as in Parquet
        ignoreTrailingWhiteSpace=False,
    )
    (part,) = (entry.key for entry in output.list(f"{NEXT}/csv/part-") if entry.key.endswith("csv"))
    output.move(part, f"{NEXT}/matrix.csv")
    output.delete(f"{NEXT}/csv")


def _project(model: Broadcast[bytes], names: list[str]) -> Any:
    def partition_scores(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        pca = PCA.from_bytes(model.value)
        for batch in batches:
            rows = feature_matrix(batch.column("features"), len(pca.mean))
            scores = np.asfortranarray(pca.transform(rows))
            columns = [pa.array(scores[:, column]) for column in range(pca.k)]
            yield pa.RecordBatch.from_arrays(
                [batch.column("path"), batch.column("label"), *columns],
                names=["path", "label", *names],
            )

    return partition_scores


def explained_variance_csv(pca: PCA) -> bytes:
    """Return a row for each principal axis: component, variance, ratio, cumulative, kept."""
    ratio = pca.variance_ratio
    rows = zip(pca.variances.tolist(), ratio.tolist(), np.cumsum(ratio).tolist(), strict=True)
    return to_csv(
        ["component", "variance", "ratio", "cumulative", "kept"],
        ([number, *row, number <= pca.k] for number, row in enumerate(rows, 1)),
    )


def quarantine_csv(quarantine: pa.Table) -> bytes:
    """Return path, stage and reason of each image that gave no features."""
    columns = ["path", "stage", "reason"]
    return to_csv(columns, (list(row.values()) for row in quarantine.select(columns).to_pylist()))


def to_csv(header: list[str], rows: Iterable[list[Any]]) -> bytes:
    """Return rows as the bytes of a CSV file in UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def publish(output: Store, run: bytes) -> None:
    """Move what was prepared to its place; `run.json` goes first and comes back last.

    Whoever reads an OUTPUT that has a run.json reads one whole result. A run that dies in between
    leaves none, and the next one makes the result again from the features, which are kept.

    Raises
    ------
    StateError
        When a part is not there: another run has used the same OUTPUT meanwhile.
    """
    prepared = {name: [entry.key for entry in output.list(f"{NEXT}/{name}")] for name in RESULT}
    for name, keys in prepared.items():
        if not keys:
            raise StateError(
                f"expected {name} in {output.address / NEXT}, found it gone: another run writes to "
                "this OUTPUT. Run again, one run at a time, or name another OUTPUT."
            )
    output.delete("run.json")
    for name, keys in prepared.items():
        output.delete(name)
        for key in sorted(keys, key=lambda key: key.endswith("/_SUCCESS")):  # true once it is there
            output.move(key, key.removeprefix(f"{NEXT}/"))
    output.delete(NEXT)
    output.write("run.json", run)
