"""Where things are: an address (`s3a://bucket/prefix` or a folder) and a store that holds it.

Tables are read and written by Spark through S3A. This module is for the rest: listing images,
small files beside the tables, and the images' own bytes. Hadoop's view of S3 hides names that begin
with `_` or `.` and cannot express some others; S3's own clients show every key as it is.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import OutputTakenError, StorageError
from pipeline.s3.access import S3Settings, boto3_client, located, obstore_client
from pipeline.s3.codes import explained

if TYPE_CHECKING:
    from obstore.store import S3Store


JOINED_HERE = 64_000_000  # bytes; less than this is joined by one read and one write
TAKEN = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
SMALLEST_PART = 8 << 20  # bytes; S3 takes no smaller part than 5 MiB, but for the last


TEMPORARY = ".write-"  # how the name of a file begins that is being written
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


@dataclass(frozen=True)
class Address:
    """A place below which keys lie: a prefix of a bucket, or a folder when `bucket` is None."""

    bucket: str | None
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `s3a://bucket/prefix`, `s3://bucket/prefix` or a folder's path."""
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(None, str(Path(text).expanduser().resolve()))
        if scheme == "file" and rest.startswith("/"):
            return cls(None, rest)
        bucket, _, prefix = rest.partition("/")
        if scheme not in ("s3a", "s3") or not bucket:
            raise StorageError(
                f"expected s3a://bucket/prefix or a folder, found {text!r}; correct the address."
            )
        return cls(bucket, prefix.strip("/"))

    def __truediv__(self, key: str) -> Address:
        return Address(self.bucket, f"{self.path}/{key}" if self.path else key)

    def __str__(self) -> str:
        return self.path if self.bucket is None else f"s3a://{self.bucket}/{self.path}".rstrip("/")

    @property
    def uri(self) -> str:
        """The address as Spark wants it."""
        # Not Path.as_uri(): Hadoop takes %20 for the name's own characters, not for a space.
        return f"file://{self.path}" if self.bucket is None else str(self)

    def holds(self, other: Address) -> bool:
        """Tell whether `other` is this address or lies below it."""
        path = self.path.rstrip("/")
        return self.bucket == other.bucket and f"{other.path}/".startswith(
            f"{path}/" if path else ""
        )


@dataclass(frozen=True)
class Entry:
    """One object: `version` changes whenever its content does (S3: the ETag).

    `archive` is the storage class of one that S3 gives only after a restore, else None.
    """

    key: str
    length: int
    modified: datetime
    version: str
    archive: str | None = None


class Store(Protocol):
    """The small set of operations on keys below an address."""

    address: Address

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object whose key begins with `prefix`, hidden names included."""

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, None if there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Write an object whole or not at all."""

    def upload(self, key: str, file: Path) -> None:
        """Write a file as an object, whole or not at all."""

    def write_new(self, key: str, content: bytes) -> bool:
        """Write an object that is not there yet, else return False: of several, one is first."""

    def copy(self, source: str, target: str) -> None:
        """Copy an object; a reader sees the old object there or the new one."""

    def join(self, parts: Sequence[tuple[str, int]], target: str) -> None:
        """Make one object of several, given with their bytes, in this order; they stay."""

    def delete(self, prefix: str) -> None:
        """Remove the object `prefix` and every object below `prefix/`."""

    def delete_keys(self, keys: Iterable[str]) -> None:
        """Remove objects."""


def open_store(address: Address, s3: S3Settings, *, follows_links: bool = False) -> Store:
    """Return the store of an address; nothing is asked of it yet.

    With `follows_links`, folders that are links belong to a folder's listing.
    """
    if address.bucket is None:
        return FolderStore(address, follows_links=follows_links)
    return BucketStore(address, s3)


