"""Principal components from exactly mergeable moments.

What a PCA needs of its data is (n, mean, scatter). Each part of the data gives its own, centred on
its own mean; two merge into exactly what their union would have given (Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979). Kept beside
the model, they let a refit on grown data read only what was added.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame

from pipeline.errors import PCAError, StateError

if TYPE_CHECKING:
    from pyspark.ml.feature import PCAModel

Floats = npt.NDArray[np.float64]

ROWS_PER_BLOCK = 2048  # 21 MB of float64 at 1,280 features: large enough for BLAS, small in memory
STATES_PER_MERGE = 8  # more states than this are merged by the cluster before the driver


@dataclass(frozen=True)
class Moments:
    """What a PCA needs of n rows of d features.

    Attributes
    ----------
    n
        Number of rows.
    mean
        Shape (d,).
    scatter
        Sum over the rows of (x - mean) (x - mean)', shape (d, d).
    """

    n: int
    mean: Floats
    scatter: Floats

    @classmethod
    def empty(cls, d: int) -> Moments:
        """Return the moments of no rows: merging them changes nothing."""
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, rows: npt.NDArray[Any]) -> Moments:
        """Return the moments of the rows of a matrix, shape (n, d)."""
        if not len(rows):
            return cls.empty(rows.shape[1])
        first = rows[0].astype(np.float64)
        centred = rows - first  # so that equal rows give exactly zero, not the mean's rounding
        apart = centred.mean(axis=0)
        centred -= apart
        return cls(len(rows), first + apart, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows together."""
        if not self.n or not other.n:
            return other if not self.n else self
        n = self.n + other.n
        apart = other.mean - self.mean
        return Moments(
            n,
            self.mean + apart * (other.n / n),
            self.scatter + other.scatter + np.outer(apart, apart * (self.n * other.n / n)),
        )

    def to_bytes(self) -> bytes:
        """Pack as npz: n, mean and the upper triangle of scatter, which is symmetric."""
        content = io.BytesIO()
        triangle = self.scatter[np.triu_indices(len(self.mean))]
        np.savez(content, n=self.n, mean=self.mean, triangle=triangle)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Moments:
        """Unpack what `to_bytes` packed."""
        with np.load(io.BytesIO(content)) as packed:
            mean, upper = packed["mean"], np.triu_indices(len(packed["mean"]))
            scatter = np.zeros((len(mean), len(mean)))
            scatter[upper] = packed["triangle"]
            scatter.T[upper] = packed["triangle"]
            return cls(int(packed["n"]), mean, scatter)


def merge_all(parts: Iterable[Moments], d: int) -> Moments:
    """Merge any number of moments of d features."""
    return reduce(Moments.merge, parts, Moments.empty(d))


def moments_of(features: DataFrame, d: int, slots: int) -> Moments:
    """Compute the moments of a DataFrame's column `features` on the cluster.

    Parameters
    ----------
    features
        Has a column `features` without nulls: the bytes of d float32, or array<float>.
    d
        Number of features.
    slots
        How many tasks the cluster runs at once: as many states are made.
    """
    states = features.select("features").coalesce(slots).mapInArrow(_states(d), _STATE)
    if slots > STATES_PER_MERGE:
        states = states.repartition(math.isqrt(slots)).mapInArrow(_merged(d), _STATE)
    rows = states.toArrow()["state"].to_pylist()
    return merge_all((Moments.from_bytes(state) for state in rows), d)


_STATE = "state binary"


