"""Reads the bytes of images as they were listed, many ahead of who takes them.

For S3 it is one GET per image by obstore (a Rust client that runs outside Python's lock, with
retries of its own): S3A would open images one after the other, a round trip at a time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.networks.cost import MAX_BYTES
from pipeline.quarantine import BadImageError, Reason
from pipeline.s3.access import S3Settings, located
from pipeline.s3.codes import answer_in, explained, reason_of
from pipeline.storage import Address, s3_client

# Images are read in bursts, one ahead of the network: single GETs wake threads on both sides for
# each image, which costs up to 2 ms of a core. A burst takes 50 ms, the network 300 ms for it.
GETS_AT_ONCE = 32
BYTES_AT_ONCE = 24_000_000  # keeps a Python worker small when the images are large
# Links in a circle, a bad sector, a socket, a name that is too long.
OF_THE_FILE = {errno.ELOOP, errno.EIO, errno.ENXIO, errno.ENAMETOOLONG}
LONGEST_MESSAGE = 200  # characters of S3's own words that are kept

Row = dict[str, Any]
Outcome = bytes | BadImageError


@dataclass(frozen=True)
class ImageReader:
    """Reads image bytes inside a Spark task: picklable, opened once per Python process."""

    address: Address
    s3: S3Settings

    def __post_init__(self) -> None:
        """Find the bucket's region here: a task has no boto3 to ask."""
        object.__setattr__(self, "s3", located(self.address.bucket, self.s3))

    def open(self) -> Callable[[str], tuple[bytes, str]]:
        """Return a thread-safe function from key to (bytes, version).

        It raises BadImageError for an image that is not given for a reason of its own,
        StorageError for what is wrong with the run (credentials, clock, region, bucket), OSError
        when S3 does not answer.
        """
        return self._open_folder() if self.address.bucket is None else self._open_bucket()

    def _open_folder(self) -> Callable[[str], tuple[bytes, str]]:
        folder = Path(self.address.path)

        def read(key: str) -> tuple[bytes, str]:
            try:
                with open(folder / key, "rb", opener=_at_once) as file:
                    return file.read(), str(os.fstat(file.fileno()).st_mtime_ns)
            except (FileNotFoundError, NotADirectoryError) as error:
                if not folder.is_dir():
                    raise StorageError(
                        f"expected a folder at {folder}, found none; is a disk gone?"
                    ) from error
                if (folder / key).is_symlink():
                    raise BadImageError(Reason.UNREADABLE, "a link to nothing") from error
                raise BadImageError(Reason.VANISHED, "deleted since it was listed") from error
            except IsADirectoryError as error:
                raise BadImageError(Reason.UNREADABLE, "a folder, not a file") from error
            except PermissionError as error:
                raise BadImageError(Reason.DENIED, str(error.strerror)) from error
            except OSError as error:
                if error.errno in OF_THE_FILE:
                    raise BadImageError(Reason.UNREADABLE, str(error.strerror)) from error
                raise

        return read

    def _open_bucket(self) -> Callable[[str], tuple[bytes, str]]:
        from obstore.exceptions import BaseError, InvalidPathError

        store = s3_client(self.address, self.s3)

        def read(key: str) -> tuple[bytes, str]:
            if key.startswith("/") or key.endswith("/"):  # obstore asks for another key then
                raise BadImageError(Reason.BAD_NAME, "S3's clients do not take its slashes")
            try:
                found = store.get(key)
                content = bytes(found.bytes())
            except (InvalidPathError, ValueError) as error:
                told = f"S3's clients do not take it ({_first_line(error)})"
                raise BadImageError(Reason.BAD_NAME, told) from error
            except (BaseError, FileNotFoundError) as error:
                raise self._trouble(key, error) from error
            return content, (found.meta["e_tag"] or "").strip('"')

        return read

    def _trouble(self, key: str, error: Exception) -> Exception:
        """Return what an error of obstore means: the image's, the run's, or the network's."""
        answer = answer_in(str(error))
        if answer is None:
            return OSError(f"{self.address}/{key}: {_first_line(error)}")
        code, message = answer
        reason = reason_of(code, message)
        if reason is None:
            return StorageError(f"{self.address}: S3 answered {code}: {explained(code, message)}.")
        if reason is Reason.VANISHED:
            return BadImageError(reason, "deleted since it was listed")
        more = f" ({message[:LONGEST_MESSAGE]})" if message else ""
        return BadImageError(reason, f"S3 answered {code}{more}")


def read_listed(read: Callable[[str], tuple[bytes, str]]) -> Callable[[Row], Outcome]:
    """Return a function that reads an image as it was listed: its bytes, or why there are none.

    What is wrong with the run, or an S3 that does not answer, is not the image's fault: these
    errors are raised.
    """

    def read_row(row: Row) -> Outcome:
        told = told_by_listing(row)
        if told is not None:
            return told
        try:
            content, version = read(row["path"])
        except BadImageError as error:
            return error
        if version != row["version"]:
            later = "since it was listed; the next run takes the new one"
            return BadImageError(Reason.REPLACED, later)
        return content

    return read_row


def told_by_listing(row: Row) -> BadImageError | None:
    """Return why an image need not be asked for, None where it has to be.

    An archived one is asked for when it is tried again: it may be restored for a while.
    """
    if row["length"] > MAX_BYTES:
        return BadImageError(
            Reason.TOO_LARGE,
            f"{row['length']:,} bytes are more than the {MAX_BYTES:,} that are read",
        )
    if row.get("archive") and row.get("known_reason") is None:
        return BadImageError(Reason.ARCHIVED, f"its storage class is {row['archive']}")
    return None


def read_ahead(rows: Sequence[Row], read: Callable[[Row], Outcome]) -> Iterator[Outcome]:
    """Yield what `read` gives for each row, in order; the next burst is read meanwhile."""
    with ThreadPoolExecutor(GETS_AT_ONCE) as pool:
        bursts = ([pool.submit(read, row) for row in burst] for burst in _bursts(rows))
        coming = next(bursts, [])
        while coming:
            current, coming = coming, next(bursts, [])
            while current:
                yield current.pop(0).result()


def _bursts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Cut rows into runs that are read at once, bounded in number and in bytes."""
    burst: list[Row] = []
    size = 0
    for row in rows:
        size += row["length"]
        if burst and (len(burst) == GETS_AT_ONCE or size > BYTES_AT_ONCE):
            yield burst
            burst, size = [], row["length"]
        burst.append(row)
    if burst:
        yield burst


def _at_once(path: str, flags: int) -> int:
    """Open what may have become a pipe since it was listed: to open one waits for who writes."""
    opened = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(opened).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(opened)
        raise OSError(errno.ENXIO, "a pipe, a socket or a device, not a file")
    return opened


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
