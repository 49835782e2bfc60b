"""The whole job, from images to matrix: the order in which the other modules do their part.

    list -> features -> PCA -> matrix -> report -> run.json

`run.json` is the result's own account of itself: inputs, counts, parameters, versions, timings.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from pyspark.sql import SparkSession

from pipeline import __version__
from pipeline.engine.jars import hadoop_version
from pipeline.engine.session import task_slots
from pipeline.errors import NoImagesError, PCAError, StateError
from pipeline.features import Progress, compute_features
from pipeline.images import Listing, list_images
from pipeline.matrix import (
    NEXT,
    explained_variance_csv,
    publish,
    quarantine_csv,
    write_matrix,
)
from pipeline.networks.decode import BadImageError, decode
from pipeline.networks.model import Model
from pipeline.output import Run, check_output, check_run
from pipeline.pca import PCA, Moments, State, moments_of
from pipeline.storage import Address, ImageReader, S3Settings, open_store
from pipeline.table import FeatureTable, Pass, Speed, nothing_to_compute, pass_of


class Observer(Protocol):
    """Who is told how a job gets on."""

    def stage(self, name: str) -> None:
        """Hear that a stage begins: list, model, spark, features, pca, matrix, report."""

    def progress(self, progress: Progress) -> None:
        """Hear how far the features are."""


@dataclass(frozen=True)
class PCAOptions:
    """What to keep: `components`, or else the share `variance`; `standardize` comes first."""

    components: int | None = None
    variance: float | None = 0.95
    standardize: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the request as run.json keeps it."""
        if self.components is not None:
            return {"components": self.components, "variance": None}
        return {"components": None, "variance": self.variance}


