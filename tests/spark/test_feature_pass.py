"""The pass over the images on a real cluster, from a real S3 server to a real S3 server."""

from __future__ import annotations

import io
import os
import tempfile
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from pipeline import upkeep
from pipeline.errors import FruitsError, StateError
from pipeline.features import Pass, Progress, compute_features, count, nothing_to_compute
from pipeline.listing.images import Listing, list_images
from pipeline.local.loopback import Loopback
from pipeline.networks.apart import Limits
from pipeline.networks.decode import decode
from pipeline.networks.model import Model, load_network
from pipeline.quarantine import DECODE, READ
from pipeline.reading import ImageReader
from pipeline.storage import Address, BucketStore, open_store
from pipeline.table.feature_table import FeatureTable, models_in
from pipeline.table.parts import Parts
from tests.conftest import new_bucket
from tests.corpus import bad_images, encoded, good_images, picture, slow_image
from tests.s3_proxy import Behaviour, s3_proxy
from tests.waiting import eventually

Network = tuple[Model, bytes]


class Place:
    """Images and features in one bucket, and the pass between them."""

    def __init__(self, spark: SparkSession, bucket: BucketStore, network: Network) -> None:
        self.spark = spark
        self.images = open_store(bucket.address / "images", bucket.s3)
        self.output = open_store(bucket.address / "output", bucket.s3)
        self.model, self.flatbuffer = network
        self.reader = ImageReader(self.images.address, bucket.s3)
        self.table = FeatureTable(self.output, self.model, bucket.s3)

    def listed(self) -> Listing:
        return list_images(self.images, Path(tempfile.mkdtemp()))

    def run(self, listing: Listing | None = None, **options: Any) -> Pass:
        base = self.table.snapshot()
        listing = listing or self.listed()
        flatbuffer = self.table.open(lambda: self.flatbuffer)
        work = self.output.address / f"_work/{uuid.uuid4().hex}"
        for part, _ in listing.parts:
            open_store(work, self.reader.s3).upload(part.name, part)
        parts = Parts(work, self.reader.s3)
        return compute_features(
            self.spark, self.table, base, listing, self.reader, flatbuffer, parts, **options
        )

    def has_nothing_to_compute(self) -> bool:
        found = nothing_to_compute(self.table, self.table.snapshot(), self.listed(), self.reader)
        return found is not None

    def rows(self, done: Pass) -> dict[str, np.ndarray]:
        rows = self.table.features(self.spark, done.snapshot).toArrow().to_pylist()
        return {row["path"]: np.array(row["features"], np.float32) for row in rows}

    def outcomes(self, done: Pass) -> dict[str, tuple[str | None, str | None]]:
        """Return stage and reason of each image, after a look at all that is known of the rows."""
        frame = self.table.read(self.spark, done.snapshot, ["path", "stage", "reason"])
        rows = frame.toArrow().to_pylist()
        found = {row["path"]: (row["stage"], row["reason"]) for row in rows}
        assert len(found) == len(rows) == done.snapshot.rows, "one live row for each image"
        counted = count(self.spark, self.table, done.snapshot)
        for name in ("rows", "quarantined", "each_run", "daily", "features"):
            assert getattr(done.known, name) == getattr(counted, name)
        known, anew = done.known.running.moments, counted.running.moments
        assert known.n == anew.n == counted.features
        largest = np.abs(anew.scatter).max()
        np.testing.assert_allclose(known.scatter, anew.scatter, rtol=0, atol=1e-9 * largest)
        return found


@dataclass(frozen=True)
class Corpus:
    """A pass over images of every kind, good and bad, and what it told on its way."""

    place: Place
    done: Pass
    told: list[Progress]


@pytest.fixture(scope="module")
def corpus(spark: SparkSession, cluster: Loopback, small_network: Network) -> Corpus:
    place = Place(spark, new_bucket(cluster), small_network)
    put(place, good_images() | {key: content for key, (content, _) in bad_images().items()})
    place.images.write("folder marker.jpg/", b"")
    place.images.write("notes.txt", b"not listed")
    told: list[Progress] = []
    return Corpus(place, place.run(on_progress=told.append), told)


@pytest.fixture
def place(spark: SparkSession, bucket: BucketStore, small_network: Network) -> Place:
    return Place(spark, bucket, small_network)


