"""The feature table: one row for each image, features or a quarantine, kept in batches.

    features/<model id>/model.json, model.tflite
    features/<model id>/batches/<batch>/part-*.parquet, _SUCCESS
    features/<model id>/index.parquet     the images of the last complete pass

A row is either features or a quarantine (stage and reason), so that images listed = features +
quarantined holds by construction. A row's features are the bytes of its float32 vector,
little-endian: Spark moves them between Python and Parquet as one value, in half the time that it
takes for a list (`as_lists` gives lists).

A batch counts when its `_SUCCESS` is there: committers write it last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql import types as st

from pipeline.errors import StateError
from pipeline.images import LISTING
from pipeline.networks.model import Model
from pipeline.storage import Address, Store

# Floats hardly shrink: what is read again and again had better be quick to unpack.
CODEC = "lz4_raw"

READ, DECODE = "read", "decode"  # the stages at which an image can end in quarantine

ROWS = st.StructType(
    [
        st.StructField("path", st.StringType(), nullable=False),
        st.StructField("label", st.StringType()),
        st.StructField("length", st.LongType(), nullable=False),
        st.StructField("modified", st.TimestampType(), nullable=False),
        st.StructField("version", st.StringType(), nullable=False),
        st.StructField("batch", st.StringType(), nullable=False),
        st.StructField("features", st.BinaryType()),
        st.StructField("stage", st.StringType()),
        st.StructField("reason", st.StringType()),
    ]
)
ARROW_ROWS = pa.schema(
    [
        *LISTING,
        pa.field("batch", pa.string(), nullable=False),
        pa.field("features", pa.binary()),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
    ]
)
INDEX = [*LISTING.names, "batch", "stage", "reason"]  # all but the features themselves
KEY = ["path", "length", "modified", "version"]  # an image whose key is known is not computed again


@dataclass(frozen=True)
class Speed:
    """How fast features were computed: so many images in so many seconds by so many tasks."""

    images: int
    seconds: float
    slots: int


@dataclass(frozen=True)
class Pass:
    """What a pass did; `index` has a row for each image listed, with its batch.

    `largest` is the speed of the table's pass over most images: one new image tells nothing of it.
    """

    index: pa.Table
    computed: int
    reused: int
    dropped: int
    largest: Speed | None


class FeatureTable:
    """The features of one model below an OUTPUT."""

    def __init__(self, output: Store, model: Model) -> None:
        self.output = output
        self.model = model
        self.root = f"features/{model.id}"

    def open(self, flatbuffer: Callable[[], bytes]) -> bytes:
        """Return the table's LiteRT model; a new table keeps the one that `flatbuffer` makes.

        Raises
        ------
        StateError
            When the table was made by another model than its name says.
        """
        described = self.output.read(f"{self.root}/model.json")
        if described is not None:
            self._check_model(described)
            kept = self.output.read(f"{self.root}/model.tflite")
            if kept is not None:
                return kept
        content = flatbuffer()
        self.output.write(f"{self.root}/model.tflite", content)
        self.output.write(
            f"{self.root}/model.json", json.dumps(self.model.to_json(), indent=2).encode()
        )
        return content

    def _check_model(self, described: bytes) -> None:
        try:
            found = Model(**json.loads(described))
        except (ValueError, TypeError) as error:
            raise StateError(
                f"{self.output.address}/{self.root}/model.json is damaged ({error}). Remove "
                f"{self.output.address}/{self.root} to compute these features again."
            ) from error
        if found != self.model:
            raise StateError(
                f"{self.output.address}/{self.root} should hold features of {self.model.id}, "
                f"found those of {found.id}. Choose another OUTPUT, or remove that folder."
            )

    def committed_batches(self) -> list[str]:
        """Return the names of the batches that count; remove the rest when a day old."""
        newest: dict[str, datetime] = {}
        complete = set()
        for entry in self.output.list(f"{self.root}/batches/"):
            batch, _, rest = entry.key.removeprefix(f"{self.root}/batches/").partition("/")
            newest[batch] = max(entry.modified, newest.get(batch, entry.modified))
            if rest == "_SUCCESS":
                complete.add(batch)
        for batch in newest.keys() - complete:
            # A younger one may be another run's, still at work.
            if newest[batch] < datetime.now(UTC) - timedelta(days=1):
                self.output.delete(f"{self.root}/batches/{batch}")
        return sorted(complete)

    def batch_uri(self, batch: str) -> str:
        """Return the address of a batch's folder, for Spark."""
        return (self.output.address / f"{self.root}/batches/{batch}").uri

    def read_index(self) -> pa.Table | None:
        """Return the index of the last complete pass, None before the first."""
        content = self.output.read(f"{self.root}/index.parquet")
        if content is None:
            return None
        # By no other thread: one of Arrow's that lets go of Python's bytes while a short command
        # already ends takes the whole process down (SIGABRT, one end in sixteen on a busy machine).
        return pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)

    def images(self) -> Address:
        """Return where the images of the last complete pass lay.

        Raises
        ------
        StateError
            When no pass is complete.
        """
        index = self.read_index()
        if index is None:
            raise StateError(
                f"expected a complete feature table in {self.output.address}/{self.root}, found "
                "an unfinished one. Finish it: fruits features IMAGES OUTPUT"
            )
        return Address.parse((index.schema.metadata or {})[b"images"].decode())

    def write_index(self, index: pa.Table, images: Address, largest: Speed | None = None) -> None:
        """Keep the index of a complete pass, where its images lie, and the largest pass's speed."""
        content = io.BytesIO()
        metadata = {"images": str(images)}
        if largest:
            metadata["largest_pass"] = json.dumps(asdict(largest))
        pq.write_table(index.replace_schema_metadata(metadata), content, compression="zstd")
        self.output.write(f"{self.root}/index.parquet", content.getvalue())

    def rows(self, spark: SparkSession, index: pa.Table) -> DataFrame:
        """Return the live rows that have features: path, label, batch, features.

        Rows whose images were dropped or replaced since are left out by a join with the index,
        where there are such rows.
        """
        good = index.filter(pc.is_null(index["stage"]))
        batches = sorted(set(good["batch"].to_pylist()))
        table = spark.read.schema(ROWS).parquet(*(self.batch_uri(batch) for batch in batches))
        table = table.where(sf.col("stage").isNull())
        if table.count() != good.num_rows:  # reads one narrow column
            live = spark.createDataFrame(good.select(["path", "version", "batch"]))
            table = table.join(live, ["path", "version", "batch"], "left_semi")
        return table.select("path", "label", "batch", "features")