@dataclass
class Job:
    """A run from IMAGES to OUTPUT.

    Attributes
    ----------
    spark
        Makes or returns the session; called only once there is something to compute.
    flatbuffer
        Makes the LiteRT model; called only for a new feature table.
    force
        Take an OUTPUT that holds another run, and fit anew if the saved PCA state is damaged.
    """

    images: Address
    output: Address
    model: Model
    flatbuffer: Callable[[], bytes]
    spark: Callable[[], SparkSession]
    s3: S3Settings
    observer: Observer
    pca: PCAOptions = field(default_factory=PCAOptions)
    force: bool = False

    def __post_init__(self) -> None:
        self.started = datetime.now(UTC)
        self.timings: dict[str, float] = {}
        self.store = open_store(self.output, self.s3)
        self.table = FeatureTable(self.store, self.model)
        self.reader = ImageReader(self.images, self.s3)

    def run(self) -> Run:
        """Do all of it and return the content of run.json.

        Raises
        ------
        FruitsError
            One of its kinds, with nothing written yet where the cause can be known beforehand.
        """
        began = time.monotonic()
        previous = self._check_output()
        with self._timed("list"):
            listing = list_images(open_store(self.images, self.s3))
        self._check_components(listing.images.num_rows)
        unchanged = self._unchanged(previous, listing)
        run = unchanged or self._result(self._compute(listing), listing.ignored)
        return self._finish(run, began)

    def features(self) -> Run:
        """Bring the feature table up to date and stop there."""
        self._check_output()
        with self._timed("list"):
            listing = list_images(open_store(self.images, self.s3))
        done = self._compute(listing)
        return {"counts": _counts(done, listing.ignored), "timings": self.timings}

    def fit(self) -> Run:
        """Do what follows the features, from the table as its last complete pass left it.

        Raises
        ------
        StateError
            When no pass over the images is complete.
        OutputTakenError
            When OUTPUT holds the result of other images or another model.
        """
        began = time.monotonic()
        previous = check_run(self.images, self.model, self.store, force=self.force)
        index = self.table.read_index()
        if index is None:
            raise StateError(
                f"expected a complete feature table of {self.model.id} in {self.output}, found "
                f"none. Compute it: fruits features IMAGES {self.output}"
            )
        self._check_components(index.num_rows)
        ignored = previous["counts"]["ignored"] if previous else 0
        run = self._result(pass_of(index), ignored)
        return self._finish(run, began)

    def _check_output(self) -> Run | None:
        return check_output(self.images, self.model, self.store, force=self.force)

    def _check_components(self, images: int) -> None:
        """Refuse a number of components that so many images cannot give, before they are read."""
        most = min(self.model.dimensions, images - 1)
        if self.pca.components is not None and self.pca.components > most > 0:
            raise PCAError(
                f"expected 1 to {most:,} components ({images:,} images with "
                f"{self.model.dimensions:,} features each), found {self.pca.components}. Ask for "
                "fewer, or add images."
            )

    def _unchanged(self, previous: Run | None, listing: Listing) -> Run | None:
        """Return the previous run, recounted, if this one would only repeat it."""
        if previous is None or not self._asks_the_same(previous):
            return None
        index = nothing_to_compute(self.table, listing.images)
        if index is None or _digest_of(_digests(index)) != previous["pca"].get("digest"):
            return None
        return {
            **previous,
            "run_id": self._run_id(),
            "started": self.started.isoformat(),
            "counts": _counts(pass_of(index), listing.ignored),
            "pca": {**previous["pca"], "fit": "unchanged", "rows_read": 0},
            "images_per_second": None,
        }

    def _asks_the_same(self, previous: Run) -> bool:
        wanted = self.pca.to_json()
        pca = previous["pca"]
        return bool(pca["requested"] == wanted and pca["standardize"] == self.pca.standardize)

    def _finish(self, run: Run, began: float) -> Run:
        run["timings"] = {**self.timings, "total": time.monotonic() - began}
        run["finished"] = datetime.now(UTC).isoformat()
        if "matrix" in self.timings:
            computed = run["counts"]["computed"]
            run["made"] = {"run_id": run["run_id"], "timings": run["timings"], "computed": computed}
            publish(self.store, _as_json(run))
        else:
            self.store.write("run.json", _as_json(run))  # nothing new: the result stays as it is
        return run

    def _result(self, done: Pass, ignored: int) -> Run:
        good = done.index.filter(pc.is_null(done.index["stage"]))
        bad = done.index.filter(pc.is_valid(done.index["stage"]))
        if not good.num_rows:
            raise NoImagesError(
                f"none of {done.index.num_rows} images gave features; the first, "
                f"{bad['path'][0].as_py()}: {bad['reason'][0].as_py()}. Check the images."
            )
        with self._timed("pca"):
            state, rows_read = self._state(done.index)
            pca = self._fit(state)
        with self._timed("matrix"):
            self.store.delete(NEXT)
            features = self.table.rows(self.spark(), done.index)
            write_matrix(self.spark(), features, pca, self.store)
            for name, content in self._small_files(pca, state, bad).items():
                self.store.write(f"{NEXT}/{name}", content)
        run = self._describe(done, ignored, good, pca, state, rows_read)
        with self._timed("report"):
            report = self._report(run, pca, good, bad)
            self.store.write(f"{NEXT}/report.html", report.encode())
        return run

    def _compute(self, listing: Listing) -> Pass:
        with self._timed("model"):
            flatbuffer = self.table.open(self.flatbuffer)
        with self._timed("spark"):
            spark = self.spark()
        with self._timed("features"):
            return compute_features(
                spark, self.table, listing.images, self.reader, flatbuffer, self.observer.progress
            )

    def _state(self, index: pa.Table) -> tuple[State, int]:
        """Return the moments of all live rows, and how many rows were read for them."""
        digests = _digests(index)
        kept = self._kept_state()
        covered: dict[str, str] = {}
        moments = Moments.empty(self.model.dimensions)
        if kept is not None and kept.covers.items() <= digests.items():
            covered, moments = kept.covers, kept.moments
        added = sorted(digests.keys() - covered.keys())
        if added:
            fresh = index.filter(pc.is_in(index["batch"], value_set=pa.array(added)))
            rows = self.table.rows(self.spark(), fresh)
            slots = task_slots(self.spark())
            moments = moments.merge(moments_of(rows, self.model.dimensions, slots))
        state = State(self.model.id, digests, moments)
        return state, moments.n - (kept.moments.n if covered and kept else 0)

    def _kept_state(self) -> State | None:
        files = {name: self.store.read(f"model/{name}") for name in ("state.json", "state.npz")}
        try:
            state = State.from_files(files, f"{self.output}/model")
        except StateError:
            # Without a run.json it is what a run left that died among its last steps.
            if self.force or self.store.read("run.json") is None:
                return None
            raise
        return state if state and state.model_id == self.model.id else None

    def _fit(self, state: State) -> PCA:
        wanted = self.pca.to_json()
        return PCA.fit(state.moments, **wanted, standardize=self.pca.standardize)

    def _small_files(self, pca: PCA, state: State, bad: pa.Table) -> dict[str, bytes]:
        model = {**state.to_files(), "pca.npz": pca.to_bytes()}
        return {
            "explained_variance.csv": explained_variance_csv(pca),
            "quarantine.csv": quarantine_csv(bad),
            **{f"model/{name}": content for name, content in model.items()},
        }

    def _report(self, run: Run, pca: PCA, good: pa.Table, bad: pa.Table) -> str:
        from pipeline.report.page import render_report  # matplotlib: half a second to import

        axes = ["pc_1", "pc_2"][: pca.k]
        matrix = self.spark().read.parquet((self.output / f"{NEXT}/matrix.parquet").uri)
        scores = matrix.select("path", "label", *axes).toArrow().sort_by("path")
        thumbnails = _thumbnails(good, self.reader)
        timings = {**self.timings, "total": sum(self.timings.values())}
        run = {**run, "timings": timings, "finished": datetime.now(UTC).isoformat()}
        return render_report(run, scores, pca.variance_ratio, bad, thumbnails)

    def _describe(
        self, done: Pass, ignored: int, good: pa.Table, pca: PCA, state: State, rows_read: int
    ) -> Run:
        spark = self.spark()
        labels = Counter(label or "" for label in good["label"].to_pylist())
        fit = "full" if rows_read == good.num_rows else "grown" if rows_read else "unchanged"
        return {
            "run_id": self._run_id(),
            "started": self.started.isoformat(),
            "images": str(self.images),
            "output": str(self.output),
            "counts": _counts(done, ignored),
            "labels": dict(sorted(labels.items())),
            "model": self.model.to_json(),
            "pca": {
                "k": pca.k,
                "variance": pca.share,
                "requested": self.pca.to_json(),
                "standardize": self.pca.standardize,
                "rows": good.num_rows,
                "fit": fit,
                "rows_read": rows_read,
                "digest": _digest_of(state.covers),
            },
            "images_per_second": self._images_per_second(done.computed),
            "largest_pass": _described(done.largest),
            "versions": _versions(spark),
            "cluster": {
                "master": spark.sparkContext.master,
                "application": spark.sparkContext.applicationId,
                "slots": task_slots(spark),
            },
        }

    def _images_per_second(self, computed: int) -> float | None:
        return computed / self.timings["features"] if computed else None

    def _run_id(self) -> str:
        return f"{self.started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self.observer.stage(stage)
        began = time.monotonic()
        yield
        self.timings[stage] = time.monotonic() - began


