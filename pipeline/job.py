"""The whole job, from images to matrix: the order in which the other modules do their part.

    list -> features -> PCA -> matrix -> report -> run.json

`run.json` is the result's own account of itself: inputs, counts, parameters, versions, timings.
"""

from __future__ import annotations

import hmac
import io
import json
import platform
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import pyarrow as pa
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf

from pipeline import __version__
from pipeline.engine.jars import hadoop_version
from pipeline.engine.session import task_slots
from pipeline.errors import FruitsError, NoImagesError, PCAError, StateError
from pipeline.features import (
    Pass,
    Progress,
    compute_features,
    count,
    nothing_to_compute,
    pass_of,
)
from pipeline.listing.images import Listing, list_images
from pipeline.listing.inventory import open_inventory
from pipeline.matrix import (
    NEXT,
    RESULT,
    explained_variance_csv,
    publish,
    write_csv,
    write_matrix,
)
from pipeline.networks.decode import BadImageError, decode
from pipeline.networks.model import Model
from pipeline.output import (
    WORK,
    Run,
    check_exclusive_writes,
    check_output,
    check_run,
)
from pipeline.pca import PCA
from pipeline.samples import LABELS_SHOWN, Label, Overview, look_at, quarantine
from pipeline.storage import Address, BucketStore, ImageReader, S3Settings, open_store
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import FeatureTable, Speed
from pipeline.table.parts import Parts
from pipeline.upkeep import forget, sweep_all

SCORES_SHOWN = 20_000  # more points than this in the report are a sample
QUARANTINED_SHOWN = 10_000


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


@dataclass(frozen=True)
class Receipt:
    """What was forgotten, without a name: whoever has the key can prove that an image was.

    Attributes
    ----------
    remains
        What the bucket still keeps, None if nothing.
    hashes
        HMAC-SHA256 of each path.
    key
        Theirs, in hex; it is told once and not kept.
    """

    forgotten: str
    images: int
    had_rows: int
    files_deleted: int
    states_deleted: int
    remains: str | None
    hashes: tuple[str, ...]
    key: str = ""