def put(place: Place, images: dict[str, bytes]) -> None:
    for key, content in images.items():
        place.images.write(key, content)


def jpeg(shift: int) -> bytes:
    return encoded(picture(50 + shift, 40), "JPEG")


def test_every_image_listed_ends_in_features_or_in_quarantine_with_a_reason(corpus: Corpus) -> None:
    good, bad = good_images(), bad_images()
    found = corpus.place.outcomes(corpus.done)
    assert found.keys() == good.keys() | bad.keys()
    assert {key for key, (stage, _) in found.items() if stage} == bad.keys()
    for key, (_, word) in bad.items():
        stage, reason = found[key]
        assert (stage, word in str(reason)) == (DECODE, True), f"{key}: {reason}"
    assert corpus.place.rows(corpus.done).keys() == good.keys()
    assert corpus.told[-1] == Progress(len(found), len(found), len(bad))


def test_features_are_those_of_the_network_called_by_hand(corpus: Corpus) -> None:
    place = corpus.place
    rows = place.rows(corpus.done)
    network = load_network(place.flatbuffer)
    for key, content in good_images().items():
        expected = network(decode(content, place.model.input_size))
        np.testing.assert_array_equal(rows[key], expected)


def test_the_tasks_run_on_both_workers(corpus: Corpus) -> None:
    tracker = corpus.place.spark.sparkContext._jsc.sc().statusTracker()
    # The driver and one executor on each worker; one that was lost is replaced.
    assert eventually(lambda: len(tracker.getExecutorInfos()) == 1 + 2)


def test_a_folder_on_this_machine_gives_the_same_features_as_s3(
    corpus: Corpus, place: Place, tmp_path: Path
) -> None:
    for key, content in good_images().items():
        file = tmp_path / key
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    folder = open_store(Address.parse(str(tmp_path)), place.reader.s3)
    place.reader = ImageReader(folder.address, place.reader.s3)
    from_folder = place.rows(place.run(list_images(folder, Path(tempfile.mkdtemp()))))
    from_s3 = corpus.place.rows(corpus.done)
    assert from_s3.keys() == from_folder.keys()
    for path, features in from_s3.items():
        np.testing.assert_array_equal(features, from_folder[path])


def test_an_image_deleted_or_replaced_after_the_listing_is_quarantined_and_taken_next_time(
    place: Place,
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(4)})
    listing = place.listed()
    place.images.delete("a/0.jpg")
    place.images.write("a/1.jpg", jpeg(9))

    found = place.outcomes(place.run(listing))
    assert found["a/0.jpg"][0] == READ
    assert "deleted" in str(found["a/0.jpg"][1])
    assert found["a/1.jpg"][0] == READ
    assert "replaced" in str(found["a/1.jpg"][1])
    assert [found[f"a/{n}.jpg"][0] for n in (2, 3)] == [None, None]

    again = place.run()
    assert (again.computed, again.reused, again.dropped) == (1, 2, 1)
    assert set(place.outcomes(again).values()) == {(None, None)}


