"""The whole job on one machine: what `make demo` shows a newcomer.

Images go to an S3 server on loopback, the job runs on a loopback cluster from s3a:// to s3a://,
and the result is copied to a folder to be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.console import ConsoleObserver, observing, out, summary
from pipeline.errors import StateError
from pipeline.job import Choices
from pipeline.local.given import choose_weights, images_named, open_images
from pipeline.local.place import Place, make_job, open_place
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import INPUT_SIZE, flatbuffer, identify
from pipeline.record import Run
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore, Store, check_replaceable, open_store, replacing
from pipeline.upload import upload
from pipeline.versions import RECORD, RESULT, open_result

SOURCE, TARGET = Address("fruits", "images"), Address("fruits", "result")


def show(
    images: Path | None, weights: str | None, backbone: str | None, output: Path, *, keep: bool
) -> None:
    """Do the whole job on loopback and tell what happens.

    Parameters
    ----------
    images
        As for `open_images`; None takes FRUITS_IMAGES.
    weights, backbone
        As for `choose_weights`.
    output
        The folder that the result is copied to.
    keep
        Stay up afterwards, until Ctrl-C.
    """
    check_target(output)
    with ExitStack() as stack:
        # Beside the rest: a download may have to wait, and TensorFlow takes one core for a while.
        beside = stack.enter_context(ThreadPoolExecutor(1))
        chosen = beside.submit(choose_weights, weights, backbone)
        folder, told = stack.enter_context(open_images(images or images_named()))
        out.print(f"Images from {told}.")
        network, file, note = chosen.result()
        if note:
            out.print(f"[yellow]{note}.")
        model = identify(NETWORKS[network], file, INPUT_SIZE)
        converted = beside.submit(flatbuffer, model, file)
        with observing() as observer:
            place = stack.enter_context(place_with_images(folder, observer))
            source, target = str(SOURCE), str(TARGET)
            job = make_job(
                place, observer, source, target, network, str(file), INPUT_SIZE, Choices()
            )
            job.flatbuffer = converted.result
            run = job.run()
            copy_result(job.store, place.s3, output)
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


@contextmanager
def place_with_images(folder: Path, observer: ConsoleObserver) -> Iterator[Place]:
    """Start Spark and S3 on loopback, and put a folder's images at SOURCE."""
    observer.stage("Starting Spark and S3 on loopback")
    with open_place(None, with_s3=True) as place:
        bucket = BucketStore(SOURCE, place.s3)
        bucket.create_bucket()
        observer.stage("Uploading the images")
        source = open_store(Address.parse(str(folder)), S3Settings(), follows_links=True)
        upload(source, bucket, observer.files)
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


def check_target(folder: Path) -> None:
    """Make sure that a folder is free for the copy of a result, or holds an earlier copy.

    Raises
    ------
    OutputTakenError
        When it holds anything else, such as the features of a run that was made there.
    """
    check_replaceable(folder, {*RESULT, RECORD})


def copy_result(output: Store, s3: S3Settings, folder: Path) -> Run:
    """Copy the current result to a folder, which appears whole or not at all; return its record.

    Raises
    ------
    StateError
        When there is none.
    """
    run, source = open_result(output, s3)
    if run is None:
        raise StateError(f"expected a result in {output.address}, found none. Make one: fruits run")
    with replacing(folder) as fresh:
        for name in run.files or [entry.key for part in RESULT for entry in source.list(part)]:
            content = source.read(name)
            found = None if content is None else len(content)
            if content is None or found != run.files.get(name, found):
                raise StateError(
                    f"expected {name} in {source.address} as run.json has it, found "
                    f"{'none' if found is None else f'{found:,} bytes'}. Run the job again."
                )
            file = fresh / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (fresh / RECORD).write_bytes(run.to_bytes())
    return run
