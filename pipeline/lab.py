"""JupyterLab on one machine, on a Spark cluster and an S3 server of its own: `make lab`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from pipeline.console import observing, out
from pipeline.demo import SOURCE, demo_images
from pipeline.place import open_place
from pipeline.storage import Address, BucketStore, S3Settings, open_store
from pipeline.upload import upload

NOTEBOOKS = Path("notebooks")


def open_lab(images: Path | None) -> None:
    """Start the cluster, put the images on its S3, and run JupyterLab until it is closed.

    Parameters
    ----------
    images
        As for `pipeline.demo.demo_images`; None takes FRUITS_IMAGES.
    """
    if images is None and os.environ.get("FRUITS_IMAGES"):
        images = Path(os.environ["FRUITS_IMAGES"])
    with ExitStack() as stack:
        folder, told = stack.enter_context(demo_images(images))
        out.print(f"Images from {told}.")
        with observing() as observer:
            observer.stage("Starting Spark and S3 on loopback")
            place = stack.enter_context(open_place(None, with_s3=True))
            bucket = BucketStore(SOURCE, place.s3)
            bucket.create_bucket()
            observer.stage("Uploading the images")
            upload(open_store(Address.parse(str(folder)), S3Settings()), bucket, observer.files)
        _run_jupyterlab()


def _run_jupyterlab() -> None:
    # The notebook finds the cluster by SPARK_CONF_DIR, which the loopback cluster has set.
    command = Path(sys.executable).with_name("jupyter-lab")
    subprocess.run([str(command), "--ip=127.0.0.1", "fruits.ipynb"], cwd=NOTEBOOKS, check=False)  # noqa: S603
