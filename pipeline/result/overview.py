"""A result seen from afar: labels and how many images each has, pictures, points, quarantine.

Spark chooses what is shown; of very many images it is a sample.
"""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as sf

from pipeline.drift import Floats
from pipeline.networks.decode import decode
from pipeline.pca import PCA
from pipeline.quarantine import READ
from pipeline.reading import ImageReader
from pipeline.result.matrix import FAR, Farthest
from pipeline.result.samples import FAR_PICTURE
from pipeline.storage import Address
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import DECODER, RUNTIME, FeatureTable
from pipeline.table.parts import for_each

EXAMPLES_PER_LABEL, LABELS_SHOWN = 12, 60
COLUMNS = ["path", "label", "stage", "decoder", "runtime"]
MOST_LABELS = 10_000  # folders, not images: where each has its own, the largest are told
SCORES_SHOWN = 20_000
PICTURE_SIZE = 100  # pixels
FARTHEST_SHOWN = 12
PICTURES_AT_ONCE = 8


@dataclass(frozen=True)
class Label:
    """A label, how many of its images have features, and the paths of a few of them."""

    name: str
    count: int
    examples: list[str]


@dataclass(frozen=True)
class Overview:
    """The labels by name, the largest if there are very many; and how many rows have other makers.

    Those were made by another version of the decoder or the runtime than today's.
    """

    labels: list[Label]
    other_makers: int


def look_at(spark: SparkSession, table: FeatureTable, snapshot: Snapshot) -> Overview:
    """Look at all rows but for their features; the examples are the same for the same images."""
    parts = table.parts

    def counted(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        labels = _Labels()
        for batch in (batch for file in files for batch in parts.read(file, COLUMNS)):
            labels.add(batch)
            if len(labels.others) > MOST_LABELS:
                yield labels.told()
                labels = _Labels()
        yield labels.told()

    over_all = Observation()
    each = for_each(spark, list(snapshot.files), counted, _Labels.SCHEMA)
    all_examples = sf.array_sort(sf.flatten(sf.collect_list("examples")))
    grouped = each.groupBy("label").agg(
        sf.sum("count").alias("count"),
        sf.sum("others").alias("others"),
        sf.slice(all_examples, 1, EXAMPLES_PER_LABEL).alias("examples"),
    )
    grouped = grouped.observe(over_all, sf.sum("others").alias("others"))
    rows = grouped.orderBy(sf.desc("count"), "label").limit(MOST_LABELS).collect()
    labels = [
        Label(row["label"], row["count"], sorted(one["path"] for one in row["examples"]))
        for row in rows
        if row["count"]
    ]
    return Overview(sorted(labels, key=lambda label: label.name), over_all.get["others"] or 0)


class _Labels:
    """Rows counted by label: with features, and made by others than today's decoder and runtime."""

    SCHEMA = pa.schema(
        [
            ("label", pa.string()),
            ("count", pa.int64()),
            ("others", pa.int64()),
            ("examples", pa.list_(pa.struct([("number", pa.int64()), ("path", pa.string())]))),
        ]
    )

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[int, str]]] = {}

    def add(self, rows: pa.RecordBatch) -> None:
        """Count rows in; of each label a few are kept, drawn by a hash, whatever file has them."""
        for row in rows.to_pylist():
            label = row["label"] or ""
            made_by = row["decoder"], row["runtime"]
            self.others[label] += row["stage"] != READ and made_by != (DECODER, RUNTIME)
            if row["stage"] is None:
                self.counts[label] += 1
                some = self.examples.setdefault(label, [])
                some.append((zlib.crc32(row["path"].encode()), row["path"]))
                if len(some) > 10 * EXAMPLES_PER_LABEL:
                    self.examples[label] = sorted(some)[:EXAMPLES_PER_LABEL]

    def told(self) -> pa.RecordBatch:
        """Return a row for each label."""
        return pa.RecordBatch.from_pydict(
            {
                "label": list(self.others),
                "count": [self.counts[label] for label in self.others],
                "others": list(self.others.values()),
                "examples": [self._few(label) for label in self.others],
            },
            self.SCHEMA,
        )

    def _few(self, label: str) -> list[dict[str, Any]]:
        few = sorted(self.examples.get(label, []))[:EXAMPLES_PER_LABEL]
        return [{"number": number, "path": path} for number, path in few]


def pictures_of(labels: Sequence[Label], reader: ImageReader) -> dict[str, list[bytes]]:
    """Read a few images of each label as small JPEGs."""
    shown = labels[:LABELS_SHOWN]
    made = iter(_pictures([path for label in shown for path in label.examples], reader))
    each = {label.name: [next(made) for _ in label.examples] for label in shown}
    return {name: [jpeg for jpeg in jpegs if jpeg] for name, jpegs in each.items()}


def _pictures(paths: Sequence[str], reader: ImageReader) -> list[bytes | None]:
    """Read images as small JPEGs; None for one that is gone since: its neighbours are shown."""
    read = reader.open()

    def picture(path: str) -> bytes | None:
        try:
            pixels = decode(read(path)[0], PICTURE_SIZE)
        except (OSError, ValueError, MemoryError):
            return None
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG", quality=82)
        return content.getvalue()

    with ThreadPoolExecutor(PICTURES_AT_ONCE) as pool:
        return list(pool.map(picture, paths))


def farthest_of(
    spark: SparkSession,
    table: FeatureTable,
    snapshot: Snapshot,
    pca: PCA,
    since: int,
    others: Mapping[str, tuple[Floats, Floats]],
    reader: ImageReader,
) -> pa.Table:
    """Return the added images that are farthest from the others of their label (FAR_PICTURE)."""
    model = spark.sparkContext.broadcast(pca.to_bytes())
    find = Farthest(table.parts, model, since, dict(others), FARTHEST_SHOWN)
    found = for_each(spark, list(snapshot.files), find, FAR).toArrow().to_pylist()
    most = sorted(found, key=lambda one: -one["distance"])[:FARTHEST_SHOWN]
    jpegs = _pictures([one["path"] for one in most], reader)
    rows = [{**one, "jpeg": jpeg} for one, jpeg in zip(most, jpegs, strict=True) if jpeg]
    return pa.Table.from_pylist(rows, FAR_PICTURE)


def points_of(spark: SparkSession, matrix: Address, rows: int, k: int) -> pa.Table:
    """Return path, label and the first two scores of some 20,000 of the matrix's rows, by path."""
    frame = spark.read.parquet(matrix.uri)
    one_in = -(-rows // SCORES_SHOWN)
    if one_in > 1:
        frame = frame.where(sf.pmod(sf.xxhash64("path"), sf.lit(one_in)) == 0)
    return frame.select("path", "label", *["pc_1", "pc_2"][:k]).toArrow().sort_by("path")


def quarantine(spark: SparkSession, table: FeatureTable, snapshot: Snapshot) -> DataFrame:
    """Return path, stage and reason of each image that gave no features."""
    columns = ["path", "stage", "reason"]
    return table.read(spark, snapshot, columns).where(sf.col("stage").isNotNull())
