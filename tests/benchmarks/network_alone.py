"""How fast this machine's cores run the network and nothing else: the yardstick of the features.

One process for each task slot of the cluster, all at the same time, each with one thread, calls
the function of `networks.backbones.load_network` on decoded images that lie ready in its memory.
No reading, no decoding, no Spark. Every process loads and warms up first; then all begin at one
word and count what they finish in a fixed time. The sum of their rates is the result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pipeline.networks.decode import decode
from pipeline.networks.model import load_network

TENSORS = 256  # 38 MB of pixels: more than the caches of a core hold
SECONDS = 10.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class NetworkAlone:
    """Measures the network alone, as often as wanted, on the same pixels."""

    def __init__(
        self, model: bytes, images: Sequence[Path], size: int, processes: int, stack: ExitStack
    ) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fruits-")))
        self.processes = processes
        self.model, self.pixels = folder / "model.tflite", folder / "pixels.npy"
        self.model.write_bytes(model)
        some = images[:: max(1, len(images) // TENSORS)][:TENSORS]
        np.save(self.pixels, np.stack([decode(file.read_bytes(), size) for file in some]))

    def images_per_second(self) -> float:
        """Return the images/s of all processes together."""
        command = [sys.executable, "-m", __name__, str(self.model), str(self.pixels)]
        with ExitStack() as stack:
            runs = [
                stack.enter_context(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        env=os.environ | ONE_THREAD,
                        text=True,
                    )
                )
                for _ in range(self.processes)
            ]
            for run in runs:
                _line(run)  # it is ready
            for run in runs:
                print("go", file=run.stdin, flush=True)
            return sum(float(_line(run)) for run in runs)


def _line(run: subprocess.Popen[str]) -> str:
    assert run.stdout
    line = run.stdout.readline()
    if not line:
        raise RuntimeError("the process that runs the network alone ended before its time")
    return line


def _measure(model: Path, pixels: Path) -> None:
    network, tensors = load_network(model.read_bytes()), np.load(pixels)
    for tensor in tensors[:16]:
        network(tensor)
    print("ready", flush=True)
    sys.stdin.readline()
    began, done = time.monotonic(), 0
    while (elapsed := time.monotonic() - began) < SECONDS:
        network(tensors[done % len(tensors)])
        done += 1
    print(done / elapsed, flush=True)


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), Path(sys.argv[2]))