def test_each_object_that_s3_does_not_give_is_a_row_in_s3s_own_words_and_tried_again_daily(
    place: Place, cluster: Loopback
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(4)})
    client, bucket = place.images.client, place.images.bucket
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"k" * 32}
    client.put_object(Bucket=bucket, Key="images/b/ours.jpg", Body=jpeg(5), **key)
    archive = {"Key": "images/b/cold.jpg", "StorageClass": "GLACIER"}
    client.put_object(Bucket=bucket, Body=jpeg(6), **archive)
    client.put_object(Bucket=bucket, Key="images/b/a\nb.jpg", Body=jpeg(7))
    denied, direct = Behaviour(denied_path=f"/{bucket}/images/a/0.jpg"), place.reader
    with s3_proxy(cluster.s3.endpoint or "", denied) as proxy:
        place.reader = ImageReader(
            place.images.address, replace(place.reader.s3, endpoint=proxy.endpoint)
        )
        done = place.run()
        found = place.outcomes(done)
        assert {path: reason for path, (stage, reason) in found.items() if stage == READ} == {
            "a/0.jpg": "denied: S3 answered AccessDenied (no)",
            "b/ours.jpg": found["b/ours.jpg"][1],
            "b/a\nb.jpg": found["b/a\nb.jpg"][1],
        }
        assert str(found["b/ours.jpg"][1]).startswith("encrypted: S3 answered Invalid")
        assert str(found["b/a\nb.jpg"][1]).startswith("bad name: S3's clients do not take it")
        assert found["b/cold.jpg"] == (None, None), "not AWS: it is a name, and can be read"
        assert (done.known.each_run, done.known.daily) == (0, 2)
        assert place.has_nothing_to_compute()
        assert place.run().computed == 0, "nothing is tried again on the same day"
        last = place.table.last_pass()
        assert last is not None
        place.table.keep_pass(replace(last, tried=last.tried - 90_000))
        assert place.has_nothing_to_compute(), "tried, and refused again"
        tried = place.table.last_pass()
        assert tried is not None
        assert tried.tried >= last.tried
        place.table.keep_pass(replace(last, tried=last.tried - 90_000))
    place.reader = direct
    again = place.run()
    assert (again.computed, again.known.daily) == (1, 1)
    assert {path for path, (stage, _) in place.outcomes(again).items() if stage} == {
        "b/ours.jpg",
        "b/a\nb.jpg",
    }
    later = place.table.last_pass()
    assert later is not None
    assert later.tried >= last.tried


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("AccessDenied", "found that it gives none, as .*denied: S3 answered AccessDenied"),
        ("ExpiredToken", "S3 answered ExpiredToken: the credentials have expired"),
    ],
)
def test_what_is_wrong_with_the_run_ends_it_and_writes_nothing(
    place: Place, cluster: Loopback, code: str, told: str
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(3)})
    before = place.run()
    put(place, {f"b/{n}.jpg": jpeg(n) for n in range(3)})
    denied = Behaviour(denied_path=f"/{place.images.bucket}/images/", denied_code=code)
    with s3_proxy(cluster.s3.endpoint or "", denied) as proxy:
        place.reader = ImageReader(
            place.images.address, replace(place.reader.s3, endpoint=proxy.endpoint)
        )
        with pytest.raises(FruitsError, match=told):
            place.run()
    assert place.table.snapshot() == before.snapshot


def test_an_image_on_which_workers_die_is_found_and_the_others_are_computed(place: Place) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(12)} | {"a/poison.jpg": slow_image()})
    done = place.run(limits=Limits(seconds=0.4))
    found = place.outcomes(done)
    assert found.pop("a/poison.jpg") == (
        DECODE,
        "too slow: more than 0.4 s of a processor, twice, alone",
    )
    assert set(found.values()) == {(None, None)}
    assert place.run().computed == 0


def test_images_without_features_are_tried_again_when_that_is_asked_for(place: Place) -> None:
    put(place, {"a/1.jpg": jpeg(1), "a/2.jpg": b"no image"})
    first = place.run()
    assert place.run().computed == 0
    again = place.run(retry_quarantine=True)
    assert (again.computed, again.reused) == (1, 1)
    assert place.outcomes(again) == place.outcomes(first)


def test_a_rerun_computes_what_is_new_changed_or_not_proven_and_drops_those_that_are_gone(
    place: Place,
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(6)})
    first = place.run()
    assert (first.computed, first.reused, first.dropped) == (6, 0, 0)
    assert (
        nothing_to_compute(place.table, place.table.snapshot(), place.listed(), place.reader)
        is not None
    )

    place.images.delete("a/0.jpg")
    place.images.write("a/1.jpg", jpeg(20))
    put(place, {f"b/{n}.jpg": jpeg(10 + n) for n in range(3)})
    assert (
        nothing_to_compute(place.table, place.table.snapshot(), place.listed(), place.reader)
        is None
    )
    second = place.run()
    assert (second.computed, second.reused, second.dropped) == (4, 4, 1)
    assert set(place.outcomes(second).values()) == {(None, None)}
    grown = place.rows(second)

    scratch = open_store(place.output.address / "scratch", place.reader.s3)
    place.table = FeatureTable(scratch, place.model, place.reader.s3)
    for path, features in place.rows(place.run()).items():
        np.testing.assert_array_equal(grown.pop(path), features)
    assert not grown


