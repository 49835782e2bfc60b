"""How often is a batch of real photos told to be unlike the rest, when it is, and when it is not?

All photos of the set are the rest, but for a batch that is drawn: of 200 to 6,000 photos, of all
labels or of a few. `drift_false_alarms` is the share of such batches, taken as they are, that are
told to be unlike the rest, in the worst of the ways to draw. `drift_caught` is the share of batches
(200 photos of all labels, or 300 of two) that are told so after their photos were changed, in the
worst of the changes, which `CHANGES` names with their strength.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageFilter

from pipeline.drift import SCORES, Spreads, compare
from pipeline.listing.images import is_image
from pipeline.local.given import open_images
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import flatbuffer, identify, load_network
from pipeline.pca import PCA, Moments
from tests.benchmarks._common import MANY, Setup, source_of
from tests.benchmarks.results import Result

BATCHES, CHANGED_BATCHES, CHANGED_PHOTOS = 300, 100, 3000
WAYS = [(200, None), (200, 1), (200, 2), (300, 1), (500, 3), (2000, None), (6000, None)]
CHANGED_WAYS = [(200, None), (300, 2)]
Photo = Image.Image


def _smaller(photo: Photo, share: float) -> Photo:
    width, height = photo.size
    small = photo.resize((int(share * width), int(share * height)), Image.Resampling.BILINEAR)
    return small.resize(photo.size, Image.Resampling.BILINEAR)


def _warmer(photo: Photo) -> Photo:
    red, green, blue = photo.split()
    more, less = red.point(lambda v: min(255, int(v * 1.1))), blue.point(lambda v: int(v * 0.9))
    return Image.merge("RGB", (more, green, less))


CHANGES: dict[str, Callable[[Photo], Photo]] = {
    "blurred, radius 1 pixel": lambda photo: photo.filter(ImageFilter.GaussianBlur(1.0)),
    "blurred, radius 0.5 pixels": lambda photo: photo.filter(ImageFilter.GaussianBlur(0.5)),
    "rotated by 90 degrees": lambda photo: photo.rotate(90),
    "rotated by 15 degrees": lambda photo: photo.rotate(15, fillcolor="white"),
    "20 % darker": lambda photo: photo.point(lambda v: int(v * 0.8)),
    "20 % lighter": lambda photo: photo.point(lambda v: min(255, int(v * 1.2))),
    "warmer: red + 10 %, blue - 10 %": _warmer,
    "half the resolution": partial(_smaller, share=0.5),
    "three quarters of the resolution": partial(_smaller, share=0.75),
}


def measure(setup: Setup) -> list[Result]:
    """Return both shares, and those of each change."""
    with open_images(source_of(setup, MANY)) as (folder, _):
        photos = sorted(
            file for file in folder.rglob("*") if is_image(file.name) and file.is_file()
        )
        photos = photos[: setup.images]
        labels = np.array([photo.parent.name for photo in photos])
        rng = np.random.default_rng(360)
        changed = rng.choice(len(photos), min(CHANGED_PHOTOS, len(photos) // 3), replace=False)
        model = identify(NETWORKS["mobilenet_v2"], setup.weights, 224)
        content = flatbuffer(model, setup.weights)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            features = _features(pool, content, photos, None)
            pca = PCA.fit(Moments.of(features), components=SCORES)
            scores = pca.transform(features)
            some = [photos[number] for number in changed]
            of_changes = {
                name: pca.transform(_features(pool, content, some, name)) for name in CHANGES
            }
    batches = Batches(scores, labels, rng)
    alarms = [np.mean([batches.is_told(size, few) for _ in range(BATCHES)]) for size, few in WAYS]
    caught = {
        name: min(
            float(
                np.mean([batches.is_told(size, few, changed, new) for _ in range(CHANGED_BATCHES)])
            )
            for size, few in CHANGED_WAYS
        )
        for name, new in of_changes.items()
    }
    return [
        Result("drift_false_alarms", float(max(alarms)), "share", "<= 0.01"),
        Result("drift_caught", min(caught.values()), "share", ">= 0.95"),
        *(Result(f"drift_caught: {name}", share, "share") for name, share in caught.items()),
    ]


class Batches:
    """Draws batches of photos, and asks whether they are unlike the rest."""

    def __init__(
        self,
        scores: npt.NDArray[np.float64],
        labels: npt.NDArray[np.str_],
        rng: np.random.Generator,
    ) -> None:
        self.scores, self.labels, self.rng = scores, labels, rng

    def is_told(
        self,
        size: int,
        few: int | None,
        pool: npt.NDArray[np.intp] | None = None,
        others: npt.NDArray[np.float64] | None = None,
    ) -> bool:
        """Draw a batch of photos of a few labels, or of all; `others` are their scores instead."""
        pool = np.arange(len(self.labels)) if pool is None else pool
        places = np.arange(len(pool))
        if few is not None:
            names = self.rng.choice(np.unique(self.labels), few, replace=False)
            places = np.flatnonzero(np.isin(self.labels[pool], names))
        drawn = self.rng.choice(places, min(size, len(places) // 2 if others is None else size,
                                            len(places)), replace=False)  # fmt: skip
        batch = pool[drawn]
        rest = np.setdiff1d(np.arange(len(self.labels)), batch)
        added = self.scores[batch] if others is None else others[drawn]
        spreads = Spreads(SCORES)
        for numbers, scores, is_added in ((rest, self.scores[rest], False), (batch, added, True)):
            for start in range(0, len(numbers), 4096):
                part = slice(start, start + 4096)
                labels = pa.array(self.labels[numbers[part]])
                spreads.add(labels, scores[part], np.full(len(labels), is_added))
        found = compare(spreads)
        return bool(found and found.is_unlike)


def _features(
    pool: ProcessPoolExecutor, content: bytes, photos: list[Path], change: str | None
) -> npt.NDArray[np.float32]:
    parts = [photos[start : start + 250] for start in range(0, len(photos), 250)]
    return np.concatenate(list(pool.map(partial(_of_some, content, change), parts)))


def _of_some(content: bytes, change: str | None, photos: list[Path]) -> npt.NDArray[np.float32]:
    network = load_network(content)
    made = []
    for photo in photos:
        pixels = Image.open(photo).convert("RGB")
        if change is not None:
            pixels = CHANGES[change](pixels)
        made.append(network(np.asarray(pixels.resize((224, 224), Image.Resampling.BILINEAR))))
    return np.array(made, np.float32)