def _states(d: int) -> Any:
    def partition_moments(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        moments = Moments.empty(d)
        for batch in batches:
            rows = feature_matrix(batch.column("features"), d)
            for start in range(0, len(rows), ROWS_PER_BLOCK):
                moments = moments.merge(Moments.of(rows[start : start + ROWS_PER_BLOCK]))
        yield pa.RecordBatch.from_pydict({"state": [moments.to_bytes()]})

    return partition_moments


def _merged(d: int) -> Any:
    def partition_merge(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        parts = (Moments.from_bytes(row.as_py()) for batch in batches for row in batch.column(0))
        yield pa.RecordBatch.from_pydict({"state": [merge_all(parts, d).to_bytes()]})

    return partition_merge


def feature_matrix(column: Any, d: int) -> npt.NDArray[np.float32]:
    """View an Arrow column of vectors as a matrix, shape (n, d), without a copy.

    A vector is the bytes of d float32 (as the feature table has it) or a list of d floats.
    """
    if pa.types.is_binary(column.type):
        _, offsets, values = column.buffers()
        first = np.frombuffer(offsets, np.int32)[column.offset] if len(column) else 0
        flat = np.frombuffer(values or b"", "<f4", len(column) * d, first)
    else:
        flat = column.flatten().to_numpy()
    matrix: npt.NDArray[np.float32] = flat.reshape(-1, d)
    return matrix


@dataclass(frozen=True)
class PCA:
    """A fitted projection from d features to k components.

    Attributes
    ----------
    components
        Shape (k, d): unit rows, by falling variance; the largest loading of each is positive.
    mean, scale
        Shape (d,): a row x is projected as ((x - mean) / scale) @ components.T. `scale` is 1
        without standardisation, else the standard deviation (1 where a feature is constant).
    variances
        Shape (r,): variance (ddof 1) along every principal axis of the data, r its rank.
    total_variance
        Sum of the variances of all features.
    """

    components: Floats
    mean: Floats
    scale: Floats
    variances: Floats
    total_variance: float

    @property
    def k(self) -> int:
        """Number of components."""
        return len(self.components)

    @property
    def variance_ratio(self) -> Floats:
        """Share of the total variance along every principal axis, shape (r,)."""
        return self.variances / self.total_variance

    @property
    def share(self) -> float:
        """Share of the variance that the k components keep, 0 to 1."""
        return float(self.variance_ratio[: self.k].sum())

    @classmethod
    def fit(
        cls,
        moments: Moments,
        *,
        components: int | None = None,
        variance: float | None = None,
        standardize: bool = False,
    ) -> PCA:
        """Fit from moments, as `numpy.linalg.eigh` of the covariance (or correlation) matrix.

        Parameters
        ----------
        components
            How many components to keep; or else
        variance
            the share of variance to keep, 0 < variance <= 1, by as few components as do.
        standardize
            Give every feature unit variance first.

        Raises
        ------
        PCAError
            When k is larger than the rank of the data, or there are fewer than two rows.

        Examples
        --------
        >>> rows = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]])
        >>> PCA.fit(Moments.of(rows), variance=0.9).components.round(3)
        array([[0.707, 0.707]])
        """
        if (components is None) == (variance is None):
            raise PCAError("expected a number of components or a share of variance, one of them.")
        if moments.n < 2:
            raise PCAError(
                f"PCA needs at least 2 images with features, found {moments.n}. Add images, or "
                "look at quarantine.csv for why they were left out."
            )
        covariance = moments.scatter / (moments.n - 1)
        scale = np.ones(len(moments.mean))
        if standardize:
            deviation = np.sqrt(np.diag(covariance))
            scale = np.where(deviation > 0, deviation, 1.0)
            covariance = covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        rank = _rank(values, moments.n)
        k = _choose_k(values, rank, components, variance)
        return cls(
            components=_signed(vectors[:, :k].T),
            mean=moments.mean,
            scale=scale,
            variances=values[:rank].copy(),
            total_variance=float(np.trace(covariance)),
        )

    def transform(self, rows: npt.NDArray[Any]) -> Floats:
        """Project rows, shape (n, d), to scores, shape (n, k)."""
        scores: Floats = ((rows - self.mean) / self.scale) @ self.components.T
        return scores

    def to_spark(self) -> PCAModel:
        """Return the same projection as Spark ML's model.

        Spark's `transform` neither subtracts the mean nor scales: its scores are those of
        `transform` plus a constant, here for data without standardisation only.
        """
        from pyspark.ml.common import _py2java
        from pyspark.ml.feature import PCAModel
        from pyspark.ml.linalg import DenseMatrix, DenseVector
        from pyspark.sql import SparkSession

        if not np.all(self.scale == 1):
            raise PCAError("Spark's PCAModel cannot standardize; fit without --standardize.")
        spark = SparkSession.getActiveSession()
        if spark is None:
            raise PCAError("expected a running Spark session, found none; make one first.")
        context = spark.sparkContext
        jvm: Any = context._jvm
        matrix = DenseMatrix(len(self.mean), self.k, self.components.ravel().tolist())
        variance = DenseVector(self.variance_ratio[: self.k].tolist())
        java_model = jvm.org.apache.spark.ml.feature.PCAModel(
            "fruits_pca", _py2java(context, matrix), _py2java(context, variance)
        )
        model = PCAModel(java_model).setInputCol("features").setOutputCol("scores")
        model._set(k=self.k)  # Spark's own fit sets it, and transform asks for it
        return model

    @classmethod
    def from_spark(cls, model: PCAModel, mean: Floats, total_variance: float) -> PCA:
        """Return Spark ML's model as one of ours; Spark's keeps neither mean nor variances."""
        ratio = model.explainedVariance.toArray()
        components = _signed(model.pc.toArray().T)
        return cls(components, mean, np.ones(len(mean)), ratio * total_variance, total_variance)

    def to_bytes(self) -> bytes:
        """Pack as npz."""
        content = io.BytesIO()
        np.savez(
            content,
            components=self.components,
            mean=self.mean,
            scale=self.scale,
            variances=self.variances,
            total_variance=self.total_variance,
        )
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> PCA:
        """Unpack what `to_bytes` packed.

        Raises
        ------
        StateError
            When the bytes are damaged.
        """
        try:
            with np.load(io.BytesIO(content)) as packed:
                names = ("components", "mean", "scale", "variances")
                arrays = (packed[name] for name in names)
                return cls(
                    **dict(zip(names, arrays, strict=True)),
                    total_variance=float(packed["total_variance"]),
                )
        except Exception as error:  # numpy and zipfile raise many kinds
            raise StateError(f"the saved PCA is damaged ({error}); run again.") from error


def _rank(values: Floats, n: int) -> int:
    """Count the eigenvalues that are more than rounding; n rows span n - 1 dimensions at most."""
    rounding = values[0] * len(values) * np.finfo(np.float64).eps
    return min(int((values > rounding).sum()), n - 1)


def _choose_k(values: Floats, rank: int, components: int | None, variance: float | None) -> int:
    if rank == 0:
        raise PCAError("PCA needs images that differ; all features are the same. Add images.")
    if components is not None:
        if not 1 <= components <= rank:
            raise PCAError(
                f"expected 1 to {rank} components (the rank of these features), found "
                f"{components}. Ask for fewer, or add images."
            )
        return components
    if variance is None or not 0 < variance <= 1:
        raise PCAError(f"expected a share of variance above 0 and up to 1, found {variance}.")
    kept = np.cumsum(values[:rank]) / values[:rank].sum()
    return min(int(np.searchsorted(kept, variance - 1e-12)) + 1, rank)


def _signed(components: Floats) -> Floats:
    """Make the largest loading of each component positive, so that signs do not depend on LAPACK.

    The rule is that of scikit-learn's `svd_flip(u_based_decision=False)`.
    """
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(len(components)), largest])
    return np.ascontiguousarray(components * signs[:, np.newaxis])


