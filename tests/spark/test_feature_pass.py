"""The pass over the images on a real cluster, from a real S3 server to a real S3 server."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import StateError
from pipeline.features import Progress, compute_features
from pipeline.images import list_images
from pipeline.local.loopback import Loopback
from pipeline.networks.decode import decode
from pipeline.networks.model import Model, load_network
from pipeline.storage import Address, BucketStore, ImageReader, open_store
from pipeline.table import DECODE, READ, FeatureTable, Pass, as_lists, models_in, nothing_to_compute
from tests.conftest import new_bucket
from tests.corpus import bad_images, encoded, good_images, picture
from tests.waiting import eventually


class Place:
    """Images and features in one bucket, and the pass between them."""

    def __init__(self, spark: object, bucket: BucketStore, network: tuple[Model, bytes]) -> None:
        self.spark = spark
        self.images = open_store(bucket.address / "images", bucket.s3)
        self.output = open_store(bucket.address / "output", bucket.s3)
        self.model, self.flatbuffer = network
        self.table = FeatureTable(self.output, self.model)
        self.reader = ImageReader(self.images.address, bucket.s3)

    def listed(self) -> pa.Table:
        return list_images(self.images).images

    def run(self, listing: pa.Table | None = None, **options: object) -> Pass:
        flatbuffer = self.table.open(lambda: self.flatbuffer)
        images = self.listed() if listing is None else listing
        return compute_features(self.spark, self.table, images, self.reader, flatbuffer, **options)

    def rows(self, done: Pass) -> dict[str, np.ndarray]:
        rows = self.table.rows(self.spark, done.index).toArrow().to_pylist()
        return {row["path"]: np.frombuffer(row["features"], np.float32) for row in rows}


@dataclass(frozen=True)
class Corpus:
    """A pass over images of every kind, good and bad, and what it told on its way."""

    place: Place
    done: Pass
    told: list[Progress]


@pytest.fixture(scope="module")
def corpus(spark: object, cluster: Loopback, small_network: tuple[Model, bytes]) -> Corpus:
    place = Place(spark, new_bucket(cluster), small_network)
    put(place, good_images() | {key: content for key, (content, _) in bad_images().items()})
    place.images.write("folder marker.jpg/", b"")
    place.images.write("notes.txt", b"not listed")
    told: list[Progress] = []
    return Corpus(place, place.run(on_progress=told.append), told)


@pytest.fixture
def place(spark: object, bucket: BucketStore, small_network: tuple[Model, bytes]) -> Place:
    return Place(spark, bucket, small_network)


def put(place: Place, images: dict[str, bytes]) -> None:
    for key, content in images.items():
        place.images.write(key, content)


def jpeg(shift: int) -> bytes:
    return encoded(picture(50 + shift, 40), "JPEG")


def outcomes(done: Pass) -> dict[str, tuple[str | None, str | None]]:
    rows = done.index.select(["path", "stage", "reason"]).to_pylist()
    return {row["path"]: (row["stage"], row["reason"]) for row in rows}


def test_every_image_listed_ends_in_features_or_in_quarantine_with_a_reason(corpus: Corpus) -> None:
    good, bad = good_images(), bad_images()
    found = outcomes(corpus.done)
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


def test_features_become_lists_for_spark_ml(corpus: Corpus) -> None:
    place = corpus.place
    rows = as_lists(place.table.rows(place.spark, corpus.done.index)).collect()
    expected = place.rows(corpus.done)
    assert {row["path"] for row in rows} == expected.keys()
    for row in rows:
        np.testing.assert_array_equal(np.array(row["features"], np.float32), expected[row["path"]])


def test_the_tasks_run_on_both_workers(corpus: Corpus) -> None:
    tracker = corpus.place.spark.sparkContext._jsc.sc().statusTracker()  # type: ignore[attr-defined]
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
    from_folder = place.rows(place.run(list_images(folder).images))
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

    found = outcomes(place.run(listing))
    assert found["a/0.jpg"][0] == READ
    assert "deleted" in str(found["a/0.jpg"][1])
    assert found["a/1.jpg"][0] == READ
    assert "replaced" in str(found["a/1.jpg"][1])
    assert [found[f"a/{n}.jpg"][0] for n in (2, 3)] == [None, None]

    again = place.run()
    assert (again.computed, again.reused, again.dropped) == (1, 2, 1)
    assert set(outcomes(again).values()) == {(None, None)}


def test_a_rerun_computes_what_is_new_changed_or_not_proven_and_drops_those_that_are_gone(
    place: Place,
) -> None:
    put(place, {f"a/{n}.jpg": jpeg(n) for n in range(6)})
    first = place.run()
    assert (first.computed, first.reused, first.dropped) == (6, 0, 0)
    assert nothing_to_compute(place.table, place.listed()) is not None

    place.images.delete("a/0.jpg")
    place.images.write("a/1.jpg", jpeg(20))
    put(place, {f"b/{n}.jpg": jpeg(10 + n) for n in range(3)})
    assert nothing_to_compute(place.table, place.listed()) is None
    second = place.run()
    assert (second.computed, second.reused, second.dropped) == (4, 4, 1)

    scratch = open_store(place.output.address / "scratch", place.reader.s3)
    place.table = FeatureTable(scratch, place.model)
    fresh = place.run()
    grown_rows = FeatureTable(place.output, place.model).rows(place.spark, second.index)
    grown = {row["path"]: row["features"] for row in grown_rows.toArrow().to_pylist()}
    for path, features in place.rows(fresh).items():
        np.testing.assert_array_equal(np.frombuffer(grown.pop(path), np.float32), features)
    assert not grown

    # A batch counts only once its commit is proven.
    (batch,) = place.table.committed_batches()
    proof = f"{place.table.root}/batches/{batch}/_SUCCESS"
    assert json.loads(scratch.read(proof) or b"{}")["committer"] == "magic"
    scratch.delete(proof)
    assert place.table.committed_batches() == []
    assert place.run().computed == 8


def test_a_table_of_another_model_is_refused(place: Place) -> None:
    place.table.open(lambda: place.flatbuffer)
    assert models_in(place.output) == [place.model]
    other = replace(place.model, weights_sha256="0" * 64)
    with pytest.raises(StateError, match="should hold features of"):
        FeatureTable(place.output, other).open(lambda: place.flatbuffer)
