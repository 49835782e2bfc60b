"""The images and weights that a user names: a folder, an archive, a file, or nothing at all."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from pipeline.errors import NoImagesError, WeightsError
from pipeline.listing.images import is_image
from pipeline.local.sample import render_sample
from pipeline.networks.catalogue import DEFAULT, NETWORKS
from pipeline.networks.model import find_weights
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, open_store


def images_named() -> Path | None:
    """Return the images that FRUITS_IMAGES names, if it does."""
    named = os.environ.get("FRUITS_IMAGES")
    return Path(named) if named else None


@contextmanager
def open_images(given: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield a folder of images and where they come from, in a few words.

    A folder is taken as it is; an archive (.tar, .tar.gz and the like, .zip), or a folder that
    holds nothing but archives, is unpacked for the time of the demo; None renders a sample.

    Raises
    ------
    NoImagesError
        When what is given holds no image.
    """
    with tempfile.TemporaryDirectory(prefix="fruits-") as scratch:
        unpacked = Path(scratch) / "images"
        if given is None:
            render_sample(unpacked)
            yield unpacked, "a rendered sample (give your own with IMAGES=folder)"
            return
        if _holds_an_image(given):
            yield given, str(given)
            return
        archives = [given] if given.is_file() else sorted(filter(_is_archive, given.glob("*")))
        for archive in archives:
            unpack(archive, unpacked)
        if not _holds_an_image(unpacked):
            raise NoImagesError(
                f"expected images, in a folder or in archives (.tar, .zip) at {given}, found none. "
                "Check IMAGES, or leave it out for a rendered sample."
            )
        yield unpacked, ", ".join(str(archive) for archive in archives)


def _holds_an_image(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    store = open_store(Address.parse(str(folder)), S3Settings(), follows_links=True)
    return any(is_image(entry.key) for entry in store.list())


def _is_archive(file: Path) -> bool:
    return bool(re.search(r"\.(zip|tgz|tar(\.(gz|bz2|xz))?)$", file.name.lower()))


# What damaged archives are told by.
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, OSError, KeyError, RuntimeError, EOFError),
    *(zlib.error, lzma.LZMAError, OverflowError, ValueError),
)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive below a folder, links as copies of what they name.

    `TarFile.extractall` is as safe from Python 3.11.4 on; Debian 12 has 3.11.2.

    Raises
    ------
    NoImagesError
        If it is no archive, or one of its names leads out of the folder.
    """
    written = set[Path]()
    try:
        for name, modified, source in _zipped(archive) if _is_zip(archive) else _tarred(archive):
            target = (folder / name.lstrip("/")).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise tarfile.TarError(f"{name} leads outside the destination")
            if target.exists() and target not in written:  # of another archive
                target = folder / archive.name / target.relative_to(folder.resolve())
            written.add(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            os.utime(target, (modified, modified))
    except DAMAGE as error:
        raise NoImagesError(
            f"expected an archive of images (.tar, .tar.gz, .zip) at {archive}, found: {error}. "
            "Check IMAGES."
        ) from error


def _is_zip(archive: Path) -> bool:
    with archive.open("rb") as file:
        return file.read(2) == b"PK"


def _tarred(archive: Path) -> Iterator[tuple[str, float, IO[bytes]]]:
    """Yield name, time and content of each file."""
    with tarfile.open(archive) as content:
        for member in content:
            source = content.extractfile(member)
            if source is not None:
                yield member.name, member.mtime, source
        # tarfile takes a damaged header for the end.
        if content.fileobj is not None:
            content.fileobj.seek(content.offset)
            if content.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damage behind byte {content.offset:,}")


def _zipped(archive: Path) -> Iterator[tuple[str, float, IO[bytes]]]:
    """Yield name, time and content of each file; one that is encrypted is a RuntimeError."""
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            if not member.is_dir() and not stat.S_ISLNK(member.external_attr >> 16):
                yield _name_of(member), _time_of(member), content.open(member)


def _name_of(member: zipfile.ZipInfo) -> str:
    """Return a file's name: some programs write backslashes, others UTF-8 without saying so."""
    name = member.filename if "/" in member.filename else member.filename.replace("\\", "/")
    if member.flag_bits & 0x800:
        return name
    try:
        return name.encode("cp437").decode("utf-8")
    except UnicodeError:
        return name


def _time_of(member: zipfile.ZipInfo) -> float:
    """Return when a file was modified; some programs write no time, which reads as month 0."""
    try:
        return datetime(*member.date_time).timestamp()
    except ValueError:
        return 0.0


def choose_weights(given: str | None, backbone: str | None) -> tuple[str, Path, str | None]:
    """Choose the network and its weights; return (backbone, weights file, a line to say).

    The network asked for, else the default one, whose weights FRUITS_WEIGHTS may name; if these
    cannot be had, its fallback, whose weights are installed. Never random ones.

    Raises
    ------
    WeightsError
        When a network or weights were asked for by name and cannot be had.
    """
    network = NETWORKS[backbone or DEFAULT]
    if network.name == DEFAULT:
        given = given or os.environ.get("FRUITS_WEIGHTS") or None
    if given and Path(given).is_dir():
        given = str(weights_file(Path(given)))
    try:
        return network.name, find_weights(network.name, given), None
    except WeightsError:
        if given or backbone or network.fallback is None:
            raise
        fallback = NETWORKS[network.fallback]
        told = (
            f"{network.title}'s weights could not be downloaded: {fallback.title} takes its place "
            "(give weights with WEIGHTS=file.h5)"
        )
        return fallback.name, fallback.weights(), told


def weights_file(given: Path) -> Path:
    """Return the file of weights that is given, or the only one of the folder that is.

    Raises
    ------
    WeightsError
        When there is none, or the folder holds several.
    """
    files = sorted(given.glob("*.h5")) if given.is_dir() else [given]
    if len(files) != 1 or not files[0].is_file():
        found = ", ".join(file.name for file in files if file.is_file()) or "none"
        raise WeightsError(
            f"expected a .h5 file, or a folder with one in it, at {given}, found {found}. "
            "Name the file: WEIGHTS=file.h5"
        )
    return files[0]