def _as_json(run: Run) -> bytes:
    return json.dumps(run, indent=2, ensure_ascii=False).encode()


def _described(speed: Speed | None) -> dict[str, float] | None:
    if speed is None:
        return None
    return {**asdict(speed), "images_per_second": speed.images / speed.seconds}


def _counts(done: Pass, ignored: int) -> dict[str, int]:
    quarantined = done.index["stage"].length() - done.index["stage"].null_count
    return {
        "listed": done.index.num_rows,
        "features": done.index.num_rows - quarantined,
        "quarantined": quarantined,
        "computed": done.computed,
        "reused": done.reused,
        "dropped": done.dropped,
        "ignored": ignored,
    }


def _digests(index: pa.Table) -> dict[str, str]:
    """Return, for each batch, a digest of which of its rows are live and have features."""
    rows: dict[str, Any] = defaultdict(hashlib.sha256)
    good = index.filter(pc.is_null(index["stage"])).sort_by(
        [("batch", "ascending"), ("path", "ascending")]
    )
    columns = (good[name].to_pylist() for name in ("batch", "path", "version"))
    for batch, path, version_ in zip(*columns, strict=True):
        rows[batch].update(f"{path}\0{version_}\0".encode())
    return {batch: digest.hexdigest() for batch, digest in rows.items()}


def _digest_of(digests: dict[str, str]) -> str:
    """Return one digest for all features that a result was made of."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


THUMBNAILS_PER_LABEL, LABELS_SHOWN, THUMBNAIL_SIZE = 12, 60, 100


def _thumbnails(good: pa.Table, reader: ImageReader) -> dict[str, list[bytes]]:
    """Read a few pictures of each label, evenly spaced, as small JPEGs."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for path, label in zip(good["path"].to_pylist(), good["label"].to_pylist(), strict=True):
        by_label[label or ""].append(path)
    read = reader.open()

    def thumbnail(path: str) -> bytes | None:
        try:
            pixels = decode(read(path)[0], THUMBNAIL_SIZE)
        except (OSError, ValueError, BadImageError):
            return None  # gone since: the report shows its neighbours
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=82)
        return content.getvalue()

    shown = {}
    with ThreadPoolExecutor(16) as pool:
        for label in sorted(by_label)[:LABELS_SHOWN]:
            paths = by_label[label]
            step = max(1, len(paths) // THUMBNAILS_PER_LABEL)
            some = paths[::step][:THUMBNAILS_PER_LABEL]
            shown[label] = [picture for picture in pool.map(thumbnail, some) if picture]
    return shown


def _versions(spark: SparkSession) -> dict[str, str]:
    packages = ("pyarrow", "numpy", "pillow", "ai-edge-litert")
    return {
        "fruits": __version__,
        "python": platform.python_version(),
        "spark": spark.version,
        "hadoop": hadoop_version(),
        **{package: version(package) for package in packages},
    }
