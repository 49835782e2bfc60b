"""Forgets images: their rows, and every older file that held them; a receipt proves it."""

from __future__ import annotations

import hmac
import json
import secrets
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate

import pyarrow as pa
from pyspark.sql import SparkSession

from pipeline.errors import StateError
from pipeline.journal import now
from pipeline.plan import Touched
from pipeline.storage import BucketStore, Store
from pipeline.table.delta import Snapshot
from pipeline.table.feature_table import WRITTEN, FeatureTable
from pipeline.table.parts import Parts, for_each
from pipeline.task import Rewrite
from pipeline.upkeep import sweep_all


@dataclass(frozen=True)
class Receipt:
    """What was forgotten, without a name: whoever has the key can prove that an image was.

    Attributes
    ----------
    remains
        What the bucket still keeps, None if nothing.
    hashes
        HMAC-SHA256 of each path.
    key
        Theirs, in hex; it is told once and not kept.
    """

    forgotten: str
    images: int
    had_rows: int
    files_deleted: int
    states_deleted: int
    remains: str | None
    hashes: tuple[str, ...]
    key: str = ""


def remove_rows(
    spark: SparkSession, table: FeatureTable, images: Store, paths: Sequence[str], work: Parts
) -> int:
    """Remove images from the table; return how many of them had a row.

    The files that held them are written again without them and the moments corrected; what holds
    them still, in files and states of older versions, `erase` deletes.

    Raises
    ------
    StateError
        When an image still lies where it was listed: the next run would take it in again.
    """
    for path in paths:
        if any(entry.key == path for entry in images.list(path)):
            raise StateError(
                f"expected {images.address}/{path} to be deleted before it is forgotten, found "
                "it there: the next run would take it in again. Delete it, then run this again."
            )
    snapshot = table.newest()
    known = table.known(snapshot)
    if known is None:
        raise StateError("what is known of the table's rows is lost. Run fruits run first.")
    gone, made = frozenset(paths), snapshot
    touched = _rows_of(spark, table, snapshot, gone, work)
    if touched:
        rewrite = Rewrite(table.parts, work, [], uuid.uuid4().hex, table.model.dimensions)
        told = for_each(spark, touched, rewrite, WRITTEN).toArrow().cast(WRITTEN)
        made, _ = table.commit(snapshot, known, told)
    table.carry_pass(snapshot, made, without=gone)
    return sum(one.gone for one in touched)


def _rows_of(
    spark: SparkSession, table: FeatureTable, snapshot: Snapshot, paths: frozenset[str], work: Parts
) -> list[Touched]:
    """Return the files that hold rows of images, whose paths are written down beside them."""
    parts = table.parts

    def find(files: Iterator[str]) -> Iterator[pa.RecordBatch]:
        for file in files:
            rows = (path for b in parts.read(file, ["path"]) for path in b.column(0).to_pylist())
            found = [path for path in rows if path in paths]
            yield pa.RecordBatch.from_pydict({"file": [file] * len(found), "path": found}, schema)

    schema = pa.schema([("file", pa.string()), ("path", pa.string())])
    found = for_each(spark, list(snapshot.files), find, schema).collect()
    rows = sorted((row["file"], row["path"]) for row in found)
    work.write("forget.parquet", pa.table({"path": pa.array([p for _, p in rows], pa.string())}))
    counts = Counter(file for file, _ in rows)
    starts = accumulate(counts.values(), initial=0)
    return [
        Touched(file, "forget.parquet", start, 0, count)
        for (file, count), start in zip(counts.items(), starts, strict=False)
    ]


def erase(table: FeatureTable, paths: Sequence[str], had_rows: int, name: str) -> Receipt:
    """Delete every file that may still name images, and leave a receipt beside the table.

    Parameters
    ----------
    name
        The receipt's, without .json.
    """
    swept = sweep_all(table)
    key, unique, output = secrets.token_bytes(32), set(paths), table.output
    receipt = Receipt(
        forgotten=now(),
        images=len(unique),
        had_rows=had_rows,
        files_deleted=swept.files,
        states_deleted=swept.states,
        remains=output.old_versions() if isinstance(output, BucketStore) else None,
        hashes=tuple(sorted(hmac.digest(key, path.encode(), "sha256").hex() for path in unique)),
    )
    content = json.dumps(asdict(receipt), indent=2).encode()
    output.write(f"{table.root}/forgotten/{name}.json", content)
    return replace(receipt, key=key.hex())
