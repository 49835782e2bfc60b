"""Reads an S3 Inventory in the place of a listing: S3 writes it daily, nothing is listed for it.

Format: "Amazon S3 Inventory list", Amazon S3 User Guide: a `manifest.json` names Parquet files with
their MD5, and what columns they have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InventoryError
from pipeline.s3.access import S3Settings
from pipeline.s3.codes import ARCHIVES
from pipeline.storage import Address, Entry, open_store

COLUMNS = {
    "size": "Size",
    "last_modified_date": "Last modified date",
    "e_tag": "ETag",
}  # by the name that S3's console has for them
ARCHIVE_TIERS = {"ARCHIVE", "DEEP_ARCHIVE", "ARCHIVE_ACCESS", "DEEP_ARCHIVE_ACCESS"}
ARCHIVE_COLUMNS = ("storage_class", "intelligent_tiering_access_tier")  # told where they are there
# S3 fills an inventory over hours, and says that it is right for what came two days before.
UNSURE = timedelta(hours=48)


@dataclass(frozen=True)
class Inventory:
    """The objects of a bucket as an inventory has them.

    Attributes
    ----------
    bucket
        What it lists.
    created
        When S3 began to write it.
    files
        Key and MD5 of each of its Parquet files.
    """

    address: Address
    s3: S3Settings
    bucket: str
    created: datetime
    files: tuple[dict[str, Any], ...]

    @property
    def sure_until(self) -> datetime:
        """What was modified later may be missing in it, or be there as it was before."""
        return self.created - UNSURE

    def list(self, images: Address) -> Iterator[Entry]:
        """Yield what lies below an address: newest versions only, and nothing deleted.

        Raises
        ------
        InventoryError
            When it is of another bucket, or one of its files is damaged or lacks a column.
        """
        if images.bucket != self.bucket:
            raise InventoryError(
                f"expected an inventory of the bucket of {images}, found one of {self.bucket}."
            )
        root = f"{images.path}/" if images.path else ""
        for file in self.files:
            for row in self._rows(file):
                key, is_marker = row["key"], row["key"].endswith("/") and not row["size"]
                is_gone = row.get("is_latest") is False or row.get("is_delete_marker")
                if key.startswith(root) and not is_marker and not is_gone:
                    yield Entry(
                        key.removeprefix(root),
                        row["size"],
                        _time_of(row["last_modified_date"]),
                        row["e_tag"].strip('"'),
                        _archive_of(row),
                    )

    def _rows(self, file: dict[str, Any]) -> Iterator[dict[str, Any]]:
        content = open_store(Address(self.address.bucket, ""), self.s3).read(file["key"])
        found = None if content is None else hashlib.md5(content, usedforsecurity=False).hexdigest()
        if content is None or found != file["MD5checksum"]:
            raise InventoryError(
                f"expected s3a://{self.address.bucket}/{file['key']} with the MD5 "
                f"{file['MD5checksum']} that {self.address} names, found {found or 'none'}. Take "
                "the next day's inventory."
            )
        table = pq.ParquetFile(pa.BufferReader(content))
        lacking = [title for name, title in COLUMNS.items() if name not in table.schema.names]
        if lacking:
            raise InventoryError(
                f"expected an inventory with {', '.join(COLUMNS.values())}, found one without "
                f"{', '.join(lacking)}. Add it to the inventory's fields, and take the next day's."
            )
        wanted = ["key", *COLUMNS, "is_latest", "is_delete_marker", *ARCHIVE_COLUMNS]
        columns = [name for name in wanted if name in table.schema.names]
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


def open_inventory(address: Address, s3: S3Settings) -> Inventory:
    """Read an inventory's manifest.

    Raises
    ------
    InventoryError
        When it is not one, is not in Parquet, or lacks a column.
    """
    if address.bucket is None:
        raise InventoryError(f"expected s3a://bucket/.../manifest.json, found {address}.")
    place, _, name = address.path.rpartition("/")
    content = open_store(Address(address.bucket, place), s3).read(name)
    if content is None:
        raise InventoryError(f"expected an inventory's manifest.json at {address}, found none.")
    try:
        told = json.loads(content)
        created = datetime.fromtimestamp(int(told["creationTimestamp"]) / 1000, UTC)
        files = tuple({"key": f["key"], "MD5checksum": f["MD5checksum"]} for f in told["files"])
        form, bucket = told["fileFormat"], told["sourceBucket"]
    except (ValueError, KeyError, TypeError) as error:
        raise InventoryError(
            f"expected an S3 Inventory's manifest.json at {address}, found something else "
            f"({error!r})."
        ) from error
    if form != "Parquet":
        raise InventoryError(
            f"expected an inventory in Parquet, found {form}. Choose Apache Parquet as its output "
            "format, and take the next day's."
        )
    return Inventory(address, s3, bucket, created, files)


def _archive_of(row: dict[str, Any]) -> str | None:
    """Return where an archived object lies, as far as the inventory has been asked for it."""
    tier = row.get(ARCHIVE_COLUMNS[1])
    if tier in ARCHIVE_TIERS:  # not ARCHIVE_INSTANT_ACCESS
        return f"INTELLIGENT_TIERING, {tier}"
    kept_in = row.get(ARCHIVE_COLUMNS[0])
    return kept_in if kept_in in ARCHIVES else None


def _time_of(value: datetime | int) -> datetime:
    """Return when an object was modified; older inventories have milliseconds without a type."""
    if isinstance(value, int):
        return datetime.fromtimestamp(value / 1000, UTC)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value