@dataclass(frozen=True)
class State:
    """Moments kept with what they cover: for each batch a digest of its live rows."""

    model_id: str
    covers: dict[str, str]
    moments: Moments

    def to_files(self) -> dict[str, bytes]:
        """Return the two files of a saved state, by name."""
        moments = self.moments.to_bytes()
        described = {
            "model_id": self.model_id,
            "rows": self.moments.n,
            "covers": self.covers,
            "sha256": hashlib.sha256(moments).hexdigest(),
        }
        return {"state.npz": moments, "state.json": json.dumps(described, indent=2).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes | None], where: str) -> State | None:
        """Read a saved state; None when there is none.

        Raises
        ------
        StateError
            When a part is missing or its sum is wrong.
        """
        described, moments = files["state.json"], files["state.npz"]
        if described is None and moments is None:
            return None
        try:
            if described is None or moments is None:
                raise ValueError("one of its two files is missing")
            told = json.loads(described)
            if hashlib.sha256(moments).hexdigest() != told["sha256"]:
                raise ValueError("its sha256 is not the one kept beside it")
            return cls(told["model_id"], told["covers"], Moments.from_bytes(moments))
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"the PCA state in {where} is damaged: {error}. Use --force to fit anew from the "
                "features, which are kept apart from it."
            ) from error