class FolderStore:
    """A folder of this machine."""

    def __init__(self, address: Address, *, follows_links: bool = False) -> None:
        self.address = address
        self.folder = Path(address.path)
        self.follows_links = follows_links

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every file below the folder; a missing folder is an error at the root only."""
        if not prefix and not self.folder.is_dir():
            raise StorageError(f"expected a folder at {self.folder}, found none; check the path.")
        top, _, beginning = prefix.rpartition("/")
        if not (self.folder / top).is_dir():
            return
        walk = os.walk(self.folder / top, onerror=_raise_readable, followlinks=self.follows_links)
        for parent, folders, files in walk:
            if self.follows_links:
                folders[:] = [name for name in folders if not _leads_back(Path(parent), name)]
            if parent == str(self.folder / top):
                folders[:] = [name for name in folders if name.startswith(beginning)]
                files = [name for name in files if name.startswith(beginning)]
            folders.sort()
            for name in sorted(files):
                file = Path(parent) / name
                key = str(file.relative_to(self.folder))
                with _readable_os_errors(self.address / key):
                    status = _status(file)
                if status is None or not _is_listed(status):
                    continue
                yield Entry(
                    _utf8(key, file),
                    status.st_size,
                    datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, UTC),
                    str(status.st_mtime_ns),
                )

    def read(self, key: str) -> bytes | None:
        """Return a file's bytes, None if there is none."""
        with _readable_os_errors(self.address / key):
            try:
                return (self.folder / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, key: str, content: bytes) -> None:
        """Write beside the target, then rename."""
        self._write(key, lambda temporary: temporary.write_bytes(content))

    def upload(self, key: str, file: Path) -> None:
        """Copy a file in, keeping its modification time."""
        self._write(key, lambda temporary: shutil.copy2(file, temporary))

    def _write(self, key: str, fill: Callable[[Path], object]) -> None:
        with self._filled(key, fill) as temporary:
            temporary.replace(self.folder / key)

    def write_new(self, key: str, content: bytes) -> bool:
        """Write beside the target, then link: a link never takes the place of a file."""
        with self._filled(key, lambda temporary: temporary.write_bytes(content)) as temporary:
            return _link(temporary, self.folder / key)

    @contextmanager
    def _filled(self, key: str, fill: Callable[[Path], object]) -> Iterator[Path]:
        """Yield a new file beside a key's, which is gone at the end if it was not moved."""
        folder = (self.folder / key).parent
        with _readable_os_errors(self.address / key):
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix=TEMPORARY)
            os.close(handle)
            temporary = Path(name)
            try:
                fill(temporary)
                temporary.chmod(0o644)
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    def copy(self, source: str, target: str) -> None:
        """Copy beside the target, then rename."""
        self._write(target, lambda temporary: shutil.copyfile(self.folder / source, temporary))

    def join(self, parts: Sequence[tuple[str, int]], target: str) -> None:
        """Copy files behind each other."""

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as whole:
                for key, _ in parts:
                    with (self.folder / key).open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 20)

        self._write(target, fill)

    def delete(self, prefix: str) -> None:
        """Remove a file or a whole folder."""
        target = self.folder / prefix
        with _readable_os_errors(self.address / prefix):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def delete_keys(self, keys: Iterable[str]) -> None:
        """Remove files."""
        for key in keys:
            with _readable_os_errors(self.address / key):
                (self.folder / key).unlink(missing_ok=True)


def check_replaceable(folder: Path, ours: Container[str]) -> None:
    """Make sure that `replacing` a folder loses nothing: it is free, or holds `ours` only.

    Raises
    ------
    OutputTakenError
        When it holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputTakenError(f"{folder} is a file; choose another folder.")
    names = sorted(file.name for file in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if name not in ours and name != ".DS_Store"]
    if foreign:
        raise OutputTakenError(
            f"{folder} holds something else ({foreign[0]}), which would be lost. Choose another "
            "folder."
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which takes the place of `folder` once it is complete."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield fresh
        fresh.chmod(0o755)
        if folder.exists():
            old = fresh.with_name(f"{fresh.name}-old")
            folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old)
        else:
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _link(temporary: Path, target: Path) -> bool:
    """Give a file a second name, unless that is taken."""
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            target.open("xb").close()  # empty for a moment: not written yet
        except FileExistsError:
            return False
        temporary.replace(target)
    return True


def _leads_back(parent: Path, name: str) -> bool:
    """Tell whether a folder is a link to one on the way to it: following it would never end."""
    link = parent / name
    if not link.is_symlink():
        return False
    target = link.resolve()
    return any(place.resolve().is_relative_to(target) for place in (parent, *parent.parents))


def _status(file: Path) -> os.stat_result | None:
    """Return a file's status, that of the link itself if it leads nowhere, None for a gone file."""
    with suppress(OSError):
        return file.stat()
    with suppress(FileNotFoundError):
        return file.lstat()
    return None


