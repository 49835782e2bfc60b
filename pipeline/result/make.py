"""Makes a result of a feature table and its PCA: matrix, quarantine, samples, report, record.

All but the record lies in a folder of its own, which `versions.publish` makes the newest version.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline import __version__
from pipeline.drift import compare, others_of
from pipeline.engine.jars import hadoop_version
from pipeline.engine.session import task_slots
from pipeline.features import Pass
from pipeline.journal import Journal, now
from pipeline.pca import PCA
from pipeline.reading import ImageReader
from pipeline.record import Cluster, Fit, PCAOptions, Run
from pipeline.result.matrix import explained_variance_csv, write_csv, write_matrix
from pipeline.result.overview import (
    Overview,
    farthest_of,
    look_at,
    pictures_of,
    points_of,
    quarantine,
)
from pipeline.result.samples import Samples
from pipeline.storage import Store
from pipeline.table.feature_table import FeatureTable
from pipeline.versions import VERSIONS

QUARANTINED_SHOWN = 10_000


@dataclass(frozen=True)
class Making:
    """A result that is made into the run's folder of `versions/`.

    Attributes
    ----------
    done
        The pass that left the table as it is.
    pca, options
        The projection, and what was asked for.
    previous
        The record of the result before.
    """

    spark: SparkSession
    table: FeatureTable
    done: Pass
    pca: PCA
    options: PCAOptions
    images: ImageReader
    output: Store
    journal: Journal
    previous: Run | None = None

    @property
    def place(self) -> str:
        """Where its files lie below OUTPUT."""
        return f"{VERSIONS}/{self.journal.run_id}"

    def make(self) -> Run:
        """Write the files; return the record, but for its end."""
        spark, table, done, pca = self.spark, self.table, self.done, self.pca
        output, place = self.output, self.place
        with self.journal.stage("matrix"):
            since = self._since()
            features = done.known.features
            spreads = write_matrix(spark, table, done.snapshot, features, pca, output, place, since)
            drift = None if spreads is None else compare(spreads)
            if drift is None and self.previous and self.previous.pca.state == done.snapshot.state:
                drift = self.previous.drift  # the same images once more
            output.write(f"{place}/explained_variance.csv", explained_variance_csv(pca))
            output.write(f"{place}/model/pca.npz", pca.to_bytes())
            bad = self._write_quarantine()
        with self.journal.stage("report"):
            overview = look_at(spark, table, done.snapshot)
            run = replace(self._describe(overview), drift=drift)
            samples = Samples(
                points_of(spark, output.address / f"{place}/matrix.parquet", run.pca.rows, pca.k),
                pictures_of(overview.labels, self.images),
            )
            if drift and drift.is_unlike and spreads and since is not None:
                half_as_far = drift.labels[0].distance / 2
                most = [label.name for label in drift.labels if label.distance >= half_as_far]
                others = others_of(spreads, most)
                far = farthest_of(spark, table, done.snapshot, pca, since, others, self.images)
                samples = replace(samples, farthest=far)
            samples.write(output, f"{place}/")
            report = _report(run, samples, pca, bad)
            output.write(f"{place}/report.html", report.encode())
        return run

    def _since(self) -> int | None:
        """Return the table's version in the result before, None where that was of another table."""
        before, now = self.previous, self.done.snapshot.version
        if before is None or before.model.id != self.table.model.id:
            return None
        if before.images != str(self.images.address):
            return None
        version = before.pca.table_version
        return None if version is None or version > now else version

    def _write_quarantine(self) -> pa.Table:
        """Write quarantine.csv, and return as much of it as a page shows."""
        columns = ["path", "stage", "reason"]
        rows: Iterator[Any] = iter(())
        if self.done.known.quarantined:
            frame = quarantine(self.spark, self.table, self.done.snapshot)
            rows = frame.orderBy("path").toLocalIterator()
        shown: list[dict[str, Any]] = []

        def passing() -> Iterator[list[Any]]:
            for row in rows:
                if len(shown) < QUARANTINED_SHOWN:
                    shown.append(row.asDict())
                yield list(row)

        with TemporaryDirectory(prefix="fruits-") as folder:
            written = Path(folder) / "quarantine.csv"
            with written.open("w", encoding="utf-8", newline="") as file:
                write_csv(file, columns, passing())
            self.output.upload(f"{self.place}/quarantine.csv", written)
        return pa.Table.from_pylist(shown, pa.schema([(name, pa.string()) for name in columns]))

    def _describe(self, overview: Overview) -> Run:
        done, pca, journal, context = self.done, self.pca, self.journal, self.spark.sparkContext
        features, read = done.known.features, done.rows_read
        seconds = journal.timings.get("features")
        return Run(
            run_id=journal.run_id,
            started=journal.started.isoformat(),
            finished=now(),
            images=str(self.images.address),
            output=str(self.output.address),
            counts=replace(done.counts, other_makers=overview.other_makers),
            left_out=dict(done.left_out),
            labels={label.name: label.count for label in overview.labels},
            model=self.table.model,
            pca=Fit(
                k=pca.k,
                variance=pca.share,
                requested=self.options,
                rows=features,
                fit="full" if read >= features else "grown" if read else "unchanged",
                rows_read=read,
                state=done.snapshot.state,
                table_version=done.snapshot.version,
            ),
            images_per_second=done.computed / seconds if done.computed and seconds else None,
            largest_pass=done.largest,
            timings=dict(journal.timings),
            made=None,
            versions=_versions(self.spark),
            folder=journal.run_id,
            cluster=Cluster(
                master=str(context.master),
                application=context.applicationId,
                slots=task_slots(self.spark),
            ),
        )


def _report(run: Run, samples: Samples, pca: PCA, bad: pa.Table) -> str:
    from pipeline.result.page import render_report  # matplotlib: half a second to import

    run = replace(run, timings={**run.timings, "total": sum(run.timings.values())})
    return render_report(run, samples, pca.variance_ratio, bad)


def _versions(spark: SparkSession) -> dict[str, str]:
    packages = ("pyarrow", "numpy", "pillow", "ai-edge-litert")
    return {
        "fruits": __version__,
        "python": platform.python_version(),
        "spark": spark.version,
        "hadoop": hadoop_version(),
        **{package: version(package) for package in packages},
    }