def as_lists(rows: DataFrame) -> DataFrame:
    """Return the rows with their features as array<float>, for Spark SQL and Spark ML."""

    def partition_lists(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            column = batch.schema.get_field_index("features")
            vectors = [np.frombuffer(row, "<f4") for row in batch.column(column).to_pylist()]
            yield batch.set_column(column, "features", pa.array(vectors, pa.list_(pa.float32())))

    fields = [
        st.StructField("features", st.ArrayType(st.FloatType())) if f.name == "features" else f
        for f in rows.schema
    ]
    return rows.mapInArrow(partition_lists, st.StructType(fields))


def models_in(output: Store) -> list[Model]:
    """Return the models whose feature tables lie below an OUTPUT."""
    described = [e.key for e in output.list("features/") if e.key.endswith("/model.json")]
    return [Model(**json.loads(output.read(key) or b"{}")) for key in sorted(described)]


def largest_pass(index: pa.Table) -> Speed | None:
    """Return the speed that is kept with an index that was read, None if there is none."""
    kept = (index.schema.metadata or {}).get(b"largest_pass")
    return None if kept is None else Speed(**json.loads(kept))


def pass_of(index: pa.Table) -> Pass:
    """Return the pass that finds all there: what an index that was read stands for."""
    return Pass(index, computed=0, reused=index.num_rows, dropped=0, largest=largest_pass(index))


def nothing_to_compute(table: FeatureTable, images: pa.Table) -> pa.Table | None:
    """Return the index of the last pass if the listing is the same as then, else None."""
    index = table.read_index()
    if index is None or index.num_rows != images.num_rows:
        return None
    same = index.select(LISTING.names).cast(LISTING).equals(images)
    return index if same and not _count(index, READ) else None


def index_schema() -> pa.Schema:
    """Return the schema of an index: a row for each image, without its features."""
    return pa.schema([ARROW_ROWS.field(name) for name in INDEX])


def _count(index: pa.Table, stage: str) -> int:
    return pc.sum(pc.equal(index["stage"], stage)).as_py() or 0
