"""The pass over the images, as the driver leads it.

The listing is compared with the feature table in Spark. What is new is read, decoded and run
through the network once (task.py), in bounded commits; of what changed or is gone, the files of
the table that hold it are written again without it. A driver that is killed loses the commit it
was in, nothing else.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.accumulators import Accumulator
from pyspark.sql import SparkSession
from pyspark.sql import functions as sf
from pyspark.sql.pandas.types import from_arrow_schema

from pipeline.engine.session import task_slots
from pipeline.errors import StateError
from pipeline.failures import MOST_SHARE, ReadFailures
from pipeline.listing.images import Listing
from pipeline.networks.apart import LIMITS, Limits
from pipeline.pca import Tally
from pipeline.plan import Plan, Touched, check_removals, make_plan
from pipeline.quarantine import READ, BadImageError, left_alone, word_of
from pipeline.reading import ImageReader, Outcome, Row, read_listed
from pipeline.record import Counts, Speed
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import (
    WRITTEN,
    FeatureTable,
    Known,
    LastPass,
    Unread,
    told,
)
from pipeline.table.parts import Item, Parts, Slice, cut, for_each, tasks_for
from pipeline.task import PassOverImages, Rewrite
from pipeline.upkeep import merge_small_files

IMAGES_PER_SLOT_AND_COMMIT = 8192  # about a minute of work: what a killed driver loses at most
ANSWERS_AT_ONCE = 8  # moments of more tasks than this are merged by the cluster before the driver
MOST_TRIED_HERE = 32  # images that could not be read, by the driver


@dataclass(frozen=True)
class Progress:
    """How far a pass is: images done of those to do, and how many of them in quarantine."""

    done: int
    total: int
    quarantined: int


@dataclass(frozen=True)
class Pass:
    """What a pass did, and the table as it left it.

    `largest` is the speed of the table's pass over most images: one new image tells nothing of it.
    """

    snapshot: Snapshot
    known: Known
    left_out: Mapping[str, int]
    computed: int
    reused: int
    dropped: int
    largest: Speed | None
    recounted: bool = False  # all rows were read for what is known of them
    unsure: int = 0  # rows that an inventory would have changed, and is too young to

    @property
    def counts(self) -> Counts:
        """Return the numbers of images."""
        known = self.known
        return Counts(
            listed=known.rows,
            features=known.features,
            quarantined=known.quarantined,
            computed=self.computed,
            reused=self.reused,
            dropped=self.dropped,
            ignored=sum(self.left_out.values()),
            unsure=self.unsure,
        )

    @property
    def rows_read(self) -> int:
        """Return of how many rows the features were read or computed for what is known."""
        return self.known.features if self.recounted else self.computed


def compute_features(
    spark: SparkSession,
    table: FeatureTable,
    base: Snapshot | None,
    listing: Listing,
    reader: ImageReader,
    flatbuffer: bytes,
    work: Parts,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    allow_removals: bool = False,
    recompute: bool = False,
    retry_quarantine: bool = False,
    max_unreadable: float = MOST_SHARE,
    limits: Limits = LIMITS,
) -> Pass:
    """Bring the feature table up to date with a listing.

    Parameters
    ----------
    base
        The table as it was before the listing began, None if there was none.
    work
        Where the listing's parts lie, and this pass may keep files of its own.
    on_progress
        Called about twice a second while Spark works.
    allow_removals
        Believe a listing that lacks a large part of the images that are known.
    recompute
        Compute again what another version of the decoder or the runtime has made.
    retry_quarantine
        Try again all images that have no features.
    max_unreadable
        The share of the images read for the first time that may not be readable.
    limits
        What decoding one image may take.

    Raises
    ------
    RemovalsError
        When it does, and that is not allowed; nothing is changed then.
    UnreadableError, StorageError
        When images cannot be read for what is wrong with the run; the commits before stay.
    """
    began = time.monotonic()
    previous = table.last_pass()
    is_daily_due = retry_quarantine or previous is None or previous.is_daily_due
    tried = time.time() if is_daily_due or previous is None else previous.tried
    slots = task_slots(spark)
    snapshot = base or table.create()
    known = table.known(snapshot)
    recounted = known is None
    if known is None:
        known = count(spark, table, snapshot)
        snapshot = table.note(snapshot, known)
    listed = [Slice(part.name, 0, rows) for part, rows in listing.parts]
    spark.sparkContext.setJobDescription("features: what is new, changed or gone")
    plan = Plan(listed, [])
    if snapshot.files:
        plan = make_plan(
            spark,
            table,
            snapshot,
            listed,
            listing.sure_until,
            work,
            left_alone=left_alone(is_daily_due=is_daily_due),
            recompute=recompute,
            retry_quarantine=retry_quarantine,
        )
    if not allow_removals:
        check_removals(plan.gone, snapshot.rows, reader.address)
    model = spark.sparkContext.broadcast(flatbuffer)
    done, quarantined = (spark.sparkContext.accumulator(0) for _ in range(2))
    stay = 0
    failures = ReadFailures(reader, max_unreadable, partial(_some_read, table, snapshot))
    with _reporting(plan.todo, done, quarantined, on_progress):
        for slices, touched in plan.commits(slots * IMAGES_PER_SLOT_AND_COMMIT):
            spark.sparkContext.setJobDescription(
                f"features: {sum(s.count for s in slices)} of {plan.todo} images"
            )
            run = PassOverImages(
                model,
                table.model.input_size,
                table.model.dimensions,
                reader,
                work,
                table.parts,
                uuid.uuid4().hex,
                done,
                quarantined,
                snapshot.version,
                limits,
            )
            answers = _work_on(spark, run, slices, touched, failures)
            stay += pc.sum(answers["kept_rows"]).as_py() or 0
            snapshot, known = table.commit(snapshot, known, answers)
    snapshot = merge_small_files(spark, table, snapshot)
    spark.sparkContext.setJobDescription("")
    largest = previous.largest if previous else None
    if plan.todo and (largest is None or plan.todo >= largest.images):
        largest = Speed(plan.todo, time.monotonic() - began, slots)
    if not plan.unsure and known.rows != listing.count:
        raise StateError(
            f"expected a row for each of {listing.count:,} images, found {known.rows:,}: the table "
            "was changed while this ran. Run again."
        )
    last = LastPass(
        str(snapshot.state),
        # What was left alone is looked at again, even where the next listing is the same.
        "" if plan.unsure else listing.digest,
        str(reader.address),
        dict(listing.left_out),
        largest,
        tried,
        _unread(spark, table, snapshot, known),
    )
    table.keep_pass(last)
    return Pass(
        snapshot=snapshot,
        known=known,
        left_out=listing.left_out,
        computed=plan.todo - stay,
        reused=known.rows - (plan.todo - stay),
        dropped=plan.gone,
        largest=largest,
        recounted=recounted,
        unsure=plan.unsure,
    )


def _work_on(
    spark: SparkSession,
    run: PassOverImages,
    slices: list[Slice],
    touched: list[Touched],
    failures: ReadFailures,
) -> pa.Table:
    """Do the work of one commit; return what the tasks told (WRITTEN)."""
    images = sum(some.count for some in slices)
    answers = answers_of(spark, cut(slices, tasks_for(spark, images)), run)
    failures.check(answers)
    if touched:
        kept = answers["kept"].drop_null().to_pylist()
        again = Rewrite(run.table, run.work, kept, run.commit, run.dimensions)
        answers = pa.concat_tables([answers, answers_of(spark, touched, again)])
    return answers


def nothing_to_compute(
    table: FeatureTable, base: Snapshot | None, listing: Listing, reader: ImageReader
) -> Pass | None:
    """Return the last pass if its table and its listing are those of today, else None.

    Images that could not be read then, and are to be tried again now, are tried first: by this
    machine, if they are few.
    """
    last = table.last_pass()
    if base is None or last is None or last.state != base.state or last.digest != listing.digest:
        return None
    known = table.known(base)
    if known is None:
        return None
    is_due = last.is_daily_due
    alone = left_alone(is_daily_due=is_due)
    again = [one for one in last.unread if word_of(one.reason) not in alone]
    if len(again) != known.each_run + (known.daily if is_due else 0):
        return None  # too many for this machine
    read = read_listed(reader.open()) if again else None
    if read and any(_is_otherwise(read, one) for one in again):
        return None
    if is_due and again:
        table.keep_pass(replace(last, tried=time.time()))
    return pass_of(base, known, last)


def _is_otherwise(read: Callable[[Row], Outcome], image: Unread) -> bool:
    """Tell whether an image can be read now, or cannot for another reason."""
    outcome = read({**image._asdict(), "known_reason": image.reason})
    return not isinstance(outcome, BadImageError) or outcome.reason.word != word_of(image.reason)


def _unread(
    spark: SparkSession, table: FeatureTable, snapshot: Snapshot, known: Known
) -> tuple[Unread, ...]:
    """Return the images that could not be read and are tried again, if they are few."""
    if not 0 < known.each_run + known.daily <= MOST_TRIED_HERE:
        return ()
    never = left_alone(is_daily_due=True)
    rows = table.read(spark, snapshot, [*Unread._fields, "stage"]).where(sf.col("stage") == READ)
    found = rows.where(~sf.substring_index("reason", ":", 1).isin(never)).collect()
    return tuple(Unread(*(row[name] for name in Unread._fields)) for row in found)


def _some_read(table: FeatureTable, snapshot: Snapshot) -> Iterator[str]:
    """Yield paths of a few images that were read in passes before."""
    files = list(snapshot.files)
    for file in files[:: max(1, len(files) // 10)]:
        rows = pa.Table.from_batches(list(table.parts.read(file, ["path", "stage"])))
        yield from rows.filter(pc.is_null(rows["stage"]))["path"].slice(0, 8).to_pylist()


def pass_of(snapshot: Snapshot, known: Known, last: LastPass) -> Pass:
    """Return the pass that finds all there."""
    return Pass(snapshot, known, last.left_out, 0, known.rows, 0, last.largest)


def count(spark: SparkSession, table: FeatureTable, snapshot: Snapshot) -> Known:
    """Read all rows for what is to be known of them."""
    parts, d = table.parts, table.model.dimensions

    def counted(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            rows = pa.Table.from_batches(list(parts.read(file, ["features", "stage", "reason"])))
            yield told(1, rows, d)

    answers = answers_of(spark, list(snapshot.files), counted)
    return table.counted(answers)


def recount(spark: SparkSession, table: FeatureTable, done: Pass) -> Pass:
    """Count all rows anew, where what is known of them has lost its last digits."""
    known = count(spark, table, done.snapshot)
    snapshot = table.note(done.snapshot, known)
    table.carry_pass(done.snapshot, snapshot)
    return replace(done, snapshot=snapshot, known=known, recounted=True)


def answers_of(
    spark: SparkSession,
    items: Sequence[Item],
    do: Callable[[Iterator[Item]], Iterator[pa.RecordBatch]],
) -> pa.Table:
    """Return what tasks told (WRITTEN), with the moments merged on the way here."""
    if not items:
        return WRITTEN.empty_table()
    tasks = tasks_for(spark, len(items))
    frame = for_each(spark, items, lambda some: _merged(do(some)), WRITTEN)
    if tasks > ANSWERS_AT_ONCE:
        for parts in (math.isqrt(tasks), 1):
            # By partition: a task that is run again must tell the same ones.
            together = frame.repartition(parts, sf.spark_partition_id())
            frame = together.mapInArrow(_merged, from_arrow_schema(WRITTEN))
    return frame.toArrow().cast(WRITTEN)


def _merged(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows that were told without their moments, then those of each sign, merged."""
    tallies: dict[int, Tally] = {}
    place = WRITTEN.get_field_index("moments")
    for batch in batches:
        for sign, packed in zip(batch.column("sign"), batch.column("moments"), strict=True):
            if packed.is_valid:
                content = packed.as_py()
                tallies.setdefault(sign.as_py(), Tally.of(content)).merge(content)
        without = pa.nulls(batch.num_rows, pa.binary())
        yield batch.set_column(place, WRITTEN.field(place), without)
    nothing = {"counted": 0, "quarantined": 0, "each_run": 0, "daily": 0}
    merged = [
        {"sign": sign, "moments": tally.to_bytes(), **nothing} for sign, tally in tallies.items()
    ]
    yield pa.RecordBatch.from_pylist(merged, schema=WRITTEN)


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
