"""The whole job on one machine: what `make demo` shows a newcomer.

Images go to an S3 server on loopback, the job runs on a loopback cluster from s3a:// to s3a://,
and the result is copied to a folder to be looked at.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.console import ConsoleObserver, observing, out, summary
from pipeline.errors import NoImagesError, WeightsError
from pipeline.images import is_image
from pipeline.local.place import Place, make_job, open_place
from pipeline.local.sample import render_sample
from pipeline.matrix import RESULT
from pipeline.networks.backbones import BACKBONES, INPUT_SIZE, find_weights, flatbuffer, identify
from pipeline.storage import (
    Address,
    BucketStore,
    S3Settings,
    Store,
    check_replaceable,
    open_store,
    replacing,
)
from pipeline.upload import upload

SOURCE, TARGET = Address("fruits", "images"), Address("fruits", "result")


def show(
    images: Path | None, weights: str | None, backbone: str | None, output: Path, *, keep: bool
) -> None:
    """Do the whole job on loopback and tell what happens.

    Parameters
    ----------
    images
        As for `demo_images`; None takes FRUITS_IMAGES.
    weights, backbone
        As for `demo_weights`.
    output
        The folder that the result is copied to.
    keep
        Stay up afterwards, until Ctrl-C.
    """
    check_target(output)
    with ExitStack() as stack:
        # Beside the rest: a download may have to wait, and TensorFlow takes one core for a while.
        beside = stack.enter_context(ThreadPoolExecutor(1))
        chosen = beside.submit(demo_weights, weights, backbone)
        folder, told = stack.enter_context(demo_images(images or images_named()))
        out.print(f"Images from {told}.")
        network, file, note = chosen.result()
        if note:
            out.print(f"[yellow]{note}.")
        model = identify(BACKBONES[network], file, INPUT_SIZE)
        converted = beside.submit(flatbuffer, model, file)
        with observing() as observer:
            place = stack.enter_context(place_with_images(folder, observer))
            job = make_job(place, observer, str(SOURCE), str(TARGET), network, str(file))
            job.flatbuffer = converted.result
            run = job.run()
            copy_result(job.store, output)
        out.print(summary(run, str(output)))
        out.print(f"\nLook at {output}/report.html.")
        if keep:
            _wait_with_pages(place)
        else:
            out.print(
                "Next: your own images, make demo IMAGES=folder\n"
                "      the Spark pages, .venv/bin/fruits demo --keep\n"
                "      all commands, .venv/bin/fruits --help"
            )


def images_named() -> Path | None:
    """Return the images that FRUITS_IMAGES names, if it does."""
    named = os.environ.get("FRUITS_IMAGES")
    return Path(named) if named else None


@contextmanager
def place_with_images(folder: Path, observer: ConsoleObserver) -> Iterator[Place]:
    """Start Spark and S3 on loopback, and put a folder's images at SOURCE."""
    observer.stage("Starting Spark and S3 on loopback")
    with open_place(None, with_s3=True) as place:
        bucket = BucketStore(SOURCE, place.s3)
        bucket.create_bucket()
        observer.stage("Uploading the images")
        upload(open_store(Address.parse(str(folder)), S3Settings()), bucket, observer.files)
        yield place


def _wait_with_pages(place: Place) -> None:
    out.print("\nThe cluster stays up until Ctrl-C:")
    for name, page in place.pages.items():
        out.print(f"  {name:<12} {page}")
    out.print(
        f"In another terminal:\n  export SPARK_CONF_DIR={place.conf}\n"
        f"  .venv/bin/fruits upload FOLDER {SOURCE}   # add images\n"
        f"  .venv/bin/fruits run {SOURCE} s3a://fruits/other --components 20"
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        out.print("Stopping.")


@contextmanager
def demo_images(given: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield a folder of images and where they come from, in a few words.

    A folder is taken as it is; a .tar archive, or a folder that holds nothing but archives, is
    unpacked for the time of the demo; None renders a sample.

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
        archives = [given] if given.is_file() else sorted(given.glob("*.tar"))
        for archive in archives:
            unpack(archive, unpacked)
        if not _holds_an_image(unpacked):
            raise NoImagesError(
                f"expected images, in a folder or in .tar archives, at {given}, found none. "
                "Check IMAGES, or leave it out for a rendered sample."
            )
        yield unpacked, ", ".join(str(archive) for archive in archives)


def _holds_an_image(folder: Path) -> bool:
    return any(is_image(str(file)) for file in folder.rglob("*"))


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a .tar archive below a folder, links as copies of what they name.

    `TarFile.extractall` is as safe from Python 3.11.4 on; Debian 12 has 3.11.2.

    Raises
    ------
    NoImagesError
        If it is no archive, or one of its names leads out of the folder.
    """
    try:
        with tarfile.open(archive) as content:
            for member in content:
                source = content.extractfile(member)
                if source is None:
                    continue
                target = (folder / member.name.lstrip("/")).resolve()
                if not target.is_relative_to(folder.resolve()):
                    raise tarfile.TarError(f"{member.name} leads outside the destination")
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
                os.utime(target, (member.mtime, member.mtime))
    except (tarfile.TarError, OSError, KeyError) as error:
        raise NoImagesError(
            f"expected a .tar archive of images at {archive}, found: {error}. Check IMAGES."
        ) from error


def demo_weights(given: str | None, backbone: str | None) -> tuple[str, Path, str | None]:
    """Choose the network and its weights; return (backbone, weights file, a line to say).

    MobileNetV2 with the weights given, else FRUITS_WEIGHTS, else Keras's own download; if that
    cannot be had, EfficientNet-Lite0, whose weights are installed. Never random ones.

    Raises
    ------
    WeightsError
        When weights were asked for by name and cannot be had.
    """
    if backbone == "efficientnet_lite0":
        return backbone, find_weights(backbone, given), None
    given = given or os.environ.get("FRUITS_WEIGHTS") or None
    if given and Path(given).is_dir():
        given = str(weights_file(Path(given)))
    try:
        return "mobilenet_v2", find_weights("mobilenet_v2", given), None
    except WeightsError:
        if given or backbone:
            raise
        fallback = "efficientnet_lite0"
        return (
            fallback,
            find_weights(fallback, None),
            "MobileNetV2's weights could not be downloaded: EfficientNet-Lite0 takes its place "
            "(give weights with WEIGHTS=file.h5)",
        )


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


def check_target(folder: Path) -> None:
    """Make sure that a folder is free for the copy of a result, or holds an earlier copy.

    Raises
    ------
    OutputTakenError
        When it holds anything else, such as the features of a run that was made there.
    """
    check_replaceable(folder, {*RESULT, "run.json"})


def copy_result(source: Store, folder: Path) -> None:
    """Copy a result (all but the features) to a folder, which appears whole or not at all."""
    with replacing(folder) as fresh:
        for name in (*RESULT, "run.json"):
            for entry in source.list(name):
                file = fresh / entry.key
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(source.read(entry.key) or b"")
