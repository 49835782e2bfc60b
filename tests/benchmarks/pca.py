"""How much faster is this project's PCA than MLlib's on the same table?

`pca_over_mllib`: seconds of `pyspark.ml.feature.PCA(k=50).fit` divided by the seconds of
`moments_of` and `PCA.fit(components=50)`, on 40,000 rows of 1,280 random features in Parquet on
S3 (see random_features.py). Both read the same rows from S3, uncached, as is usual after a feature
job: this project's as it keeps them, packed; MLlib's as an array, the form that is usual there,
turned into a vector by Spark's own `array_to_vector`. They take turns
in one application, three times, and the medians are compared: the first turn's start of Python
workers and compilation counts for neither. Both have Java's usual settings, with its optimising
compiler (see USUAL_JAVA in _common.py).
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

from pipeline.laptop import loopback_cluster
from pipeline.pca import PCA, moments_of
from pipeline.place import CLUSTERS
from pipeline.session import task_slots
from pipeline.storage import Address, BucketStore
from tests.benchmarks._common import BUCKET, USUAL_JAVA, Setup, application
from tests.benchmarks.random_features import DIMENSIONS, write_random_features
from tests.benchmarks.results import Result

COMPONENTS = 50
TURNS = 3


def measure(setup: Setup) -> list[Result]:
    """Return the ratio, both times, and how far the explained variances are apart."""
    with (
        loopback_cluster(CLUSTERS) as cluster,
        application(cluster, USUAL_JAVA) as spark,
    ):
        BucketStore(Address(BUCKET, ""), cluster.s3).create_bucket()
        uri = f"s3a://{BUCKET}/random.parquet"
        write_random_features(spark, f"{uri}/packed", setup.rows, packed=True)
        write_random_features(spark, f"{uri}/lists", setup.rows, packed=False)
        ours, theirs = [], []
        for _ in range(TURNS):
            seconds, ratios = _timed(_fit, spark, f"{uri}/packed")
            ours.append(seconds)
            seconds, their_ratios = _timed(_fit_by_mllib, spark, f"{uri}/lists")
            theirs.append(seconds)
    apart = float(np.abs(ratios - their_ratios).max())
    fit, mllib = statistics.median(ours), statistics.median(theirs)
    return [
        Result("pca_over_mllib", mllib / fit, "ratio", ">= 10"),
        Result("pca_seconds", fit, "s"),
        Result("pca_mllib_seconds", mllib, "s"),
        Result("pca_variance_ratios_difference_from_mllib", apart, "share", "<= 1e-9"),
    ]


def _timed(
    fit: Callable[[SparkSession, str], np.ndarray], spark: SparkSession, uri: str
) -> tuple[float, np.ndarray]:
    began = time.monotonic()
    ratios = fit(spark, uri)
    return time.monotonic() - began, ratios


def _fit(spark: SparkSession, uri: str) -> np.ndarray:
    moments = moments_of(spark.read.parquet(uri), DIMENSIONS, task_slots(spark))
    return PCA.fit(moments, components=COMPONENTS).variance_ratio[:COMPONENTS]


def _fit_by_mllib(spark: SparkSession, uri: str) -> np.ndarray:
    table = spark.read.parquet(uri).select(array_to_vector(sf.col("features")).alias("features"))
    model = MLlibPCA(k=COMPONENTS, inputCol="features", outputCol="scores").fit(table)
    return model.explainedVariance.toArray()
