"""The feature table: one row for each image, features or a quarantine, in a Delta table.

    features/<model id>/model.json, model.tflite
    features/<model id>/table/          the Delta table: Parquet files and _delta_log/
    features/<model id>/states/*.npz    what is known of the rows after a commit, which names it
    features/<model id>/pass.json       the last complete pass: which listing the rows stand for

A row is either features or a quarantine (stage and reason), so that images listed = features +
quarantined holds by construction. Workers write the files (parts.py); the driver commits them
(delta.py), with the moments of what was added and removed: features are not read again for a PCA.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession

from pipeline.errors import StateError
from pipeline.listing.images import LISTING
from pipeline.networks.model import Model
from pipeline.pca import Moments, Running, Tally, feature_matrix
from pipeline.quarantine import DAILY, READ, Again, word_of, words
from pipeline.record import Speed
from pipeline.s3.access import S3Settings, located
from pipeline.storage import Address, Store
from pipeline.table.delta import UPKEEP, Change, Delta, File, Snapshot
from pipeline.table.parts import Parts, for_each, picked

ROWS_PER_FILE = 4096  # 21 MB at 1,280 features

# What turned bytes into features: a row that another version made is told by it.
DECODER = f"pillow {version('pillow')} srgb"
RUNTIME = f"ai-edge-litert {version('ai-edge-litert')}"

TABLE = pa.schema(
    [
        *LISTING,
        pa.field("sha256", pa.binary()),
        pa.field("decoder", pa.string(), nullable=False),
        pa.field("runtime", pa.string(), nullable=False),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        # The table's version before the commit that added the row; null in rows of older projects.
        pa.field("since", pa.int64()),
    ]
)

# What a task tells of its work: a file that it wrote (path, size, rows) and one whose rows are now
# there or gone (replaces). What `counted` rows add to what is known (sign 1) or take from it (-1):
# how many of them are quarantined, and tried again in each run or daily. Where it keeps which rows
# stay (kept, kept_rows). What it saw of the images that it read (task.py, Reads).
WRITTEN = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("sign", pa.int64()),
        pa.field("counted", pa.int64()),
        pa.field("quarantined", pa.int64()),
        pa.field("each_run", pa.int64()),
        pa.field("daily", pa.int64()),
        pa.field("moments", pa.binary()),
        pa.field("replaces", pa.string()),
        pa.field("kept", pa.string()),
        pa.field("kept_rows", pa.int64()),
        pa.field("tried", pa.int64()),
        pa.field("failed", pa.int64()),
        *(pa.field(name, pa.string()) for name in ("example", "refused", "good", "trouble")),
    ]
)


@dataclass(frozen=True)
class Known:
    """What is known of the rows of a table without reading them.

    Attributes
    ----------
    each_run, daily
        How many images could not be read and are tried again in each run, or once a day.
    """

    rows: int
    quarantined: int
    each_run: int
    daily: int
    running: Running

    @property
    def features(self) -> int:
        """How many rows have features."""
        return self.rows - self.quarantined

    def to_bytes(self) -> bytes:
        """Pack as npz."""
        content = io.BytesIO()
        counts = np.array([self.rows, self.quarantined, self.each_run, self.daily])
        np.savez(content, counts=counts, **self.running.to_arrays())
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Known | None:
        """Unpack what `to_bytes` packed; None if an older version did, which counted less."""
        with np.load(io.BytesIO(content)) as packed:
            counts = packed["counts"].tolist()
            if len(counts) != 4:
                return None
            rows, quarantined, each_run, daily = counts
            return cls(rows, quarantined, each_run, daily, Running.from_arrays(packed))


@dataclass(frozen=True)
class LastPass:
    """A complete pass: the listing that the rows of a state stand for.

    Attributes
    ----------
    state
        Name of the table's state; another one means that rows have changed since.
    digest
        Of the listing (images.py).
    images
        Where the images lay.
    left_out
        How many other objects lay beside them, by kind.
    largest
        The speed of the pass over most images: one new image tells nothing of it.
    tried
        When images were last tried that are tried daily, in seconds since 1970.
    unread
        The images that could not be read and are tried again, as they were listed, with `reason`;
        none where they are too many to be tried on the driver.
    """

    state: str
    digest: str
    images: str
    left_out: dict[str, int]
    largest: Speed | None
    tried: float = 0.0
    unread: tuple[Unread, ...] = ()

    @property
    def is_daily_due(self) -> bool:
        """Tell whether a day is over; a clock that was set back does not put it off for ever."""
        return not 0 <= time.time() - self.tried < DAILY.total_seconds()


class Unread(NamedTuple):
    """An image that could not be read, as it was listed."""

    path: str
    length: int
    version: str
    reason: str


class FeatureTable:
    """The features of one model below an OUTPUT."""

    def __init__(
        self, output: Store, model: Model, s3: S3Settings, *, single_writer: bool = False
    ) -> None:
        self.output = output
        self.model = model
        self.root = f"features/{model.id}"
        address = output.address / f"{self.root}/table"
        s3 = located(address.bucket, s3)
        self.delta = Delta(address, s3, single_writer=single_writer)
        self.parts = Parts(self.delta.address, s3)

    def open(self, flatbuffer: Callable[[], bytes]) -> bytes:
        """Return the table's LiteRT model; a new table keeps the one that `flatbuffer` makes.

        Raises
        ------
        StateError
            When the table was made by another model than its name says.
        """
        described = self.output.read(f"{self.root}/model.json")
        if next(self.output.list(f"{self.root}/batches/"), None) is not None:
            raise StateError(
                f"{self.output.address}/{self.root} holds features as an older version of fruits "
                "kept them. Choose another OUTPUT and compute them anew, or go on with that "
                "version; nothing there was touched."
            )
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

    def snapshot(self) -> Snapshot | None:
        """Return the newest version, None before the first pass."""
        return self.delta.snapshot()

    def newest(self) -> Snapshot:
        """Return the newest version.

        Raises
        ------
        StateError
            When there is none.
        """
        snapshot = self.snapshot()
        if snapshot is None:
            raise StateError(f"expected a feature table in {self.delta.address}, found none.")
        return snapshot

    def create(self) -> Snapshot:
        """Make the empty table.

        Raises
        ------
        StateError
            When another run has meanwhile made it: its rows may be younger than our listing.
        """
        nothing = Known(0, 0, 0, 0, Running.counted(Moments.empty(self.model.dimensions)))
        state = self._keep(nothing)
        made = self.delta.create(TABLE, state)
        if made.state != state:
            raise StateError(
                f"expected no table in {self.delta.address}, found that another run has just made "
                "one. Run again."
            )
        return made

    def known(self, snapshot: Snapshot) -> Known | None:
        """Return what is known of a snapshot's rows; None where they have to be counted."""
        if snapshot.state is None:
            return None
        content = self.output.read(f"{self.root}/states/{snapshot.state}.npz")
        if content is None or not snapshot.state.endswith(_sum_of(content)):
            return None  # lost or damaged: it is made again
        return Known.from_bytes(content)

    def commit(self, base: Snapshot, known: Known, done: pa.Table) -> tuple[Snapshot, Known]:
        """Commit what tasks have written and replaced; return the table after it.

        Parameters
        ----------
        base, known
            The snapshot from which the work was computed, and what is known of its rows.
        done
            What the tasks told (WRITTEN).
        """
        added, removed = (self._sum(done, sign) for sign in (1, -1))
        after = Known(
            known.rows + added.rows - removed.rows,
            known.quarantined + added.quarantined - removed.quarantined,
            known.each_run + added.each_run - removed.each_run,
            known.daily + added.daily - removed.daily,
            known.running.change(added.running.moments, removed.running.moments),
        )
        files = done.filter(pc.is_valid(done["path"])).select(["path", "size", "rows"])
        change = Change(
            tuple(File(**row) for row in files.to_pylist()),
            tuple(done["replaces"].drop_null().to_pylist()),
        )
        if not change.add and not change.remove:
            return base, known
        return self.delta.commit(base, change, self._keep(after)), after

    def counted(self, done: pa.Table) -> Known:
        """Return what is known of rows that tasks have all counted."""
        return self._sum(done, 1)

    def _sum(self, done: pa.Table, sign: int) -> Known:
        of_it = done.filter(pc.equal(done["sign"], sign))
        tally = Tally(self.model.dimensions)
        for packed in of_it["moments"].drop_null():
            tally.merge(packed.as_py())
        names = ("counted", "quarantined", "each_run", "daily")
        rows, quarantined, each_run, daily = (pc.sum(of_it[name]).as_py() or 0 for name in names)
        return Known(rows, quarantined, each_run, daily, Running.counted(tally.result()))

    def note(self, base: Snapshot, known: Known) -> Snapshot:
        """Give a snapshot whose rows were counted anew a state of its own."""
        return self.delta.commit(base, Change(kind=UPKEEP), self._keep(known))

    def _keep(self, known: Known) -> str:
        content = known.to_bytes()
        name = f"{uuid.uuid4().hex[:12]}-{_sum_of(content)}"
        self.output.write(f"{self.root}/states/{name}.npz", content)
        return name

    def last_pass(self) -> LastPass | None:
        """Return the last complete pass, None before the first."""
        content = self.output.read(f"{self.root}/pass.json")
        if content is None:
            return None
        try:
            told = json.loads(content)
            told.setdefault("left_out", {"others": told.pop("ignored", 0)})
            told.pop("unreadable", None)  # of an older version, which knew less of them
            largest, unread = told.pop("largest"), told.pop("unread", ())
            return LastPass(
                **told,
                largest=largest and Speed(**largest),
                unread=tuple(Unread(*one) for one in unread),
            )
        except (ValueError, KeyError, TypeError):
            return None  # damaged, or of another version: the next pass makes it again

    def keep_pass(self, done: LastPass) -> None:
        """Keep a complete pass."""
        self.output.write(f"{self.root}/pass.json", json.dumps(asdict(done), indent=2).encode())

    def carry_pass(self, before: Snapshot, after: Snapshot, without: Container[str] = ()) -> None:
        """Let the last pass stand for a newer state, without some images it could not read."""
        last = self.last_pass()
        if last is None:
            return
        carried = replace(
            last,
            state=str(after.state) if last.state == before.state else last.state,
            unread=tuple(one for one in last.unread if one.path not in without),
        )
        if carried != last:
            self.keep_pass(carried)

    def images(self) -> Address:
        """Return where the images of the last complete pass lay.

        Raises
        ------
        StateError
            When no pass is complete.
        """
        done = self.last_pass()
        if done is None:
            raise StateError(
                f"expected a complete feature table in {self.output.address}/{self.root}, found "
                "an unfinished one. Finish it: fruits features IMAGES OUTPUT"
            )
        return Address.parse(done.images)

    def read(self, spark: SparkSession, snapshot: Snapshot, columns: Sequence[str]) -> DataFrame:
        """Return columns of all live rows."""
        parts = self.parts

        def rows(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
            for file in files:
                yield from parts.read(file, columns)

        return for_each(spark, list(snapshot.files), rows, picked(TABLE, columns))

    def features(self, spark: SparkSession, snapshot: Snapshot) -> DataFrame:
        """Return path, label and features (array<float>) of the live rows that have features."""
        parts = self.parts

        def rows(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
            for file in files:
                yield from (batch.select(columns) for batch in with_features(parts, file))

        columns = ["path", "label", "features"]
        return for_each(spark, list(snapshot.files), rows, picked(TABLE, columns))


def _sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def with_features(parts: Parts, file: str) -> Iterator[pa.RecordBatch]:
    """Yield path, label, features and since of a file's rows that have features."""
    for batch in parts.read(file, ["path", "label", "features", "since"]):
        if "since" not in batch.schema.names:
            batch = batch.append_column("since", pa.nulls(batch.num_rows, pa.int64()))
        yield batch.filter(pc.is_valid(batch.column("features")))


def written(parts: Parts, commit: str, rows: pa.Table, d: int) -> pa.RecordBatch:
    """Write rows as a new file of the table; return what a commit needs to know of it (WRITTEN)."""
    path = f"{commit}/{uuid.uuid4().hex}.parquet"
    size = parts.write(path, rows)
    return told(1, rows, d, path=path, size=size, rows=rows.num_rows)


def told(sign: int, counted: pa.Table, d: int, **others: str | int | None) -> pa.RecordBatch:
    """Return what a task tells of rows that come (sign 1) or go (-1), and others of WRITTEN."""
    tally = Tally(d)
    for batch in counted.select(["features"]).drop_null().to_batches():
        tally.add(feature_matrix(batch.column(0), d))
    values = {
        "sign": sign,
        "counted": counted.num_rows,
        "quarantined": counted.num_rows - counted["stage"].null_count,
        **_again(counted),
        "moments": tally.to_bytes(),
        **others,
    }
    return pa.RecordBatch.from_pylist([values], schema=WRITTEN)


def _again(rows: pa.Table) -> dict[str, int]:
    """Count the images that are tried again in each run, and once a day."""
    unread = rows.filter(pc.equal(rows["stage"], READ))["reason"].to_pylist()
    daily = sum(word_of(reason) in words(Again.DAILY) for reason in unread)
    never = sum(word_of(reason) in words(Again.NEVER) for reason in unread)
    return {"each_run": len(unread) - daily - never, "daily": daily}


def models_in(output: Store) -> list[Model]:
    """Return the models whose feature tables lie below an OUTPUT."""
    described = [e.key for e in output.list("features/") if e.key.endswith("/model.json")]
    return [Model(**json.loads(output.read(key) or b"{}")) for key in sorted(described)]
