"""Images that cannot be read: theirs is the fault only as long as others can be read.

What the tasks told is looked at before each commit, so that a bucket's policy, a role or a clock
that is wrong writes nothing into the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StorageError, UnreadableError
from pipeline.quarantine import BadImageError
from pipeline.reading import ImageReader

MOST, MOST_SHARE = 100, 0.01  # more than both end the run
KEPT = "What was computed before is kept. Run again to go on"


@dataclass
class ReadFailures:
    """The reads of a pass, over its commits.

    Attributes
    ----------
    most_share
        The share of the images read for the first time that may fail; `MOST` may in any case.
    read_before
        Gives paths of images that passes before could read.
    """

    reader: ImageReader
    most_share: float
    read_before: Callable[[], Iterable[str]]
    tried: int = 0
    failed: int = 0

    def check(self, answers: pa.Table) -> None:
        """Look at what the tasks of a commit told (WRITTEN), before it is made.

        Raises
        ------
        StorageError
            When S3 said what is wrong with the run.
        UnreadableError
            When too many images could not be read, or S3 refuses those, too, that it gave before.
        """
        if trouble := _first(answers, "trouble"):
            raise StorageError(f"{trouble} {KEPT}.")
        self.tried += pc.sum(answers["tried"]).as_py() or 0
        self.failed += pc.sum(answers["failed"]).as_py() or 0
        if self.failed > max(MOST, self.most_share * self.tried):
            raise UnreadableError(
                f"expected nearly all images below {self.reader.address} to be readable, found "
                f"{self.failed:,} of {self.tried:,} that are not, as {_first(answers, 'example')}. "
                f"Check credentials and bucket. {KEPT}; if these images are to be left out, with "
                "--max-unreadable 1."
            )
        refused = _first(answers, "refused")
        if refused and not self._is_any_readable(answers["good"].drop_null().to_pylist()):
            raise UnreadableError(
                f"expected S3 to give images below {self.reader.address}, found that it gives "
                f"none, as {refused}. Check the role's and the bucket's policy. {KEPT}."
            )

    def _is_any_readable(self, good: list[str]) -> bool:
        """Read again what could be read: if that is refused, too, no image is to blame."""
        read = self.reader.open()
        for path in good[:3] or self.read_before():
            try:
                read(path)
            except BadImageError:
                continue
            return True
        return False


def _first(answers: pa.Table, name: str) -> str | None:
    found = answers[name].drop_null()
    return found[0].as_py() if len(found) else None
