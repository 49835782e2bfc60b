"""What a result keeps for people to look at.

    report-data/scores.parquet     images as points: path, label, pc_1, pc_2; a sample of very many
    report-data/pictures.parquet   label and a small JPEG, a few of each label
    report-data/farthest.parquet   path, label, distance and a small JPEG of added images that are
                                   unlike the rest, where there are any

Report and slides are drawn from them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StateError
from pipeline.storage import Store

SCORES, PICTURES = "report-data/scores.parquet", "report-data/pictures.parquet"
FARTHEST = "report-data/farthest.parquet"
PICTURE = pa.schema([("label", pa.string()), ("jpeg", pa.binary())])
FAR_PICTURE = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("distance", pa.float64()),
        ("jpeg", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Samples:
    """Scores of images, and pictures.

    Attributes
    ----------
    scores
        path, label (null where there is none), pc_1 and, of more than one component, pc_2.
    pictures
        JPEGs by label; those of images without a label under "".
    farthest
        Added images that are farthest from the others of their label (FAR_PICTURE).
    """

    scores: pa.Table
    pictures: dict[str, list[bytes]]
    farthest: pa.Table = field(default_factory=FAR_PICTURE.empty_table)

    def write(self, store: Store, prefix: str = "") -> None:
        """Write both files below a prefix of a store."""
        rows = [
            {"label": label, "jpeg": jpeg}
            for label, jpegs in self.pictures.items()
            for jpeg in jpegs
        ]
        pictures = pa.Table.from_pylist(rows, PICTURE)
        kept = {SCORES: self.scores, PICTURES: pictures}
        if self.farthest.num_rows:
            kept[FARTHEST] = self.farthest
        for name, table in kept.items():
            content = io.BytesIO()
            pq.write_table(table, content)
            store.write(f"{prefix}{name}", content.getvalue())

    @classmethod
    def read(cls, store: Store) -> Samples:
        """Read those of a result.

        Raises
        ------
        StateError
            When it has none.
        """
        parts = (io.BytesIO(read_part(store, name)) for name in (SCORES, PICTURES))
        scores, kept = map(pq.read_table, parts)
        pictures: dict[str, list[bytes]] = {}
        for row in kept.to_pylist():
            pictures.setdefault(row["label"], []).append(row["jpeg"])
        return cls(scores, pictures)


def read_part(store: Store, name: str) -> bytes:
    """Return the content of a small file of a result.

    Raises
    ------
    StateError
        When there is none.
    """
    content = store.read(name)
    if content is None:
        raise StateError(
            f"expected {name} beside run.json in {store.address}, found none. Run the job again."
        )
    return content
