"""The networks that features can be computed with: another one is another entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.networks import efficientnet_lite
from pipeline.networks.weights import downloaded

PerChannel = float | tuple[float, float, float]


@dataclass(frozen=True)
class Scaling:
    """What a network was trained on, of pixels from 0 to 255: `pixel * scale + offset`.

    Attributes
    ----------
    scale, offset
        One for all channels, or one for each in the order in which the network has them.
    bgr
        The network has blue first, and red last.
    """

    scale: PerChannel
    offset: PerChannel
    bgr: bool = False

    def __str__(self) -> str:
        """Return the rule in words; it is part of what a model's id is made of."""
        scale, offset = (
            ", ".join(f"{number:.6g}" for number in (some if isinstance(some, tuple) else (some,)))
            for some in (self.scale, self.offset)
        )
        return f"{'BGR ' if self.bgr else ''}x * {scale} + {offset}"

    def __call__(self, pixels: Any) -> Any:
        """Apply it to a Keras tensor (n, size, size, 3); it becomes a part of the graph."""
        import keras

        ordered = keras.ops.flip(pixels, axis=-1) if self.bgr else pixels
        return keras.layers.Rescaling(self.scale, self.offset)(ordered)


@dataclass(frozen=True)
class Network:
    """A network without its classifier, as Keras knows it.

    Attributes
    ----------
    name, title
        What `--backbone` takes, and what people read.
    dimensions
        Length of the feature vector: the global average of the last activation.
    scaling
        What it wants of the pixels.
    build
        Returns the Keras model of float32 tensors (n, size, size, 3) -> (n, dimensions), from a
        file of weights and an input size.
    weights
        Returns the file of its ImageNet weights, which it may download; WeightsError otherwise.
    fallback
        The name of the network that a demo takes if these weights cannot be had.
    """

    name: str
    title: str
    dimensions: int
    scaling: Scaling
    build: Callable[[Path, int], Any]
    weights: Callable[[], Path]
    fallback: str | None = None


def keras_application(name: str) -> Callable[[Path, int], Any]:
    """Return the `build` of one of `keras.applications`."""

    def build(weights: Path, size: int) -> Any:
        import keras

        return getattr(keras.applications, name)(
            include_top=False, weights=str(weights), input_shape=(size, size, 3), pooling="avg"
        )

    return build


DEFAULT = "mobilenet_v2"
NETWORKS = {
    network.name: network
    for network in (
        Network(  # Sandler et al. 2018, arXiv:1801.04381; scaling as keras.applications does it
            DEFAULT,
            "MobileNetV2",
            dimensions=1280,
            scaling=Scaling(1 / 127.5, -1.0),
            build=keras_application("MobileNetV2"),
            weights=downloaded(
                "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
            ),
            fallback="efficientnet_lite0",
        ),
        Network(  # Tan and Le 2019, arXiv:1905.11946, in its "lite" form: (x - 127) / 128
            "efficientnet_lite0",
            "EfficientNet-Lite0",
            dimensions=1280,
            scaling=Scaling(1 / 128, -127 / 128),
            build=efficientnet_lite.build,
            weights=efficientnet_lite.weights_path,
        ),
    )
}
