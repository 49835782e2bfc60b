"""Where weights come from: a file that is named, Keras's own, or an installed package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from pipeline.errors import WeightsError

# Where keras.applications has its files from, which it gives no sums for.
KERAS = "https://storage.googleapis.com/tensorflow/keras-applications/"
SECONDS_TO_ANSWER = 5.0
HDF5 = b"\x89HDF\r\n\x1a\n"  # what a Keras file begins with


def downloaded(path: str) -> Callable[[], Path]:
    """Return what finds one of Keras's own files, in Keras's cache or by a download into it.

    Without Keras: to import it, and TensorFlow with it, takes ten seconds, for nothing on a machine
    without a network.

    Parameters
    ----------
    path
        The file's path below KERAS.
    """

    def find() -> Path:
        keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
        cached = keras_home / "models" / path.rpartition("/")[2]
        if not cached.exists():
            _download(f"{KERAS}{path}", cached)
        return cached

    return find


def _download(address: str, target: Path) -> None:
    try:
        with urlopen(address, timeout=SECONDS_TO_ANSWER) as answer:  # noqa: S310  KERAS is https
            content = answer.read()
        if not content.startswith(HDF5):
            raise OSError("what came is no Keras file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            whole = Path(scratch) / target.name
            whole.write_bytes(content)
            whole.replace(target)
    except (OSError, HTTPException) as error:
        raise WeightsError(
            f"could not download {target.name} from Keras ({error}). Give a file with "
            "--weights PATH, or use --backbone efficientnet_lite0, whose weights are here."
        ) from error
