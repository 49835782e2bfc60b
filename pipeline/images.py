"""Lists the images: path, label, length, modification time and version, without reading any.

The label is the name of the folder an image lies in. Every key counts, also those that begin with
`_` or `.`, which Hadoop's listing would hide. One page of S3's listing holds 1,000 keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline.errors import NoImagesError
from pipeline.storage import Store

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

LISTING = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("modified", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("version", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Listing:
    """The images below an address, sorted by path, and how many other objects lie beside them."""

    images: pa.Table
    ignored: int


def list_images(store: Store) -> Listing:
    """List every image below the store's address.

    Returns
    -------
    Listing
        `images` has the schema LISTING; `path` is relative to the address, `label` is null for
        an image that lies in no folder.

    Raises
    ------
    NoImagesError
        When there is no image at all.
    StorageError
        When the address is missing, forbidden or unreachable.
    """
    entries = list(store.list())
    images = sorted(
        (entry for entry in entries if is_image(entry.key)), key=lambda entry: entry.key
    )
    if not images:
        raise NoImagesError(
            f"expected images ({', '.join(sorted(IMAGE_ENDINGS))}) below {store.address}, found "
            f"{len(entries)} other objects; check the address, or upload some: "
            f"fruits upload FOLDER {store.address}"
        )
    columns = [
        [entry.key for entry in images],
        [label_of(entry.key) for entry in images],
        [entry.length for entry in images],
        [entry.modified for entry in images],
        [entry.version for entry in images],
    ]
    return Listing(
        pa.table(
            [pa.array(c, field.type) for c, field in zip(columns, LISTING, strict=True)],
            schema=LISTING,
        ),
        ignored=len(entries) - len(images),
    )


def is_image(key: str) -> bool:
    """Tell an image by the ending of its name; what is inside shows when it is decoded."""
    return PurePosixPath(key).suffix.lower() in IMAGE_ENDINGS


def label_of(key: str) -> str | None:
    """Return the name of the folder that holds the image, None at the root."""
    return PurePosixPath(key).parent.name or None
