"""Addresses that cannot be used: each gives one clear error, from a real S3 server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from pipeline.errors import NoImagesError, StorageError
from pipeline.listing.images import list_images
from pipeline.local.loopback import Loopback
from pipeline.local.ports import free_ports
from pipeline.quarantine import BadImageError
from pipeline.reading import ImageReader
from pipeline.s3.access import S3Settings
from pipeline.s3.pages import pages_of
from pipeline.storage import Address, BucketStore, open_store
from pipeline.upload import upload
from tests.corpus import encoded, good_images, picture


def nobody() -> str:
    """An address at which nothing listens."""
    (port,) = free_ports("127.0.0.1", 1)
    return f"http://127.0.0.1:{port}"


def test_a_bucket_that_is_missing_is_named(cluster: Loopback, tmp_path: Path) -> None:
    store = BucketStore(Address("no-such-bucket", "images"), cluster.s3)
    with pytest.raises(StorageError, match=r"no-such-bucket.*does not exist.*create it"):
        list_images(store, tmp_path)


def test_an_empty_prefix_says_how_to_fill_it(bucket: BucketStore, tmp_path: Path) -> None:
    bucket.write("elsewhere/readme.txt", b"no image")
    for prefix in ("nothing-here", "elsewhere"):
        with pytest.raises(NoImagesError, match="fruits upload"):
            list_images(open_store(bucket.address / prefix, bucket.s3), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"access_key": "UNKNOWNKEY"}, "access key"), ({"secret_key": "wrong"}, "secret key")],
)
def test_wrong_credentials_are_told_apart(
    cluster: Loopback, bucket: BucketStore, tmp_path: Path, wrong: dict[str, str], word: str
) -> None:
    store = BucketStore(bucket.address, replace(cluster.s3, **wrong))
    with pytest.raises(StorageError, match=word):
        list_images(store, tmp_path)


def test_an_endpoint_that_is_down_is_named(bucket: BucketStore, tmp_path: Path) -> None:
    down = replace(bucket.s3, endpoint=nobody())
    with pytest.raises(StorageError, match=r"127\.0\.0\.1.*Check the endpoint"):
        list_images(BucketStore(bucket.address, down), tmp_path)
    with pytest.raises(StorageError, match="Run again"):
        BucketStore(bucket.address, down).upload("a.jpg", Path(__file__))


def test_every_name_that_s3_allows_can_be_listed_and_read(
    bucket: BucketStore, tmp_path: Path
) -> None:
    images = good_images()
    for key, content in images.items():
        bucket.write(f"images/{key}", content)
    store = open_store(bucket.address / "images", bucket.s3)
    list_images(store, tmp_path)
    listing = pq.read_table(tmp_path).to_pylist()
    assert {row["path"] for row in listing} == images.keys()
    read = ImageReader(store.address, bucket.s3).open()
    for row in listing:
        assert read(row["path"]) == (images[row["path"]], row["version"])


def test_many_pages_of_odd_keys_side_by_side_are_those_of_boto3(bucket: BucketStore) -> None:
    folders = ("Kiwi", "Kiwi 2", "Kiwi-3", "a//b", "é", "deep/er/still", "%41+")
    odd = ["loose.jpg", "/first.jpg", "x/", "a/b.jpg", "tab\t.jpg", "<&>.jpg"]
    keys = [*odd, *(f"{folder}/{number}.jpg" for folder in folders for number in range(15))]
    theirs = boto3.client(
        "s3",
        endpoint_url=bucket.s3.endpoint,
        region_name=bucket.s3.region,
        aws_access_key_id=bucket.s3.access_key,
        aws_secret_access_key=bucket.s3.secret_key,
    )
    with ThreadPoolExecutor(8) as pool:
        put = partial(theirs.put_object, Bucket=bucket.bucket, Body=b"x")
        list(pool.map(lambda key: put(Key=key), keys))
    expected = {
        (one["Key"], one["Size"], one["ETag"].strip('"'))
        for page in theirs.get_paginator("list_objects_v2").paginate(Bucket=bucket.bucket)
        for one in page["Contents"]
    }
    pages = list(pages_of(bucket.client, str(bucket.bucket), "", at_once=4, size=10))
    found = [(key, length, tag) for page in pages for key, length, _, tag, _ in page.objects()]
    assert len(pages) > 10
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_an_image_that_is_gone_or_whose_key_cannot_be_asked_for_raises_what_the_pass_expects(
    bucket: BucketStore,
) -> None:
    read = ImageReader(bucket.address, bucket.s3).open()
    with pytest.raises(BadImageError, match="vanished: deleted since"):
        read("gone.jpg")
    with pytest.raises(BadImageError, match="bad name: S3's clients do not take it"):
        read("line\nbreak.jpg")


def test_an_s3_that_does_not_answer_is_not_blamed_on_the_image(bucket: BucketStore) -> None:
    down = replace(bucket.s3, endpoint=nobody())
    with pytest.raises(OSError, match=r"127\.0\.0\.1|connect"):
        ImageReader(bucket.address, down).open()("a.jpg")


def test_objects_are_copied_and_go(bucket: BucketStore) -> None:
    for key in ("a/1", "a/2", "ab/3"):
        bucket.write(key, key.encode())
    bucket.copy("a/1", "c/é 1")
    bucket.delete("a")
    assert {entry.key for entry in bucket.list()} == {"ab/3", "c/é 1"}
    assert bucket.read("c/é 1") == b"a/1"
    assert bucket.read("a/1") is None


def test_an_upload_sends_what_is_missing_or_newer_and_skips_the_rest(
    bucket: BucketStore, fruit_pictures: Path
) -> None:
    source = open_store(Address.parse(str(fruit_pictures)), S3Settings())
    told: list[tuple[int, int]] = []
    first = upload(source, bucket, lambda done, total: told.append((done, total)))
    assert (first.sent, first.skipped) == (48, 0)
    assert told[-1] == (48, 48)
    again = upload(source, bucket)
    assert (again.sent, again.skipped) == (0, 48)

    name = next(bucket.list()).key
    bucket.delete(name)
    assert upload(source, bucket).sent == 1
    assert bucket.read(name) == source.read(name)


def test_the_s3_server_answers_to_its_keys_only_and_listens_on_loopback(
    cluster: Loopback, bucket: BucketStore
) -> None:
    nobody = BucketStore(bucket.address, replace(cluster.s3, access_key="X" * 20))
    with pytest.raises(StorageError):
        nobody.write("a", b"b")
    settings = cluster.conf / "spark-defaults.conf"
    assert settings.stat().st_mode & 0o077 == 0
    assert cluster.conf.stat().st_mode & 0o077 == 0
    identities = json.loads((cluster.conf.parent / "s3" / "identities.json").read_text())
    assert len(identities["identities"]) == 1


def test_a_picture_survives_the_way_to_s3_and_back(bucket: BucketStore) -> None:
    content = encoded(picture(300, 200), "PNG")
    bucket.write("x/y.png", content)
    (entry,) = bucket.list("x/")
    assert (entry.length, bucket.read(entry.key)) == (len(content), content)
