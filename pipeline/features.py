"""The one Spark pass over the images, and the table that keeps what it computed.

An image is read, decoded and run through the network once; its row in the feature table is either
features or a quarantine (stage and reason), so that images listed = features + quarantined holds
by construction. The table grows in batches of bounded size, a folder each:

    features/<model id>/model.json, model.tflite
    features/<model id>/batches/<batch>/part-*.parquet, _SUCCESS
    features/<model id>/index.parquet     the images of the last complete pass

A row's features are the bytes of its float32 vector, little-endian: Spark moves them between Python
and Parquet as one value, in half the time that it takes for a list (`as_lists` gives lists).

A batch counts when its `_SUCCESS` is there: committers write it last. A driver that is killed
loses the batch it was in, nothing else.
"""

from __future__ import annotations

import gc
import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyspark.accumulators import Accumulator
from pyspark.core.broadcast import Broadcast
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from pyspark.sql import types as st

from pipeline.engine.session import task_slots
from pipeline.errors import StateError
from pipeline.images import LISTING
from pipeline.networks.backbones import Model, load_network
from pipeline.networks.decode import MAX_BYTES, BadImageError, decode
from pipeline.storage import Address, ImageReader, Store

# Images are read in bursts, one ahead of the network: single GETs wake threads on both sides for
# each image, which costs up to 2 ms of a core. A burst takes 50 ms, the network 300 ms for it.
GETS_AT_ONCE = 32
BYTES_AT_ONCE = 24_000_000  # keeps a Python worker small when the images are large
IMAGES_PER_SLOT_AND_BATCH = 8192  # about a minute of work: what a killed driver loses at most
TASKS_PER_SLOT_AND_BATCH = 4  # the bar moves as tasks end; each costs some 0.2 s to commit

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
class Progress:
    """How far a pass is: images done of those to do, and how many of them in quarantine."""

    done: int
    total: int
    quarantined: int


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