def test_an_image_whose_time_alone_is_new_is_read_and_not_computed_again(
    place: Place, tmp_path: Path
) -> None:
    for number in range(4):
        file = tmp_path / f"a/{number}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jpeg(number))
    place.images = open_store(Address.parse(str(tmp_path)), place.reader.s3)
    place.reader = ImageReader(place.images.address, place.reader.s3)
    before = place.rows(place.run())
    for number in range(3):
        os.utime(tmp_path / f"a/{number}.jpg", (1, 1))
    (tmp_path / "a/2.jpg").write_bytes(jpeg(9))
    again = place.run()
    assert (again.computed, again.reused) == (1, 3)
    after = place.rows(again)
    np.testing.assert_array_equal(after["a/0.jpg"], before["a/0.jpg"])
    assert not np.array_equal(after["a/2.jpg"], before["a/2.jpg"])
    assert set(place.outcomes(again).values()) == {(None, None)}
    assert place.run().computed == 0


def test_an_inventory_leaves_alone_what_is_too_young_for_it(place: Place) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(3)})
    place.run()
    place.images.delete("a/0.jpg")
    place.images.write("a/1.jpg", jpeg(9))
    put(place, {"a/3.jpg": jpeg(3)})
    listing = replace(place.listed(), sure_until=datetime(2020, 1, 1, tzinfo=UTC))
    done = place.run(listing)
    assert (done.computed, done.dropped, done.unsure, done.known.rows) == (1, 0, 2, 4)
    sure = place.run(replace(listing, sure_until=datetime.now(UTC) + timedelta(days=1)))
    assert (sure.computed, sure.dropped, sure.unsure, sure.known.rows) == (1, 1, 0, 3)


def test_small_files_are_merged_and_old_ones_deleted_beside_a_reader(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "MOST_SMALL_FILES", 8)
    monkeypatch.setattr(upkeep, "SHORTEST_RETENTION", timedelta(0))
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(6)})
    first = place.run()
    put(place, {f"b/{n}.jpg": jpeg(n) for n in range(6)})
    done = place.run()
    assert len(first.snapshot.files) == 6
    assert len(done.snapshot.files) == 1, "twelve small files became one"
    assert set(place.outcomes(done).values()) == {(None, None)}
    assert place.has_nothing_to_compute()

    place.table.parts.put("killed/orphan.parquet", io.BytesIO(b"left by a run that was killed"))
    before = place.rows(first)
    swept = upkeep.vacuum(place.table, timedelta(0))
    assert swept.files == 12 + 1
    left = {e.key for e in place.table.delta.store.list() if not e.key.startswith("_delta_log/")}
    assert left == set(done.snapshot.files)
    after = place.rows(done)
    assert before.keys() < after.keys()
    with pytest.raises(Exception, match=r"not found|NotFound"):
        place.rows(first)


def test_rows_of_another_program_are_counted_and_what_it_took_is_computed_again(
    place: Place,
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(6)})
    first = place.run()
    delta = DeltaTable(place.table.delta._uri, storage_options=place.table.delta._options)
    delta.delete("path = 'a/0.jpg'")
    again = place.run()
    assert (again.computed, again.reused, again.recounted) == (1, 5, True)
    assert place.outcomes(again) == place.outcomes(first)
    assert place.rows(again).keys() == place.rows(first).keys()


def test_the_table_is_read_by_others(corpus: Corpus) -> None:
    delta = corpus.place.table.delta
    ours, outcomes = corpus.place.rows(corpus.done), corpus.place.outcomes(corpus.done)
    frame = polars.read_delta(delta._uri, storage_options=delta._options)
    assert frame.schema["features"] == polars.List(polars.Float32)
    found = {row["path"]: row for row in frame.to_dicts()}
    assert found.keys() == outcomes.keys()
    for path, row in found.items():
        assert (row["stage"], row["reason"]) == outcomes[path]
        if path in ours:
            np.testing.assert_array_equal(np.array(row["features"], np.float32), ours[path])


def test_a_table_of_another_model_is_refused(place: Place) -> None:
    place.table.open(lambda: place.flatbuffer)
    assert models_in(place.output) == [place.model]
    other = replace(place.model, weights_sha256="0" * 64)
    with pytest.raises(StateError, match="should hold features of"):
        FeatureTable(place.output, other, place.reader.s3).open(lambda: place.flatbuffer)
