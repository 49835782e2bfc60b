"""Are the features and the matrix right? Compared with Keras and scikit-learn on 600 images.

The whole job runs on the sample (600 real photos of 20 varieties) with 50 components; features and
scores are read back from what it wrote on S3.

- `features_max_difference_from_keras`: largest absolute difference from Keras's own MobileNetV2
  with the same weights on the same decoded pixels (see keras_features.py).
- `one_nn_accuracy_...`: share of images whose nearest other image, by Euclidean distance, is of
  the same variety (leave-one-out), on the 1,280 features and on the 50 components.
- `pca_variances_difference_from_sklearn` (relative) and `pca_scores_difference_from_sklearn`
  (absolute, up to the sign of each component): against scikit-learn's PCA with the full solver in
  float64 on the same features.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.neighbors import NearestNeighbors

from pipeline.networks.decode import decode
from pipeline.pca import PCA, feature_matrix
from tests.benchmarks._common import SAMPLE, Place, Setup, application, images_on_s3
from tests.benchmarks.results import Result

IMAGES = 600
COMPONENTS = 50


def measure(setup: Setup) -> list[Result]:
    """Return the differences and the accuracies."""
    with images_on_s3(setup, SAMPLE, min(IMAGES, setup.images or IMAGES)) as place:
        features, scores, labels, pca = _run(place)
        keras = _keras_features(place)
    reference = SklearnPCA(COMPONENTS, svd_solver="full").fit(features.astype(np.float64))
    expected = reference.explained_variance_
    variances = np.abs(pca.variances[:COMPONENTS] / expected - 1).max()
    reference_scores = reference.transform(features.astype(np.float64))
    signs = np.sign((reference_scores * scores).sum(axis=0))
    score = np.abs(reference_scores * signs - scores).max()
    exact = "<= 1e-6"
    return [
        Result("features_max_difference_from_keras", _largest(features - keras), "", "<= 1e-3"),
        Result("one_nn_accuracy_features", _one_nn(features, labels), "share", ">= 0.99"),
        Result("one_nn_accuracy_50_components", _one_nn(scores, labels), "share", ">= 0.99"),
        Result("pca_variances_difference_from_sklearn", float(variances), "relative", exact),
        Result("pca_scores_difference_from_sklearn", float(score), "absolute", exact),
    ]


def _run(place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray, PCA]:
    """Return features, scores and labels, all sorted by path, and the fitted PCA."""
    with application(place.cluster) as spark:
        job = place.job("correctness", spark, COMPONENTS)
        job.run()
        snapshot = job.table.snapshot()
        rows = job.table.features(spark, snapshot).toArrow().sort_by("path")
        matrix = spark.read.parquet((job.output / "matrix.parquet").uri).toArrow().sort_by("path")
    if rows["path"] != matrix["path"] or rows.num_rows != len(place.files):
        raise RuntimeError(f"expected a row for each of {len(place.files)} images")
    features = feature_matrix(rows["features"].combine_chunks(), place.model.dimensions)
    pca = PCA.from_bytes(job.store.read("model/pca.npz") or b"")
    return features, _scores(matrix), np.array(rows["label"].to_pylist()), pca


def _scores(matrix: pa.Table) -> np.ndarray:
    names = [f"pc_{number}" for number in range(1, COMPONENTS + 1)]
    return np.column_stack([matrix[name].to_numpy() for name in names])


def _keras_features(place: Place) -> np.ndarray:
    """Return Keras's features, sorted by path; the files are sorted so already."""
    size = place.model.input_size
    pixels = np.stack([decode(file.read_bytes(), size) for file in place.files])
    with tempfile.TemporaryDirectory(prefix="fruits-") as scratch:
        given, made = Path(scratch) / "pixels.npy", Path(scratch) / "features.npy"
        np.save(given, pixels)
        subprocess.run(
            [
                *(sys.executable, "-m", "tests.benchmarks.keras_features"),
                *(str(given), str(place.weights), str(made)),
            ],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"},
            stderr=subprocess.DEVNULL,
            check=True,
        )
        return np.load(made)


def _one_nn(rows: np.ndarray, labels: np.ndarray) -> float:
    nearest = NearestNeighbors(n_neighbors=1).fit(rows).kneighbors(return_distance=False)[:, 0]
    return float((labels[nearest] == labels).mean())


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())
