"""Runs the benchmarks and writes their table and `bench-results.json`.

    python -m tests.benchmarks                    all of them
    python -m tests.benchmarks features pca       some of them
    python -m tests.benchmarks --images 600       a quick look; figures of small runs are lower

Each benchmark runs in a fresh process with a fresh cluster, one after the other. Run them on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from rich.console import Console

from pipeline.errors import FruitsError
from pipeline.local.given import choose_weights
from tests.benchmarks._common import Setup, measure_by_name, stop_on_sigterm
from tests.benchmarks.results import Result, as_table, write_json

BENCHMARKS = (
    "features",
    "features_25ms",
    "listing",
    "notebook",
    "pca",
    "rerun",
    "scale",
    "memory",
    "correctness",
    "drift",
)
RESULTS = Path("bench-results.json")

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 1 if one could not be run."""
    options = _options(arguments)
    images = os.environ.get("FRUITS_IMAGES")
    if not images or not Path(images).exists() or not os.environ.get("FRUITS_WEIGHTS"):
        console.print(
            "benchmarks: set FRUITS_IMAGES to a folder or .tar of images and FRUITS_WEIGHTS to a "
            "Keras file of MobileNetV2 (or its folder).",
            soft_wrap=True,
        )
        return 1
    try:
        _, weights, _ = choose_weights(None, "mobilenet_v2")
    except FruitsError as error:
        console.print(f"benchmarks: {error}", soft_wrap=True)
        return 1
    setup = Setup(
        Path(images).absolute(), weights, options.images, options.notebook_images, options.rows
    )
    results: list[Result] = []
    failed = False
    for name in options.names or BENCHMARKS:
        began = time.monotonic()
        console.print(f"{name} ...", end=" ")
        try:
            results += _apart(name, setup)
            console.print(f"{time.monotonic() - began:.0f} s")
        except Exception as error:
            failed = True
            results.append(Result(name, None, ""))
            console.print(f"failed: {type(error).__name__}: {error}", markup=False)
        write_json(results, RESULTS)
    console.print(as_table(results))
    return int(failed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Setup(Path(), Path())
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks", description="Measure what the project promises."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--images", type=int, help="at most so many images (default: all)")
    parser.add_argument(
        "--notebook-images",
        type=int,
        default=defaults.notebook_images,
        help="at most so many for the usual notebook (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=defaults.rows, help="rows for the PCA (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"expected some of {', '.join(BENCHMARKS)}; found {', '.join(unknown)}")
    return options


def _apart(name: str, setup: Setup) -> list[Result]:
    """Run a benchmark in a new process: no Java, no module of the one before is left over."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=stop_on_sigterm) as pool:
        try:
            return pool.submit(measure_by_name, name, setup).result()
        except KeyboardInterrupt:
            for child in active_children():
                child.terminate()  # it stops its cluster first
            raise


if __name__ == "__main__":
    stop_on_sigterm()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
