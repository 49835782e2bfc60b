"""Lists the images: path, label, length, modification time and version, without reading any.

The listing is streamed into Parquet files of bounded size: this machine holds one page of it at a
time. On the way a digest is made that needs neither order nor memory: it tells whether anything
has changed since another listing. Every key counts, also those that begin with `_` or `.`, which
Hadoop's listing would hide. The label is the name of the folder an image lies in.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import NoImagesError
from pipeline.listing.inventory import Inventory
from pipeline.listing.names import ENDINGS, LeftOut, kind_of, told_of
from pipeline.storage import Entry, Store

LISTING = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("modified", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("version", pa.string(), nullable=False),
    ]
)
# Of an archived image also in which storage class it lies: it is not asked for.
LISTED = pa.schema([*LISTING, pa.field("archive", pa.string())])

ROWS_PER_PART = 16_384  # about a megabyte
LABEL_RULE = "name of the folder, in NFC"


@dataclass(frozen=True)
class Listing:
    """The images below an address.

    Attributes
    ----------
    parts
        Parquet files of this machine (schema LISTED), with their rows.
    left_out
        How many other objects lie beside the images, by kind.
    digest
        The same for two listings exactly if they have the same images: path, length and version.
    sure_until
        An inventory may lack what was modified later, or have it as it was before; None: it is all
        as listed.
    """

    parts: tuple[tuple[Path, int], ...]
    left_out: Mapping[str, int]
    digest: str
    sure_until: datetime | None = None

    @property
    def ignored(self) -> int:
        """How many other objects lie beside the images."""
        return sum(self.left_out.values())

    @property
    def count(self) -> int:
        """How many images there are."""
        return sum(rows for _, rows in self.parts)


class Digest:
    """Count, and sum modulo 2^128 of a hash of each image: order does not matter.

    A set hash by addition (Bellare and Micciancio, "A new paradigm for collision-free hashing",
    1997), for changes that happen, not against ones that are made to collide.
    """

    def __init__(self, *decides: str) -> None:
        self.decides = decides
        self.count = 0
        self.sum = 0

    def add(self, path: str, length: int, version: str) -> None:
        """Count an image in."""
        row = f"{path}\0{length}\0{version}".encode("utf-8", "surrogatepass")
        hashed = hashlib.blake2b(row, digest_size=16).digest()
        self.sum = (self.sum + int.from_bytes(hashed, "big")) % (1 << 128)
        self.count += 1

    def __str__(self) -> str:
        all_of_it = json.dumps([*self.decides, self.count, self.sum])
        return hashlib.sha256(all_of_it.encode()).hexdigest()


def list_images(store: Store, folder: Path, inventory: Inventory | None = None) -> Listing:
    """List every image below the store's address into Parquet files in a folder.

    With an inventory nothing is listed: it tells what lies there.

    Raises
    ------
    NoImagesError
        When there is no image at all.
    StorageError
        When the address is missing, forbidden or unreachable.
    """
    digest = Digest(str(store.address), LABEL_RULE, *sorted(ENDINGS))
    parts: list[tuple[Path, int]] = []
    left_out = LeftOut()

    def images() -> Iterator[Entry]:
        for entry in store.list() if inventory is None else inventory.list(store.address):
            kind = kind_of(entry.key)
            if kind is None:
                digest.add(entry.key, entry.length, entry.version)
                yield entry
            else:
                left_out.add(kind)

    found = images()
    while some := tuple(islice(found, ROWS_PER_PART)):
        part = folder / f"listing-{len(parts):06d}.parquet"
        pq.write_table(_table_of(some), part, compression="zstd")
        parts.append((part, len(some)))
    if not parts:
        raise NoImagesError(
            f"expected images (.jpg, .png and the like) below {store.address}, found "
            f"{told_of(left_out.told()) or 'nothing'}; check the address, or upload some: "
            f"fruits upload FOLDER {store.address}"
        )
    return Listing(
        tuple(parts),
        left_out.told(),
        str(digest),
        None if inventory is None else inventory.sure_until,
    )


def _table_of(images: tuple[Entry, ...]) -> pa.Table:
    columns = [
        [image.key for image in images],
        [label_of(image.key) for image in images],
        [image.length for image in images],
        [image.modified for image in images],
        [image.version for image in images],
        [image.archive for image in images],
    ]
    arrays = [pa.array(c, field.type) for c, field in zip(columns, LISTED, strict=True)]
    return pa.table(arrays, schema=LISTED)


def is_image(key: str) -> bool:
    """Tell what may be an image by its name; what is inside shows when it is decoded."""
    return kind_of(key) is None


def label_of(key: str) -> str | None:
    """Return the name of the folder that holds the image, None at the root."""
    name = PurePosixPath(key).parent.name
    return unicodedata.normalize("NFC", name) or None
