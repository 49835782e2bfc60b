"""Makes a result of a feature table and its PCA: matrix, quarantine, samples, report, record.

All but the record lies in a folder of its own, which `versions.publish` makes the newest version.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline import __version__
from pipeline.engine.jars import hadoop_version
from pipeline.engine.session import task_slots
from pipeline.features import Pass
from pipeline.journal import Journal, now
from pipeline.pca import PCA
from pipeline.record import Cluster, Fit, PCAOptions, Run
from pipeline.result.matrix import explained_variance_csv, write_csv, write_matrix
from pipeline.result.overview import Overview, look_at, pictures_of, points_of, quarantine
from pipeline.result.samples import Samples
from pipeline.storage import ImageReader, Store
from pipeline.table.feature_table import FeatureTable
from pipeline.versions import VERSIONS

QUARANTINED_SHOWN = 10_000


def make_result(
    spark: SparkSession,
    table: FeatureTable,
    done: Pass,
    pca: PCA,
    options: PCAOptions,
    images: ImageReader,
    output: Store,
    journal: Journal,
) -> Run:
    """Write a result into the run's folder of `versions/`; return its record, but for its end.

    Parameters
    ----------
    done
        The pass that left the table as it is.
    pca, options
        The projection, and what was asked for.
    """
    place = f"{VERSIONS}/{journal.run_id}"
    with journal.stage("matrix"):
        write_matrix(spark, table, done.snapshot, done.known.features, pca, output, place)
        output.write(f"{place}/explained_variance.csv", explained_variance_csv(pca))
        output.write(f"{place}/model/pca.npz", pca.to_bytes())
        bad = _write_quarantine(spark, table, done, output, place)
    with journal.stage("report"):
        overview = look_at(spark, table, done.snapshot)
        run = _describe(spark, table, done, overview, pca, options, images, output, journal)
        samples = Samples(
            points_of(spark, output.address / f"{place}/matrix.parquet", run.pca.rows, pca.k),
            pictures_of(overview.labels, images),
        )
        samples.write(output, f"{place}/")
        report = _report(run, samples, pca, bad)
        output.write(f"{place}/report.html", report.encode())
    return run


def _write_quarantine(
    spark: SparkSession, table: FeatureTable, done: Pass, output: Store, place: str
) -> pa.Table:
    """Write quarantine.csv, and return as much of it as a page shows."""
    columns = ["path", "stage", "reason"]
    rows: Iterator[Any] = iter(())
    if done.known.quarantined:
        rows = quarantine(spark, table, done.snapshot).orderBy("path").toLocalIterator()
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
        output.upload(f"{place}/quarantine.csv", written)
    return pa.Table.from_pylist(shown, pa.schema([(name, pa.string()) for name in columns]))


def _report(run: Run, samples: Samples, pca: PCA, bad: pa.Table) -> str:
    from pipeline.result.page import render_report  # matplotlib: half a second to import

    run = replace(run, timings={**run.timings, "total": sum(run.timings.values())})
    return render_report(run, samples, pca.variance_ratio, bad)


def _describe(
    spark: SparkSession,
    table: FeatureTable,
    done: Pass,
    overview: Overview,
    pca: PCA,
    options: PCAOptions,
    images: ImageReader,
    output: Store,
    journal: Journal,
) -> Run:
    features = done.known.features
    read = done.rows_read
    seconds = journal.timings.get("features")
    return Run(
        run_id=journal.run_id,
        started=journal.started.isoformat(),
        finished=now(),
        images=str(images.address),
        output=str(output.address),
        counts=replace(done.counts, other_makers=overview.other_makers),
        labels={label.name: label.count for label in overview.labels},
        model=table.model,
        pca=Fit(
            k=pca.k,
            variance=pca.share,
            requested=options,
            rows=features,
            fit="full" if read >= features else "grown" if read else "unchanged",
            rows_read=read,
            state=done.snapshot.state,
        ),
        images_per_second=done.computed / seconds if done.computed and seconds else None,
        largest_pass=done.largest,
        timings=dict(journal.timings),
        made=None,
        versions=_versions(spark),
        folder=journal.run_id,
        cluster=Cluster(
            master=str(spark.sparkContext.master),
            application=spark.sparkContext.applicationId,
            slots=task_slots(spark),
        ),
    )


def _versions(spark: SparkSession) -> dict[str, str]:
    packages = ("pyarrow", "numpy", "pillow", "ai-edge-litert")
    return {
        "fruits": __version__,
        "python": platform.python_version(),
        "spark": spark.version,
        "hadoop": hadoop_version(),
        **{package: version(package) for package in packages},
    }
