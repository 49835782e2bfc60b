"""Principal components from exactly mergeable moments.

What a PCA needs of its data is (n, mean, scatter). Each part of the data gives its own, centred on
its own mean; two merge into exactly what their union would have given (Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979). Kept beside
the model, they let a refit on grown data read only what was added.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
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
MOST_CHANGES = 10_000  # then rounding has had its turns, and the rows are counted anew


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

    def subtract(self, other: Moments) -> Moments:
        """Return the moments of the rows that are left when those of `other` go.

        What is left of a difference has the rounding of what it was taken from: see Running.
        """
        n = self.n - other.n
        if not other.n or not n:
            return self if n else Moments.empty(len(self.mean))
        apart = other.mean - self.mean
        scatter = self.scatter - other.scatter - np.outer(apart, apart * (self.n * other.n / n))
        np.fill_diagonal(scatter, np.maximum(scatter.diagonal(), 0.0))
        return Moments(n, self.mean - apart * (other.n / n), scatter)

    def to_bytes(self) -> bytes:
        """Pack as npz: n, mean and the upper triangle of scatter, which is symmetric."""
        content = io.BytesIO()
        np.savez(content, n=self.n, mean=self.mean, triangle=_upper(self.scatter))
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Moments:
        """Unpack what `to_bytes` or a `Tally` packed."""
        with np.load(io.BytesIO(content)) as packed:
            return cls.of(packed["rows"]) if "rows" in packed else _unpacked(packed)


def _upper(symmetric: Floats) -> Floats:
    """Return the upper triangle, row after row; by slices, which indices would be slower than."""
    return np.concatenate([row[number:] for number, row in enumerate(symmetric)])


def _unpacked(arrays: Mapping[str, Any]) -> Moments:
    mean, triangle = arrays["mean"], arrays["triangle"]
    d, start = len(mean), 0
    scatter = np.empty((d, d))
    for number in range(d):
        row = triangle[start : start + d - number]
        scatter[number, number:] = scatter[number:, number] = row
        start += len(row)
    return Moments(int(arrays["n"]), mean, scatter)


class Tally:
    """Moments of rows that come block by block, packed as they are smallest.

    A task with fewer rows than features packs the rows themselves.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        self.moments = Moments.empty(d)
        self.blocks: list[npt.NDArray[np.float32]] = []

    @classmethod
    def of(cls, packed: bytes) -> Tally:
        """Return an empty tally of as many features as another that was packed."""
        with np.load(io.BytesIO(packed)) as content:
            return cls(content["rows"].shape[1] if "rows" in content else len(content["mean"]))

    def add(self, rows: npt.NDArray[np.float32]) -> None:
        """Count rows, shape (n, d), in."""
        self.blocks.append(rows)
        if sum(map(len, self.blocks)) >= ROWS_PER_BLOCK:
            self._fold()

    def merge(self, packed: bytes) -> None:
        """Count in what another has packed."""
        with np.load(io.BytesIO(packed)) as content:
            rows = content.get("rows")
        if rows is None:
            self.moments = self.moments.merge(Moments.from_bytes(packed))
        else:
            self.add(rows)

    def to_bytes(self) -> bytes:
        """Pack what was counted, for `Moments.from_bytes`."""
        rows = np.concatenate(self.blocks) if self.blocks else np.empty((0, self.d), np.float32)
        if self.moments.n or len(rows) > self.d:
            self._fold()
            return self.moments.to_bytes()
        content = io.BytesIO()
        np.savez(content, rows=rows)
        return content.getvalue()

    def result(self) -> Moments:
        """Return the moments of all that was counted."""
        self._fold()
        return self.moments

    def _fold(self) -> None:
        if self.blocks:
            self.moments = self.moments.merge(Moments.of(np.concatenate(self.blocks)))
            self.blocks = []


@dataclass(frozen=True)
class Running:
    """Moments to which rows were added, and from which rows were taken; how exact they still are.

    Subtraction leaves the rounding of what was there before: it is the share of the scatter that
    was taken away which tells when to count anew.

    Attributes
    ----------
    subtracted
        Trace of all scatter that was taken away since the rows were last counted.
    changes
        How many times rows were added or taken away since then.
    largest
        The largest scatter of each feature since then, shape (d,): what rounding is measured by.
    """

    moments: Moments
    subtracted: float
    changes: int
    largest: Floats

    @classmethod
    def counted(cls, moments: Moments) -> Running:
        """Return moments that were counted from the rows themselves."""
        return cls(moments, 0.0, 0, moments.scatter.diagonal().copy())

    def change(self, added: Moments, removed: Moments) -> Running:
        """Return the moments after rows were added and others removed."""
        grown = self.moments.merge(added)
        left = grown.subtract(removed)
        lost = float(np.trace(grown.scatter) - np.trace(left.scatter)) if removed.n else 0.0
        largest = np.maximum(self.largest, grown.scatter.diagonal())
        return Running(left, self.subtracted + lost, self.changes + 1, largest)

    def to_arrays(self) -> dict[str, Any]:
        """Return what `from_arrays` takes, for numpy to save."""
        moments = self.moments
        return {
            "n": moments.n,
            "mean": moments.mean,
            "triangle": _upper(moments.scatter),
            "subtracted": self.subtracted,
            "changes": self.changes,
            "largest": self.largest,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Running:
        """Return what was saved."""
        return cls(
            _unpacked(arrays),
            float(arrays["subtracted"]),
            int(arrays["changes"]),
            arrays["largest"],
        )

    @property
    def is_exact(self) -> bool:
        """Whether a fit to these stays within 1e-9 of one to moments that were counted anew."""
        if self.changes > MOST_CHANGES:
            return False
        few = self.moments.n < 2 * len(self.moments.mean)
        limit = 0.0 if few else float(np.trace(self.moments.scatter)) / 2
        return self.subtracted <= limit


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
        largest: Floats | None = None,
    ) -> PCA:
        """Fit from moments, as `numpy.linalg.eigh` of the covariance (or correlation) matrix.

        Parameters
        ----------
        components
            How many components to keep; or else
        variance
            the share of variance to keep, 0 < variance <= 1, by as few components as do.
        standardize
            Give every feature unit variance first, but for those that are constant within rounding.
        largest
            The largest scatter that each feature has had (Running), where rows were taken away.

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
        largest = np.maximum(moments.scatter.diagonal(), 0 if largest is None else largest)
        scale = np.ones(len(moments.mean))
        if standardize:
            constant = _constant(moments, largest)
            scale = np.where(constant, 1.0, np.sqrt(np.diag(covariance)))
            covariance = covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        noise = float((largest / (moments.n - 1) / scale**2).max())
        rank = _rank(values, moments.n, noise)
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


def _constant(moments: Moments, largest: Floats) -> npt.NDArray[np.bool_]:
    """Tell which features vary by no more than rounding, as scikit-learn's StandardScaler does.

    The bound is that of its `_is_constant_feature`, with the largest scatter that the feature has
    had in place of today's, which may be what is left of a larger one.
    """
    n, eps = moments.n, np.finfo(np.float64).eps
    bound = n * eps * largest / n + (n * moments.mean * eps) ** 2
    return np.asarray(moments.scatter.diagonal() / n <= bound)


def _rank(values: Floats, n: int, noise: float) -> int:
    """Count the eigenvalues that are more than rounding; n rows span n - 1 dimensions at most.

    `noise` is the largest variance a feature has had: rows that are gone leave its rounding.
    """
    rounding = max(values[0], noise) * len(values) * np.finfo(np.float64).eps
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
