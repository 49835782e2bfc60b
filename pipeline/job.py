"""The whole job, from images to matrix: the order in which the other modules do their part.

list -> features -> PCA -> matrix -> report -> run.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from pyspark.sql import SparkSession

from pipeline.errors import NoImagesError, PCAError, StateError
from pipeline.failures import MOST_SHARE
from pipeline.features import Pass, compute_features, count, nothing_to_compute, pass_of, recount
from pipeline.forget import Receipt, erase, remove_rows
from pipeline.journal import Journal, Observer, now
from pipeline.listing.images import Listing, list_images
from pipeline.listing.inventory import open_inventory
from pipeline.networks.model import Model
from pipeline.output import WORK, check_exclusive_writes, check_output, check_run
from pipeline.pca import PCA
from pipeline.reading import ImageReader
from pipeline.record import FORMAT, Counts, Made, PCAOptions, Run
from pipeline.result.make import Making
from pipeline.result.overview import quarantine
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore, Store, open_store
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import FeatureTable
from pipeline.table.parts import Parts
from pipeline.versions import (
    DAY,
    KEPT,
    RECORD,
    YOUNG,
    copy_newest,
    delete_all,
    lacking,
    newest,
    prune,
    publish,
)


@dataclass(frozen=True)
class Choices:
    """What a user may choose beside images, output, model and PCA.

    Attributes
    ----------
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
    retry_quarantine
        Try again all images that have no features.
    max_unreadable
        The share of the images read for the first time that may not be readable.
    keep_versions, keep_days
        So many of the newest versions of the result stay, and all that were current within so many
        days.
    """

    inventory: Address | None = None
    force: bool = False
    allow_removals: bool = False
    recompute: bool = False
    single_writer: bool = False
    retry_quarantine: bool = False
    max_unreadable: float = MOST_SHARE
    keep_versions: int = KEPT
    keep_days: float = YOUNG / DAY


@dataclass
class Job:
    """A run from IMAGES to OUTPUT.

    Attributes
    ----------
    spark
        Makes or returns the session; called only once there is something to compute.
    flatbuffer
        Makes the LiteRT model; called only for a new feature table.
    """

    images: Address
    output: Address
    model: Model
    flatbuffer: Callable[[], bytes]
    spark: Callable[[], SparkSession]
    s3: S3Settings
    observer: Observer
    pca: PCAOptions = field(default_factory=PCAOptions)
    choices: Choices = field(default_factory=Choices)

    def __post_init__(self) -> None:
        self.journal = Journal(self.observer)
        self.store = open_store(self.output, self.s3)
        single = self.choices.single_writer
        self.table = FeatureTable(self.store, self.model, self.s3, single_writer=single)
        self.reader = ImageReader(self.images, self.s3)

    def run(self) -> Run:
        """Do all of it and return the record that was written.

        Raises
        ------
        FruitsError
            One of its kinds, with nothing written yet where the cause can be known beforehand.
        """
        previous = self._check_output()
        with self._listed() as (base, listing):
            self._check_components(listing.count)
            unchanged = self._unchanged(previous, base, listing)
            if unchanged is not None:
                return self._noted(unchanged)
            done = self._compute(base, listing)
        if previous is not None and self._is_whole(previous) and self._stands(previous, done):
            return self._noted(self._repeated(previous, done))  # images were tried in vain
        return self._published(done)

    def features(self) -> Counts:
        """Bring the feature table up to date and stop there."""
        self._check_output()
        with self._listed() as (base, listing):
            return self._compute(base, listing).counts

    def fit(self) -> Run:
        """Do what follows the features, from the table as its last complete pass left it.

        Raises
        ------
        StateError
            When no pass over the images is complete.
        OutputTakenError
            When OUTPUT holds the result of other images or another model.
        """
        check_run(self.images, self.model, self.store, force=self.choices.force)
        snapshot, last = self.table.snapshot(), self.table.last_pass()
        if snapshot is None or last is None or last.state != snapshot.state:
            raise StateError(
                f"expected a complete feature table of {self.model.id} in {self.output}, found "
                f"none. Compute it: fruits features IMAGES {self.output}"
            )
        self._check_writes()
        with self.journal.stage("spark"):
            spark = self.spark()
        known = self.table.known(snapshot)
        done = pass_of(snapshot, known or count(spark, self.table, snapshot), last)
        self._check_components(done.known.rows)
        return self._published(replace(done, recounted=known is None))

    def forget(self, paths: Sequence[str]) -> Receipt:
        """Remove images that are deleted from the features, and all traces of them.

        The result that names them goes, too; `fit` makes it anew, as the last run was asked for it.

        Raises
        ------
        StateError
            When one of them still lies where it was listed.
        """
        previous = check_run(self.images, self.model, self.store)
        self._check_writes()
        if previous is not None:
            self.pca = previous.pca.requested
        images = self._images()
        with self.journal.stage("features"), self._workplace(Listing((), {}, "")) as work:
            had_rows = remove_rows(self.spark(), self.table, images, paths, work)
        delete_all(self.store, single_writer=self.choices.single_writer)
        return erase(self.table, paths, had_rows, self.journal.run_id)

    def _images(self) -> Store:
        return open_store(self.images, self.s3, follows_links=True)

    def _check_output(self) -> Run | None:
        return check_output(self.images, self.model, self.store, force=self.choices.force)

    def _check_components(self, images: int) -> None:
        """Refuse a number of components that so many images cannot give, before they are read."""
        most = min(self.model.dimensions, images - 1)
        if self.pca.components is not None and self.pca.components > most > 0:
            raise PCAError(
                f"expected 1 to {most:,} components ({images:,} images with "
                f"{self.model.dimensions:,} features each), found {self.pca.components}. Ask for "
                "fewer, or add images."
            )

    def _check_writes(self) -> None:
        """Prove that this S3 keeps two runs apart, before anything is committed."""
        if isinstance(self.store, BucketStore) and not self.choices.single_writer:
            check_exclusive_writes(self.store, f"{WORK}/{self.journal.run_id}/probe")

    @contextmanager
    def _listed(self) -> Iterator[tuple[Snapshot | None, Listing]]:
        """Look at the table first: what comes into it later is not this listing's to remove."""
        inventory = self.choices.inventory
        with TemporaryDirectory(prefix="fruits-") as folder:
            with self.journal.stage("list"):
                base = self.table.snapshot()
                told = open_inventory(inventory, self.s3) if inventory else None
                listing = list_images(self._images(), Path(folder), told)
            yield base, listing

    def _unchanged(
        self, previous: Run | None, base: Snapshot | None, listing: Listing
    ) -> Run | None:
        """Return the previous run, recounted, if this one would only repeat it."""
        if previous is None or self.choices.recompute or self.choices.retry_quarantine:
            return None
        if not self._is_whole(previous):
            return None
        found = nothing_to_compute(self.table, base, listing, self.reader)
        if found is None or not self._stands(previous, found):
            return None
        return self._repeated(previous, replace(found, left_out=listing.left_out))

    def _is_whole(self, run: Run) -> bool:
        """Tell whether a result is all there; say what is not."""
        gone = lacking(self.store, run)
        if gone:
            self.observer.stage(f"{gone[0]} of version {run.version} is gone: making it again")
        return not gone

    def _stands(self, previous: Run, done: Pass) -> bool:
        """Tell whether a result is what this run would make of a table."""
        same_wishes = previous.format == FORMAT and previous.pca.requested == self.pca
        return same_wishes and done.snapshot.state == previous.pca.state

    def _repeated(self, previous: Run, done: Pass) -> Run:
        counts = replace(done.counts, other_makers=previous.counts.other_makers)
        return replace(
            previous,
            run_id=self.journal.run_id,
            started=self.journal.started.isoformat(),
            counts=counts,
            left_out=dict(done.left_out),
            pca=replace(previous.pca, fit="unchanged", rows_read=0),
            images_per_second=None,
        )

    def _noted(self, run: Run) -> Run:
        """Write the record of a run that leaves the result as it is."""
        copy_newest(self.store)
        run = replace(run, timings=self.journal.with_total(), finished=now())
        self.store.write(RECORD, run.to_bytes())
        copy_newest(self.store)
        self._prune()
        return run

    def _compute(self, base: Snapshot | None, listing: Listing) -> Pass:
        self._check_writes()
        with self.journal.stage("model"):
            flatbuffer = self.table.open(self.flatbuffer)
        with self.journal.stage("spark"):
            spark = self.spark()
        with self.journal.stage("features"), self._workplace(listing) as work:
            return compute_features(
                spark,
                self.table,
                base,
                listing,
                self.reader,
                flatbuffer,
                work,
                self.observer.progress,
                allow_removals=self.choices.allow_removals,
                recompute=self.choices.recompute,
                retry_quarantine=self.choices.retry_quarantine,
                max_unreadable=self.choices.max_unreadable,
            )

    @contextmanager
    def _workplace(self, listing: Listing) -> Iterator[Parts]:
        """Bring the listing where workers see it; remove it, and what is beside it, at the end."""
        place = f"{WORK}/{self.journal.run_id}"
        try:
            for part, _ in listing.parts:
                self.store.upload(f"{place}/{part.name}", part)
            yield self.table.parts.beside(self.output / place)
        finally:
            self.store.delete(place)

    def _published(self, done: Pass) -> Run:
        """Make the result of a pass and put it in its place."""
        if not done.known.features:
            raise NoImagesError(self._why_none(done))
        with self.journal.stage("pca"):
            if not done.known.running.is_exact:
                done = recount(self.spark(), self.table, done)
            running = done.known.running
            pca = PCA.fit(
                running.moments,
                components=self.pca.components,
                variance=self.pca.variance,
                standardize=self.pca.standardize,
                largest=running.largest,
            )
        run = Making(
            self.spark(),
            self.table,
            done,
            pca,
            self.pca,
            self.reader,
            self.store,
            self.journal,
            newest(self.store),
        ).make()
        timings = self.journal.with_total()
        made = Made(run.run_id, timings, run.counts.computed)
        self.observer.stage("publish")
        run = publish(
            self.store,
            replace(run, timings=timings, finished=now(), made=made),
            lambda: self._is_of_table(run),
            single_writer=self.choices.single_writer,
        )
        copy_newest(self.store)
        self._prune()
        return run

    def _prune(self) -> None:
        prune(self.store, self.choices.keep_versions, self.choices.keep_days * DAY)

    def _is_of_table(self, run: Run) -> bool:
        snapshot = self.table.snapshot()
        return snapshot is not None and snapshot.state == run.pca.state

    def _why_none(self, done: Pass) -> str:
        if not done.known.rows:
            return f"no image is left in the feature table of {self.output}. Add some, run again."
        first = quarantine(self.spark(), self.table, done.snapshot).limit(1).collect()[0]
        return (
            f"none of {done.known.rows} images gave features; the first, {first['path']}: "
            f"{first['reason']}. Check the images."
        )