@dataclass
class Job:
    """A run from IMAGES to OUTPUT.

    Attributes
    ----------
    spark
        Makes or returns the session; called only once there is something to compute.
    flatbuffer
        Makes the LiteRT model; called only for a new feature table.
    inventory
        The manifest.json of an S3 Inventory, in the place of a listing.
    force
        Take an OUTPUT that holds another run.
    allow_removals
        Believe a listing that lacks a large part of the images that are known.
    recompute
        Compute again what another version of the decoder or the runtime has made.
    single_writer
        Do without conditional writes, on an S3 that has none: nobody else writes to OUTPUT then.
    """

    images: Address
    output: Address
    model: Model
    flatbuffer: Callable[[], bytes]
    spark: Callable[[], SparkSession]
    s3: S3Settings
    observer: Observer
    pca: PCAOptions = field(default_factory=PCAOptions)
    inventory: Address | None = None
    force: bool = False
    allow_removals: bool = False
    recompute: bool = False
    single_writer: bool = False

    def __post_init__(self) -> None:
        self.started = datetime.now(UTC)
        self.timings: dict[str, float] = {}
        self.run_id = f"{self.started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"
        self.store = open_store(self.output, self.s3)
        self.table = FeatureTable(self.store, self.model, self.s3, single_writer=self.single_writer)
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
        with self._listed() as (base, listing):
            self._check_components(listing.count)
            unchanged = self._unchanged(previous, base, listing)
            run = unchanged or self._result(self._compute(base, listing))
        return self._finish(run, began)

    def features(self) -> Run:
        """Bring the feature table up to date and stop there."""
        self._check_output()
        with self._listed() as (base, listing):
            done = self._compute(base, listing)
        return {"counts": _counts(done), "timings": self.timings}

    @contextmanager
    def _listed(self) -> Iterator[tuple[Snapshot | None, Listing]]:
        """Look at the table first: what comes into it later is not this listing's to remove."""
        with TemporaryDirectory(prefix="fruits-") as folder:
            with self._timed("list"):
                base = self.table.snapshot()
                told = open_inventory(self.inventory, self.s3) if self.inventory else None
                listing = list_images(open_store(self.images, self.s3), Path(folder), told)
            yield base, listing

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
        check_run(self.images, self.model, self.store, force=self.force)
        snapshot, last = self.table.snapshot(), self.table.last_pass()
        if snapshot is None or last is None or last.state != snapshot.state:
            raise StateError(
                f"expected a complete feature table of {self.model.id} in {self.output}, found "
                f"none. Compute it: fruits features IMAGES {self.output}"
            )
        known = self.table.known(snapshot)
        done = pass_of(snapshot, known or count(self.spark(), self.table, snapshot), last)
        self._check_components(done.known.rows)
        run = self._result(replace(done, recounted=known is None))
        return self._finish(run, began)

    def forget(self, paths: Sequence[str]) -> Receipt:
        """Remove images that are deleted from features and result, and all traces of them.

        The result is made anew as the last run was asked for it.

        Raises
        ------
        StateError
            When one of them still lies where it was listed.
        """
        previous = check_run(self.images, self.model, self.store)
        self._check_writes()
        if previous is not None:
            self.pca = PCAOptions(
                **previous["pca"]["requested"], standardize=previous["pca"]["standardize"]
            )
        images = open_store(self.images, self.s3)
        with self._timed("features"), self._workplace(Listing((), 0, "")) as work:
            had_rows = forget(self.spark(), self.table, images, paths, work)
        swept = sweep_all(self.table)
        key = secrets.token_bytes(32)
        receipt = Receipt(
            forgotten=datetime.now(UTC).isoformat(),
            images=len(set(paths)),
            had_rows=had_rows,
            files_deleted=swept.files,
            states_deleted=swept.states,
            remains=self.store.old_versions() if isinstance(self.store, BucketStore) else None,
            hashes=tuple(sorted(hmac.digest(key, p.encode(), "sha256").hex() for p in set(paths))),
        )
        content = json.dumps(asdict(receipt), indent=2).encode()
        self.store.write(f"{self.table.root}/forgotten/{self.run_id}.json", content)
        try:
            self.fit()
        except FruitsError:
            # No result can be made of what is left: the one that names the images goes, too.
            for name in ("run.json", *RESULT, NEXT):
                self.store.delete(name)
            raise
        return replace(receipt, key=key.hex())

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

    def _unchanged(
        self, previous: Run | None, base: Snapshot | None, listing: Listing
    ) -> Run | None:
        """Return the previous run, recounted, if this one would only repeat it."""
        if previous is None or self.recompute or not self._asks_the_same(previous):
            return None
        found = nothing_to_compute(self.table, base, listing, self.reader)
        if found is None or found.snapshot.state != previous["pca"].get("state"):
            return None
        return {
            **previous,
            "run_id": self.run_id,
            "started": self.started.isoformat(),
            "counts": {
                **previous["counts"],
                **_counts(replace(found, ignored=listing.ignored)),
            },
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

    def _result(self, done: Pass) -> Run:
        if not done.known.features:
            raise NoImagesError(self._why_none(done))
        with self._timed("pca"):
            done, rows_read = self._counted(done)
            running = done.known.running
            pca = PCA.fit(
                running.moments,
                **self.pca.to_json(),
                standardize=self.pca.standardize,
                largest=running.largest,
            )
        with self._timed("matrix"):
            self.store.delete(NEXT)
            write_matrix(self.spark(), self.table, done.snapshot, pca, self.store)
            self.store.write(f"{NEXT}/explained_variance.csv", explained_variance_csv(pca))
            self.store.write(f"{NEXT}/model/pca.npz", pca.to_bytes())
            bad = self._write_quarantine(done)
        with self._timed("report"):
            overview = look_at(self.spark(), self.table, done.snapshot)
            run = self._describe(done, overview, pca, rows_read)
            report = self._report(run, pca, overview.labels, bad)
            self.store.write(f"{NEXT}/report.html", report.encode())
        return run

    def _compute(self, base: Snapshot | None, listing: Listing) -> Pass:
        self._check_writes()
        with self._timed("model"):
            flatbuffer = self.table.open(self.flatbuffer)
        with self._timed("spark"):
            spark = self.spark()
        with self._timed("features"), self._workplace(listing) as work:
            return compute_features(
                spark,
                self.table,
                base,
                listing,
                self.reader,
                flatbuffer,
                work,
                self.observer.progress,
                allow_removals=self.allow_removals,
                recompute=self.recompute,
            )

    def _check_writes(self) -> None:
        """Prove that this S3 keeps two runs apart, before anything is committed."""
        if isinstance(self.store, BucketStore) and not self.single_writer:
            check_exclusive_writes(self.store, f"{WORK}/{self.run_id}/probe")

    @contextmanager
    def _workplace(self, listing: Listing) -> Iterator[Parts]:
        """Bring the listing where workers see it; remove it, and what is beside it, at the end."""
        place = f"{WORK}/{self.run_id}"
        try:
            for part, _ in listing.parts:
                self.store.upload(f"{place}/{part.name}", part)
            yield Parts(self.output / place, self.s3)
        finally:
            self.store.delete(place)

    def _counted(self, done: Pass) -> tuple[Pass, int]:
        """Count all rows anew where what is known of them has lost its last digits."""
        known = done.known
        if known.running.is_exact:
            return done, done.known.features if done.recounted else done.computed
        self._check_writes()
        known = count(self.spark(), self.table, done.snapshot)
        snapshot = self.table.note(done.snapshot, known)
        last = self.table.last_pass()
        if last is not None and last.state == done.snapshot.state:
            self.table.keep_pass(replace(last, state=str(snapshot.state)))
        return replace(done, snapshot=snapshot, known=known), known.features

    def _why_none(self, done: Pass) -> str:
        first = quarantine(self.spark(), self.table, done.snapshot).limit(1).collect()[0]
        return (
            f"none of {done.known.rows} images gave features; the first, {first['path']}: "
            f"{first['reason']}. Check the images."
        )

    def _write_quarantine(self, done: Pass) -> pa.Table:
        """Write quarantine.csv, and return as much of it as a page shows."""
        columns = ["path", "stage", "reason"]
        rows: Iterator[Any] = iter(())
        if done.known.quarantined:
            frame = quarantine(self.spark(), self.table, done.snapshot).orderBy("path")
            rows = frame.toLocalIterator()
        shown: list[dict[str, Any]] = []

        def passing() -> Iterator[list[Any]]:
            for row in rows:
                if len(shown) < QUARANTINED_SHOWN:
                    shown.append(row.asDict())
                yield list(row)

        with TemporaryDirectory(prefix="fruits-") as folder:
            table = Path(folder) / "quarantine.csv"
            with table.open("w", encoding="utf-8", newline="") as file:
                write_csv(file, columns, passing())
            self.store.upload(f"{NEXT}/quarantine.csv", table)
        return pa.Table.from_pylist(shown, pa.schema([(name, pa.string()) for name in columns]))

    def _report(self, run: Run, pca: PCA, labels: list[Label], bad: pa.Table) -> str:
        from pipeline.report.page import render_report  # matplotlib: half a second to import

        axes = ["pc_1", "pc_2"][: pca.k]
        matrix = self.spark().read.parquet((self.output / f"{NEXT}/matrix.parquet").uri)
        one_in = -(-run["pca"]["rows"] // SCORES_SHOWN)
        if one_in > 1:
            matrix = matrix.where(sf.pmod(sf.xxhash64("path"), sf.lit(one_in)) == 0)
        scores = matrix.select("path", "label", *axes).toArrow().sort_by("path")
        thumbnails = _thumbnails(labels, self.reader)
        timings = {**self.timings, "total": sum(self.timings.values())}
        run = {**run, "timings": timings, "finished": datetime.now(UTC).isoformat()}
        return render_report(run, scores, pca.variance_ratio, bad, thumbnails)

    def _describe(self, done: Pass, overview: Overview, pca: PCA, rows_read: int) -> Run:
        spark = self.spark()
        features = done.known.features
        fit = "full" if rows_read >= features else "grown" if rows_read else "unchanged"
        return {
            "run_id": self.run_id,
            "started": self.started.isoformat(),
            "images": str(self.images),
            "output": str(self.output),
            "counts": {**_counts(done), "other_makers": overview.other_makers},
            "labels": {label.name: label.count for label in overview.labels},
            "model": self.model.to_json(),
            "pca": {
                "k": pca.k,
                "variance": pca.share,
                "requested": self.pca.to_json(),
                "standardize": self.pca.standardize,
                "rows": features,
                "fit": fit,
                "rows_read": rows_read,
                "state": done.snapshot.state,
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


def _counts(done: Pass) -> dict[str, int]:
    return {
        "listed": done.known.rows,
        "features": done.known.features,
        "quarantined": done.known.quarantined,
        "computed": done.computed,
        "reused": done.reused,
        "dropped": done.dropped,
        "ignored": done.ignored,
        "unsure": done.unsure,
    }


THUMBNAIL_SIZE = 100  # pixels


def _thumbnails(labels: list[Label], reader: ImageReader) -> dict[str, list[bytes]]:
    """Read a few pictures of each label as small JPEGs."""
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
        for label in labels[:LABELS_SHOWN]:
            shown[label.name] = [made for made in pool.map(thumbnail, label.examples) if made]
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