def compute_features(
    spark: SparkSession,
    table: FeatureTable,
    images: pa.Table,
    reader: ImageReader,
    flatbuffer: bytes,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Pass:
    """Bring the feature table up to date with a listing.

    Parameters
    ----------
    images
        A table of the schema LISTING.
    on_progress
        Called about twice a second while Spark works.

    Returns
    -------
    Pass
        The index of exactly the images listed, and what had to be computed for it.
    """
    began = time.monotonic()
    known = _known_rows(spark, table)
    todo = _not_in(images, known)
    slots = task_slots(spark)
    model = spark.sparkContext.broadcast(flatbuffer)
    done, quarantined = (spark.sparkContext.accumulator(0) for _ in range(2))
    step = slots * IMAGES_PER_SLOT_AND_BATCH
    fresh = []
    with _reporting(todo.num_rows, done, quarantined, on_progress):
        for number, start in enumerate(range(0, todo.num_rows, step), 1):
            part = todo.slice(start, step)
            spark.sparkContext.setJobDescription(
                f"features: images {start + 1} to {start + part.num_rows} of {todo.num_rows}"
            )
            batch = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{number:05d}-{uuid.uuid4().hex[:6]}"
            run = _PassOverImages(
                model, table.model.input_size, reader, batch, done, quarantined
            )  # fmt: skip
            _write_batch(spark, table, part, run, slots)
            fresh.append(batch)
    spark.sparkContext.setJobDescription("")
    if fresh:
        known = pa.concat_tables([known, _index_of(spark, table, fresh)])
    index = _live_index(images, known)
    previous = table.read_index()
    largest = None if previous is None else largest_pass(previous)
    if todo.num_rows and (largest is None or todo.num_rows >= largest.images):
        largest = Speed(todo.num_rows, time.monotonic() - began, slots)
    table.write_index(index, reader.address, largest)
    return Pass(
        index=index,
        computed=todo.num_rows,
        reused=images.num_rows - todo.num_rows,
        dropped=0 if previous is None else _count_gone(previous, images),
        largest=largest,
    )


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


def _known_rows(spark: SparkSession, table: FeatureTable) -> pa.Table:
    """Return the index of all committed rows, but for images that could not be read then."""
    batches = table.committed_batches()
    if not batches:
        return pa.table({name: [] for name in INDEX}).cast(_index_schema())
    rows = _index_of(spark, table, batches)
    return rows.filter(pc.fill_null(pc.not_equal(rows["stage"], READ), True))


def _index_of(spark: SparkSession, table: FeatureTable, batches: list[str]) -> pa.Table:
    frame = spark.read.schema(ROWS).parquet(*(table.batch_uri(batch) for batch in batches))
    return frame.select(*INDEX).toArrow().cast(_index_schema())


def _index_schema() -> pa.Schema:
    return pa.schema([ARROW_ROWS.field(name) for name in INDEX])


def _not_in(images: pa.Table, known: pa.Table) -> pa.Table:
    joined = images.join(known.select(KEY), KEY, join_type="left anti")
    return joined.select(LISTING.names).sort_by("path")


def _live_index(images: pa.Table, known: pa.Table) -> pa.Table:
    """Return one row for each image listed; of an image computed twice, the newest batch's."""
    newest = known.group_by(KEY).aggregate([("batch", "max")]).rename_columns([*KEY, "batch"])
    live = images.join(newest, KEY, join_type="inner").join(
        known.select([*KEY, "batch", "stage", "reason"]), [*KEY, "batch"], join_type="inner"
    )
    if live.num_rows != images.num_rows:
        raise StateError(
            f"expected a row for each of {images.num_rows} images, found {live.num_rows}: the "
            "feature table was changed while this ran. Run again, one run at a time."
        )
    return live.select(INDEX).sort_by("path").cast(_index_schema())


def _count_gone(previous: pa.Table, images: pa.Table) -> int:
    gone: pa.Table = previous.join(images.select(["path"]), ["path"], join_type="left anti")
    return int(gone.num_rows)


def _count(index: pa.Table, stage: str) -> int:
    return pc.sum(pc.equal(index["stage"], stage)).as_py() or 0


def _write_batch(
    spark: SparkSession, table: FeatureTable, images: pa.Table, run: _PassOverImages, slots: int
) -> None:
    tasks = min(slots * TASKS_PER_SLOT_AND_BATCH, images.num_rows)
    frame = spark.createDataFrame(images).repartition(tasks)
    rows = frame.mapInArrow(run, ROWS)
    rows.write.option("compression", CODEC).parquet(table.batch_uri(run.batch))
    _check_commit(table, run.batch)


def _check_commit(table: FeatureTable, batch: str) -> None:
    """Make sure that S3 got the batch from the magic committer: another one is not atomic there."""
    key = f"{table.root}/batches/{batch}/_SUCCESS"
    proof = table.output.read(key)
    if proof is None:
        raise StateError(
            f"expected {table.output.address}/{key} after the commit, found none. Run again: "
            "the batch is computed anew."
        )
    if table.output.address.bucket is not None:
        committer = json.loads(proof or b"{}").get("committer")
        if committer != "magic":
            raise StateError(
                f"expected the magic committer on {table.output.address}, found {committer}. "
                "Start the cluster with the spark-defaults.conf and the jars of pipeline/engine/."
            )


@contextmanager
def _reporting(
    total: int,
    done: Accumulator[int],
    quarantined: Accumulator[int],
    on_progress: Callable[[Progress], None],
) -> Iterator[None]:
    """Call `on_progress` twice a second; accumulators move as tasks end."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(0.5):
            on_progress(Progress(done.value, total, quarantined.value))

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()
        on_progress(Progress(done.value, total, quarantined.value))


@dataclass(frozen=True)
class _PassOverImages:
    """What a Spark task does with its share of the listing: the function given to mapInArrow."""

    model: Broadcast[bytes]
    input_size: int
    reader: ImageReader
    batch: str
    done: Accumulator[int]
    quarantined: Accumulator[int]

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        network = _network(self.model)
        read = _checked(_opened(self.reader))
        for batch in batches:
            vectors: list[bytes | None] = [None] * batch.num_rows
            stages: list[str | None] = [None] * batch.num_rows
            reasons: list[str | None] = [None] * batch.num_rows
            for row, outcome in enumerate(_read_ahead(batch.to_pylist(), read)):
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    vector = network(decode(outcome, self.input_size))
                    vectors[row] = vector.astype("<f4").tobytes()
                except _Unreadable as error:
                    stages[row], reasons[row] = READ, str(error)
                except BadImageError as error:
                    stages[row], reasons[row] = DECODE, str(error)
            self.done.add(batch.num_rows)
            self.quarantined.add(sum(stage is not None for stage in stages))
            yield pa.RecordBatch.from_arrays(
                [
                    *batch.columns,
                    pa.array([self.batch] * batch.num_rows, pa.string()),
                    pa.array(vectors, pa.binary()),
                    pa.array(stages, pa.string()),
                    pa.array(reasons, pa.string()),
                ],
                schema=ARROW_ROWS,
            )


class _Unreadable(Exception):  # noqa: N818
    """An image that could not be read as it was listed."""


_networks: dict[int, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {}
_readers: dict[ImageReader, Callable[[str], tuple[bytes, str]]] = {}


def _network(
    model: Broadcast[bytes],
) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """Load the model once in the life of a Python worker, not once a task."""
    content = model.value
    if id(content) not in _networks:
        _networks.clear()
        _networks[id(content)] = load_network(content)
        # Spark's worker collects garbage after each task; what lives as long as the process
        # (libraries, the model) need not be looked through each time.
        gc.freeze()
    return _networks[id(content)]


def _opened(reader: ImageReader) -> Callable[[str], tuple[bytes, str]]:
    """Open the reader, and its connections, once in the life of a Python worker."""
    if reader not in _readers:
        _readers[reader] = reader.open()
    return _readers[reader]


def _checked(read: Callable[[str], tuple[bytes, str]]) -> Callable[[dict[str, Any]], Any]:
    """Read an image as it was listed; give back its bytes, or why it could not be read.

    An S3 that does not answer is not the image's fault: that error ends the task, Spark tries the
    task again, and a job that fails keeps the batches before it.
    """

    def read_row(row: dict[str, Any]) -> bytes | _Unreadable | BadImageError:
        if row["length"] > MAX_BYTES:
            return BadImageError(
                f"{row['length']:,} bytes are more than the {MAX_BYTES:,} that are read"
            )
        try:
            content, version = read(row["path"])
        except (FileNotFoundError, NotADirectoryError):
            return _Unreadable("deleted since it was listed")
        except IsADirectoryError:
            return _Unreadable("a folder, not a file")
        except (PermissionError, ValueError) as error:
            return _Unreadable(str(error))
        if version != row["version"]:
            return _Unreadable("replaced since it was listed; the next run takes the new one")
        return content

    return read_row


def _read_ahead(
    rows: list[dict[str, Any]],
    read: Callable[[dict[str, Any]], bytes | _Unreadable | BadImageError],
) -> Iterator[bytes | _Unreadable | BadImageError]:
    """Yield what `read` gives for each row, in order; the next burst is read meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(GETS_AT_ONCE) as pool:
        bursts = ([pool.submit(read, row) for row in burst] for burst in _bursts(rows))
        coming = next(bursts, [])
        while coming:
            current, coming = coming, next(bursts, [])
            while current:
                yield current.pop(0).result()


def _bursts(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Cut rows into runs that are read at once, bounded in number and in bytes."""
    burst: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        size += row["length"]
        if burst and (len(burst) == GETS_AT_ONCE or size > BYTES_AT_ONCE):
            yield burst
            burst, size = [], row["length"]
        burst.append(row)
    if burst:
        yield burst