def _is_listed(status: os.stat_result) -> bool:
    """Leave out what is no file and would keep who opens it waiting: pipes, sockets, devices."""
    return stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)


def _utf8(key: str, file: Path) -> str:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise StorageError(
            f"expected file names in UTF-8, found {os.fsencode(file)!r}; rename it, then run again."
        ) from error
    return key


class BucketStore:
    """A prefix of an S3 bucket, by boto3: driver only, workers have no boto3."""

    def __init__(self, address: Address, s3: S3Settings) -> None:
        self.address = address
        self.bucket = address.bucket
        self.s3 = s3

    @property
    def client(self) -> Any:
        """The S3 client."""
        return boto3_client(self.s3)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object below the prefix; folder markers (`name/`, empty) are none."""
        from pipeline.s3.pages import pages_of

        root = f"{self.address.path}/" if self.address.path else ""
        with self._readable_errors():
            for page in pages_of(self.client, str(self.bucket), root + prefix):
                for key, length, modified, version, archive in page.objects():
                    if not (key.endswith("/") and length == 0):
                        time = datetime.fromisoformat(modified)
                        # Elsewhere a class is a name that somebody chose: such objects can be read.
                        archive = archive if self.s3.is_aws else None
                        yield Entry(key.removeprefix(root), length, time, version, archive)

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes, None if there is none."""
        with self._readable_errors():
            try:
                found = self.client.get_object(Bucket=self.bucket, Key=self._full(key))
                content: bytes = found["Body"].read()
                return content
            except self.client.exceptions.NoSuchKey:
                return None

    def write(self, key: str, content: bytes) -> None:
        """PUT one object: S3 shows it whole or not at all."""
        with self._readable_errors():
            self.client.put_object(Bucket=self.bucket, Key=self._full(key), Body=content)

    def write_new(self, key: str, content: bytes) -> bool:
        """PUT one object with `If-None-Match: *`: of several at once, one is the first.

        A PUT whose answer is lost is sent again, and refused for its own sake: what lies there
        tells whose it is, so several had better not write the same content.
        """
        place = {"Bucket": self.bucket, "Key": self._full(key)}
        with self._readable_errors():
            try:
                self.client.put_object(**place, Body=content, IfNoneMatch="*")
            except self.client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] in TAKEN:
                    return self.read(key) == content
                raise
        return True

    def upload(self, key: str, file: Path) -> None:
        """Upload a file, in parts when it is large, by the client that spends least on each."""
        try:
            self._fast.put(key, file)
        except Exception as error:  # obstore's errors share no base with those it maps
            raise StorageError(
                f"{self.address}/{key} could not be written: {_first_line(error)}. "
                "Run again: what is there is skipped."
            ) from error

    @cached_property
    def _fast(self) -> S3Store:
        return s3_client(self.address, located(self.bucket, self.s3))

    def copy(self, source: str, target: str) -> None:
        """Copy within S3."""
        with self._readable_errors():
            origin = {"Bucket": self.bucket, "Key": self._full(source)}
            self.client.copy(origin, self.bucket, self._full(target))

    def join(self, parts: Sequence[tuple[str, int]], target: str) -> None:
        """Have S3 copy parts behind each other; small ones go by this machine, with neighbours."""
        place = {"Bucket": self.bucket, "Key": self._full(target)}
        if sum(size for _, size in parts) < JOINED_HERE:
            self.write(target, self._together(parts))
            return
        with self._readable_errors():
            upload = {**place, "UploadId": self.client.create_multipart_upload(**place)["UploadId"]}
            try:
                made = [
                    {"PartNumber": number, "ETag": self._join_one(run, upload, number)}
                    for number, run in enumerate(_neighbours(parts), 1)
                ]
                self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": made})
                found = self.client.head_object(**place)["ContentLength"]
                if found != sum(size for _, size in parts):
                    raise StorageError(
                        f"expected {sum(size for _, size in parts):,} bytes in "
                        f"{self.address}/{target}, found {found:,}. Run again, one run at a time."
                    )
            except BaseException:
                self.client.abort_multipart_upload(**upload)
                raise

    def _join_one(
        self, run: Sequence[tuple[str, int]], upload: Mapping[str, Any], number: int
    ) -> str:
        if len(run) == 1:
            origin = {"Bucket": self.bucket, "Key": self._full(run[0][0])}
            copied = self.client.upload_part_copy(**upload, PartNumber=number, CopySource=origin)
            return str(copied["CopyPartResult"]["ETag"])
        content = self._together(run)
        return str(self.client.upload_part(**upload, PartNumber=number, Body=content)["ETag"])

    def _together(self, parts: Sequence[tuple[str, int]]) -> bytes:
        """Read parts behind each other; one that is gone or of another length is an error."""
        contents = []
        for key, size in parts:
            content = self.read(key)
            if content is None or len(content) != size:
                raise StorageError(
                    f"expected {self.address}/{key} with {size:,} bytes, found "
                    f"{'none' if content is None else f'{len(content):,}'}: another run writes to "
                    "this place. Run again, one run at a time."
                )
            contents.append(content)
        return b"".join(contents)

    def delete(self, prefix: str) -> None:
        """Remove the object and all below it, 1,000 keys a request."""
        self.delete_keys(chain([prefix], (entry.key for entry in self.list(f"{prefix}/"))))

    def delete_keys(self, keys: Iterable[str]) -> None:
        """Remove objects, 1,000 a request."""
        keys = iter(keys)
        with self._readable_errors():
            while some := [{"Key": self._full(key)} for key in islice(keys, 1000)]:
                answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": some})
                for error in answer.get("Errors", []):  # a key's own, in an answer of 200
                    raise StorageError(self._explain(error))

    def old_versions(self) -> str | None:
        """Return what the bucket keeps of objects that are deleted or replaced, None if nothing."""
        from botocore.exceptions import ClientError

        try:
            if not self.client.get_bucket_versioning(Bucket=self.bucket).get("Status"):
                return None
        except ClientError:
            return "not known: these credentials may not ask for the bucket's versioning"
        try:
            rules = self.client.get_bucket_lifecycle_configuration(Bucket=self.bucket)["Rules"]
        except ClientError:
            rules = []
        days = [
            rule["NoncurrentVersionExpiration"]["NoncurrentDays"]
            for rule in rules
            if rule["Status"] == "Enabled" and "NoncurrentVersionExpiration" in rule
        ]
        if not days:
            return "old versions of all objects, as no rule of the bucket deletes them"
        return f"old versions of objects, which the bucket's rules delete after {max(days)} days"

    def create_bucket(self) -> None:
        """Create the bucket of this address."""
        with self._readable_errors():
            self.client.create_bucket(Bucket=self.bucket)

    def _full(self, key: str) -> str:
        return f"{self.address.path}/{key}" if self.address.path else key

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            raise StorageError(self._explain(error.response.get("Error", {}))) from error
        except (BotoCoreError, S3UploadFailedError) as error:
            where = self.s3.endpoint or "S3"
            raise StorageError(
                f"{where} could not be asked for {self.address}: {error}. "
                "Check the endpoint, the network and the credentials, then run again."
            ) from error

    def _explain(self, error: Mapping[str, str]) -> str:
        code = error.get("Code", "unknown error")
        return f"{self.address}: S3 answered {code}: {explained(code, error.get('Message', ''))}."


def _neighbours(parts: Sequence[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Yield runs of parts that are large enough for S3 to join; only the last may be smaller."""
    run: list[tuple[str, int]] = []
    for part in parts:
        run.append(part)
        if sum(size for _, size in run) >= SMALLEST_PART:
            yield run
            run = []
    if run:
        yield run


def s3_client(address: Address, s3: S3Settings) -> S3Store:
    """Open what lies below an address by obstore."""
    return obstore_client(address.bucket, address.path, s3)


@contextmanager
def _readable_os_errors(address: Address) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _raise_readable(error, address)


def _raise_readable(error: OSError, address: Address | None = None) -> None:
    where = address or error.filename
    raise StorageError(
        f"{where}: {error.strerror or error}. Check that it exists, that it is yours to use "
        "and that the disk has room, then run again."
    ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
