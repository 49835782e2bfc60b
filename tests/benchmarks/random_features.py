"""Random features that a PCA finds structure in, written by the cluster itself."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

DIMENSIONS = 1280


def write_random_features(
    spark: SparkSession,
    uri: str,
    rows: int,
    *,
    codec: str,
    rank: int = 100,
    files: int = 8,
    seed: int = 360,
) -> None:
    """Write a Parquet table with a column `features`: lists of 1,280 float32.

    Each row is a point of a `rank`-dimensional space whose axes get slowly shorter, plus noise in
    all dimensions, plus a mean that is not zero. The same arguments give the same rows.
    """

    def generate(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import numpy as np

        axes = np.random.default_rng(seed).normal(size=(rank + 1, DIMENSIONS))
        lengths = 2 * 0.97 ** np.arange(rank)[:, np.newaxis]
        for batch in batches:
            n, first = batch.num_rows, batch.column(0)[0].as_py()
            random = np.random.default_rng([seed, first])
            points = random.normal(size=(n, rank)) @ (lengths * axes[:rank]) + axes[rank]
            noisy = (points + 0.5 * random.normal(size=points.shape)).astype(np.float32)
            ends = np.arange(0, n + 1, dtype=np.int32) * DIMENSIONS
            column = pa.ListArray.from_arrays(ends, pa.array(noisy.ravel()))
            yield pa.RecordBatch.from_arrays([column], ["features"])

    numbers = spark.range(0, rows, numPartitions=files)
    rows_made = numbers.mapInArrow(generate, "features array<float>")
    rows_made.write.option("compression", codec).parquet(uri)
