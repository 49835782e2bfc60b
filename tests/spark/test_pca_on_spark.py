"""PCA on the cluster against scikit-learn, and its exchange with Spark ML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyspark.ml.feature import PCAModel
from pyspark.ml.functions import array_to_vector
from sklearn.decomposition import PCA as ReferencePCA

from pipeline.pca import PCA, Moments, moments_of

ROWS, D = 500, 40


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    random = np.random.default_rng(7)
    mixed = random.normal(size=(ROWS, 12)) @ random.normal(size=(12, D))
    return (mixed + random.normal(scale=0.1, size=(ROWS, D)) + 5).astype(np.float32)


@pytest.fixture(scope="module")
def frame(spark: object, rows: np.ndarray) -> object:
    data = [(row.tolist(),) for row in rows]
    return spark.createDataFrame(data, "features array<float>").repartition(7).cache()


@pytest.mark.parametrize("slots", [1, 2, 20])
def test_moments_from_the_cluster_equal_those_of_the_whole(
    frame: object, rows: np.ndarray, slots: int
) -> None:
    found = moments_of(frame, D, slots)
    expected = Moments.of(rows)
    assert found.n == ROWS
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=1e-9, atol=1e-9)


def test_scores_and_variances_equal_scikit_learns_full_solver(
    frame: object, rows: np.ndarray
) -> None:
    ours = PCA.fit(moments_of(frame, D, 2), components=10)
    reference = ReferencePCA(10, svd_solver="full").fit(rows.astype(np.float64))
    np.testing.assert_allclose(ours.variances[:10], reference.explained_variance_, rtol=1e-6)
    theirs = reference.transform(rows.astype(np.float64))
    signs = np.sign((ours.components * reference.components_).sum(axis=1))
    np.testing.assert_allclose(ours.transform(rows), theirs * signs, atol=1e-6)


def test_spark_ml_transforms_with_our_model_and_keeps_it(
    spark: object, frame: object, rows: np.ndarray, tmp_path: Path
) -> None:
    ours = PCA.fit(Moments.of(rows), components=5)
    ours.to_spark().save(str(tmp_path / "model"))
    model = PCAModel.load(str(tmp_path / "model"))

    vectors = frame.select(array_to_vector("features").alias("features"))
    scored = model.setInputCol("features").setOutputCol("scores").transform(vectors).collect()
    source = np.array([row["features"].toArray() for row in scored])
    theirs = np.array([row["scores"].toArray() for row in scored])
    constant = ours.mean @ ours.components.T  # Spark does not subtract the mean
    np.testing.assert_allclose(theirs - constant, ours.transform(source), atol=1e-8)

    back = PCA.from_spark(model, ours.mean, ours.total_variance)
    np.testing.assert_allclose(back.components, ours.components, atol=1e-12)
    np.testing.assert_allclose(back.variances, ours.variances[:5], rtol=1e-9)
