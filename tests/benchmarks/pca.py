"""How much faster is this project's PCA than MLlib's on the same table?

`pca_over_mllib`: seconds of `pyspark.ml.feature.PCA(k=50).fit` divided by the seconds of
`moments_of` and `PCA.fit(components=50)`, on 40,000 rows of 1,280 random features in Parquet on
S3 (see random_features.py). Both read the same rows from S3, uncached, as is usual after a feature
job: this project's compressed as its table is; MLlib's as Spark's settings have it, turned into
vectors by Spark's own `array_to_vector`. Each fits three times in an application of
its own, and the medians are compared: what the first fit takes to start Python workers and to
compile counts for neither. MLlib's arithmetic is in Java, so its application has Java's usual
settings, with the optimising compiler (see USUAL_JAVA in _common.py); this project's has those
that a laptop's cluster is shipped with.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from pyspark.ml.feature import PCA as MLlibPCA
from pyspark.ml.functions import array_to_vector
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf

from pipeline.engine.session import task_slots
from pipeline.local.loopback import loopback_cluster
from pipeline.local.place import CLUSTERS
from pipeline.pca import PCA, moments_of
from pipeline.storage import Address, BucketStore
from pipeline.table.parts import CODEC
from tests.benchmarks._common import BUCKET, USUAL_JAVA, Setup, application
from tests.benchmarks.random_features import DIMENSIONS, write_random_features
from tests.benchmarks.results import Result

COMPONENTS = 50
FITS = 3


def measure(setup: Setup) -> list[Result]:
    """Return the ratio, both times, and how far the explained variances are apart."""
    with loopback_cluster(CLUSTERS) as cluster:
        BucketStore(Address(BUCKET, ""), cluster.s3).create_bucket()
        uri = f"s3a://{BUCKET}/random.parquet"
        with application(cluster) as spark:
            write_random_features(spark, f"{uri}/ours", setup.rows, codec=CODEC)
            write_random_features(spark, f"{uri}/usual", setup.rows, codec="zstd")
            fit, ratios = _median(_fit, spark, f"{uri}/ours")
        with application(cluster, USUAL_JAVA) as spark:
            mllib, their_ratios = _median(_fit_by_mllib, spark, f"{uri}/usual")
    apart = float(np.abs(ratios - their_ratios).max())
    return [
        Result("pca_over_mllib", mllib / fit, "ratio", ">= 10"),
        Result("pca_seconds", fit, "s"),
        Result("pca_mllib_seconds", mllib, "s"),
        Result("pca_variance_ratios_difference_from_mllib", apart, "share", "<= 1e-9"),
    ]


def _median(
    fit: Callable[[SparkSession, str], np.ndarray], spark: SparkSession, uri: str
) -> tuple[float, np.ndarray]:
    """Return the median seconds of some fits, and the variance ratios of the last."""
    seconds = []
    for _ in range(FITS):
        began = time.monotonic()
        ratios = fit(spark, uri)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds), ratios


def _fit(spark: SparkSession, uri: str) -> np.ndarray:
    moments = moments_of(spark.read.parquet(uri), DIMENSIONS, task_slots(spark))
    return PCA.fit(moments, components=COMPONENTS).variance_ratio[:COMPONENTS]


def _fit_by_mllib(spark: SparkSession, uri: str) -> np.ndarray:
    table = spark.read.parquet(uri).select(array_to_vector(sf.col("features")).alias("features"))
    model = MLlibPCA(k=COMPONENTS, inputCol="features", outputCol="scores").fit(table)
    return model.explainedVariance.toArray()
