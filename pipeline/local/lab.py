"""JupyterLab on one machine, on a Spark cluster and an S3 server of its own: `make lab`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from pipeline.cluster.door import WHOLE_FILES
from pipeline.console import observing, out
from pipeline.errors import ClusterError
from pipeline.local.demo import place_with_images
from pipeline.local.given import images_named, open_images

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def open_lab(images: Path | None) -> None:
    """Start the cluster, put the images on its S3, and run JupyterLab until it is closed.

    Parameters
    ----------
    images
        As for `pipeline.local.given.open_images`; None takes FRUITS_IMAGES.
    """
    with ExitStack() as stack:
        folder, told = stack.enter_context(open_images(images or images_named()))
        out.print(f"Images from {told}.")
        with observing() as observer:
            stack.enter_context(place_with_images(folder, observer))
        _run_jupyterlab()


def _run_jupyterlab() -> None:
    # The notebook finds the cluster by SPARK_CONF_DIR, which the loopback cluster has set.
    command = [
        str(Path(sys.executable).with_name("jupyter-lab")),
        "--ip=127.0.0.1",
        f"--ServerApp.contents_manager_class={WHOLE_FILES}",
    ]
    if os.geteuid() == 0:  # in a container, for one: it listens on loopback only
        command.append("--allow-root")
    status = subprocess.run([*command, "fruits.ipynb"], cwd=NOTEBOOKS, check=False).returncode  # noqa: S603
    if status:
        raise ClusterError(f"JupyterLab ended with status {status}; its lines above say why.")
