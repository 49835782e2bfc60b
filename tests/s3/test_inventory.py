"""An S3 Inventory in the place of a listing, as S3 writes it."""

from __future__ import annotations

import hashlib
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InventoryError
from pipeline.listing.images import list_images
from pipeline.listing.inventory import open_inventory
from pipeline.storage import Address, BucketStore, open_store

CREATED = datetime(2026, 3, 2, 1, 0, tzinfo=UTC)
FIELDS = {
    "bucket": pa.string(),
    "key": pa.string(),
    "version_id": pa.string(),
    "is_latest": pa.bool_(),
    "is_delete_marker": pa.bool_(),
    "size": pa.int64(),
    "last_modified_date": pa.timestamp("ms"),
    "e_tag": pa.string(),
}


def row(key: str, **others: Any) -> dict[str, Any]:
    usual = {
        "bucket": "photos", "key": key, "version_id": "", "is_latest": True, "size": 5,
        "is_delete_marker": False, "last_modified_date": CREATED - timedelta(days=9), "e_tag": "a1",
    }  # fmt: skip
    return usual | others


def put_inventory(
    bucket: BucketStore, *files: list[dict[str, Any]], without: str = "", **told: Any
) -> Address:
    """Put an inventory as S3 does, and return its manifest's address."""
    schema = pa.schema([field for field in FIELDS.items() if field[0] != without])
    named = []
    for number, rows in enumerate(files):
        content = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), content)
        key = f"inv/photos/all/data/{number}.parquet"
        bucket.write(key, content.getvalue())
        md5 = hashlib.md5(content.getvalue(), usedforsecurity=False).hexdigest()
        named.append({"key": key, "size": content.tell(), "MD5checksum": md5})
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": f"arn:aws:s3:::{bucket.bucket}",
        "version": "2016-11-30",
        "creationTimestamp": str(int(CREATED.timestamp() * 1000)),
        "fileFormat": "Parquet",
        "fileSchema": "message s3.inventory { ... }",
        "files": named,
    } | told
    key = "inv/photos/all/2026-03-02T01-00Z/manifest.json"
    bucket.write(key, json.dumps(manifest).encode())
    return Address(bucket.bucket, key)


def test_an_inventory_is_a_listing_of_what_is_newest_and_not_deleted(
    bucket: BucketStore, tmp_path: Path
) -> None:
    address = put_inventory(
        bucket,
        [row("images/Kiwi/1.jpg"), row("images/Kiwi/2.jpg", is_latest=False), row("other/3.jpg")],
        [
            row("images/Kiwi/4.jpg", is_delete_marker=True, e_tag=None, size=None),
            row("images/a//b.jpg", e_tag='"b2"', size=7),
            row("images/Kiwi/", size=0),
            row("images/notes.txt"),
        ],
    )
    images = open_store(Address("photos", "images"), bucket.s3)
    listing = list_images(images, tmp_path, open_inventory(address, bucket.s3))
    rows = pq.read_table(tmp_path).to_pylist()
    assert [(r["path"], r["label"], r["length"], r["version"]) for r in rows] == [
        ("Kiwi/1.jpg", "Kiwi", 5, "a1"),
        ("a//b.jpg", "a", 7, "b2"),
    ]
    assert rows[0]["modified"] == CREATED - timedelta(days=9)
    assert (listing.count, listing.ignored) == (2, 1)
    assert listing.sure_until == CREATED - timedelta(hours=48)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"fileFormat": "CSV"}, "in Parquet, found CSV. Choose Apache Parquet"),
        ({"without": "e_tag"}, "found one without ETag. Add it to the inventory's fields"),
        ({"sourceBucket": "others"}, "found one of others"),
        ({"files": None}, "found something else"),
        ({"files": [{"key": "inv/gone", "MD5checksum": "0" * 32}]}, "found none. Take the next"),
    ],
)
def test_what_cannot_be_a_listing_is_refused_with_its_remedy(
    bucket: BucketStore, tmp_path: Path, changed: dict[str, Any], complaint: str
) -> None:
    address = put_inventory(bucket, [row("images/1.jpg")], **changed)
    images = open_store(Address("photos", "images"), bucket.s3)
    with pytest.raises(InventoryError) as told:
        list_images(images, tmp_path, open_inventory(address, bucket.s3))
    assert complaint in str(told.value)


def test_a_damaged_file_is_not_believed(bucket: BucketStore, tmp_path: Path) -> None:
    address = put_inventory(bucket, [row("images/1.jpg")])
    key = "inv/photos/all/data/0.parquet"
    bucket.write(key, (bucket.read(key) or b"") + b"x")
    images = open_store(Address("photos", "images"), bucket.s3)
    with pytest.raises(InventoryError, match="with the MD5"):
        list_images(images, tmp_path, open_inventory(address, bucket.s3))


def test_no_manifest_is_told(bucket: BucketStore) -> None:
    with pytest.raises(InventoryError, match="found none"):
        open_inventory(bucket.address / "inv/manifest.json", bucket.s3)
