"""Models: what identifies them, and the LiteRT flatbuffer that workers run.

The driver turns a Keras network into a LiteRT flatbuffer of a few megabytes, once for each set of
weights; workers need no TensorFlow. A model's id is made of all that shapes its features (network,
input size, preprocessing, weights), so that features of different models never mix.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine.jars import default_folder as jars_folder
from pipeline.errors import WeightsError
from pipeline.networks.catalogue import NETWORKS, Network
from pipeline.networks.decode import PREPROCESSING

INPUT_SIZE = 224  # what the networks were trained at


@dataclass(frozen=True)
class Model:
    """What identifies a set of features; `id` names it in the feature table."""

    id: str
    network: str
    input_size: int
    dimensions: int
    preprocessing: str
    weights: str
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON wants them."""
        return asdict(self)


def identify(network: Network, weights: Path, input_size: int) -> Model:
    """Name the model that a network, its weights and an input size make.

    Raises
    ------
    WeightsError
        When the weights file cannot be read, or the size is not one the network takes.
    """
    if not 32 <= input_size <= 1024 or input_size % 32:
        raise WeightsError(
            f"expected an input size from 32 to 1024 pixels, a multiple of 32; found {input_size}."
        )
    try:
        weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(
            f"expected {network.name} weights at {weights}, found: {error.strerror}. "
            "Give a Keras file with --weights, or --weights imagenet."
        ) from error
    preprocessing = f"{PREPROCESSING}; {network.scaling}"
    shapes_features = f"{network.name} {input_size} {preprocessing} {weights_sha256}"
    digest = hashlib.sha256(shapes_features.encode()).hexdigest()[:12]
    return Model(
        id=f"{network.name}-{input_size}-{digest}",
        network=network.name,
        input_size=input_size,
        dimensions=network.dimensions,
        preprocessing=preprocessing,
        weights=weights.name,
        weights_sha256=weights_sha256,
    )


def flatbuffer(model: Model, weights: Path) -> bytes:
    """Return the model as a LiteRT flatbuffer: uint8 (1, s, s, 3) -> float32 (1, dimensions).

    The conversion takes TensorFlow and some 20 seconds, so its result is kept in the user's cache
    under the model's id. It runs in a process of its own: TensorFlow's memory and its talk go with
    that process.

    Raises
    ------
    WeightsError
        When the file is damaged or holds the weights of another network.
    """
    cached = jars_folder().with_name("models") / f"{model.id}.tflite"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            converted = Path(scratch) / "model.tflite"
            _convert_apart(model, weights, converted)
            converted.replace(cached)
    return cached.read_bytes()


def _convert_apart(model: Model, weights: Path, target: Path) -> None:
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    arguments = [model.network, str(model.input_size), str(weights), str(target)]
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pipeline.networks.model", *arguments],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        last_words = (run.stderr.strip().splitlines() or ["no more is known"])[-1]
        raise WeightsError(
            f"expected {model.network} weights (Keras, no top) in {weights}, found a file that "
            f"does not fit: {last_words[:400]}. Give another file with --weights."
        )


def convert(network: Network, input_size: int, weights: Path) -> bytes:
    """Convert a network with its weights, in this process, which TensorFlow then stays in."""
    import keras
    import tensorflow as tf

    pixels = keras.Input((input_size, input_size, 3), batch_size=1, dtype="uint8")
    features = network.build(weights, input_size)(network.scaling(pixels))
    content: bytes = tf.lite.TFLiteConverter.from_keras_model(
        keras.Model(pixels, features)
    ).convert()
    return content


def load_network(content: bytes) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """Load a flatbuffer and return the function from one image to its features.

    One thread only: Spark runs one task for each core, and more threads would fight for it.
    Batches of one are the fastest on one thread (measured: 137-150 images/s against 102 in
    batches of 32), as the activations stay in the core's cache.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]

    def features(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        interpreter.set_tensor(source, pixels[np.newaxis])
        interpreter.invoke()
        vector: npt.NDArray[np.float32] = interpreter.get_tensor(target)[0]
        return vector

    return features


def find_weights(network: str, given: str | None) -> Path:
    """Return the local file of the weights that `--weights` names.

    Parameters
    ----------
    network
        A key of NETWORKS.
    given
        A path, an `s3a://` address (fetched by the caller), `imagenet`, or None for `imagenet`:
        the network's own.

    Raises
    ------
    WeightsError
        When they cannot be had; random weights are never used in their place.
    """
    if given in (None, "imagenet"):
        return NETWORKS[network].weights()
    return Path(str(given)).expanduser().absolute()


if __name__ == "__main__":
    _name, _size, _weights, _target = sys.argv[1:]
    Path(_target).write_bytes(convert(NETWORKS[_name], int(_size), Path(_weights)))
