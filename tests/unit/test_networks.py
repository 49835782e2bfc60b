"""A model's id stands for its features, and LiteRT gives the features that Keras gives."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import WeightsError
from pipeline.networks import weights as weights_of
from pipeline.networks.catalogue import NETWORKS, Network, Scaling, keras_application
from pipeline.networks.decode import PREPROCESSING
from pipeline.networks.model import Model, convert, find_weights, flatbuffer, identify, load_network
from pipeline.networks.weights import HDF5

MOBILENET = NETWORKS["mobilenet_v2"]
KERAS_FILE = Path("mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.h5"
    file.write_bytes(b"the bytes of the weights")
    return file


# --- the id ----------------------------------------------------------------------------------


def test_the_same_network_size_and_weights_are_the_same_model(weights: Path) -> None:
    model = identify(MOBILENET, weights, 224)
    assert identify(MOBILENET, weights, 224) == model
    copy = weights.with_name("another name.h5")
    copy.write_bytes(weights.read_bytes())
    assert identify(MOBILENET, copy, 224).id == model.id


def test_whatever_changes_the_features_changes_the_id(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {identify(MOBILENET, weights, 224).id}
    ids.add(identify(MOBILENET, weights, 192).id)
    ids.add(identify(NETWORKS["efficientnet_lite0"], weights, 224).id)
    ids.add(identify(replace(MOBILENET, scaling=Scaling(1 / 255, -1.0)), weights, 224).id)
    ids.add(identify(replace(MOBILENET, scaling=Scaling(1 / 127.5, 0.0)), weights, 224).id)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.networks.model.PREPROCESSING", PREPROCESSING + ", sharpened")
        ids.add(identify(MOBILENET, weights, 224).id)
    weights.write_bytes(b"the bytes of other weights")
    ids.add(identify(MOBILENET, weights, 224).id)
    assert len(ids) == 7


def test_the_id_says_network_and_size_and_makes_a_folders_name(weights: Path) -> None:
    model = identify(MOBILENET, weights, 224)
    assert model.id.startswith("mobilenet_v2-224-")
    assert model.id.replace("-", "").replace("_", "").isalnum()
    assert (model.dimensions, model.weights, len(model.weights_sha256)) == (1280, "weights.h5", 64)
    assert model.preprocessing.startswith(PREPROCESSING)
    assert Model(**model.to_json()) == model


@pytest.mark.parametrize("size", [32, 96, 224, 1024])
def test_a_size_the_networks_take_is_accepted(weights: Path, size: int) -> None:
    assert identify(MOBILENET, weights, size).input_size == size


@pytest.mark.parametrize("size", [0, -32, 31, 33, 100, 225, 1025, 1056])
def test_another_size_is_refused(weights: Path, size: int) -> None:
    with pytest.raises(WeightsError, match=f"32 to 1024 pixels, a multiple of 32; found {size}"):
        identify(MOBILENET, weights, size)


def test_missing_weights_are_told_with_their_path(tmp_path: Path) -> None:
    for file, found in ((tmp_path / "none.h5", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(WeightsError, match=found) as told:
            identify(MOBILENET, file, 224)
        assert str(file) in str(told.value)
        assert "--weights" in str(told.value)


# --- where weights come from -----------------------------------------------------------------


def test_a_path_is_taken_as_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_weights("mobilenet_v2", "my weights.h5") == tmp_path / "my weights.h5"
    assert find_weights("efficientnet_lite0", "/w.pth") == Path("/w.pth")
    assert find_weights("mobilenet_v2", "~/w.h5") == Path.home() / "w.h5"


@pytest.mark.parametrize("given", [None, "imagenet"])
def test_imagenet_is_what_keras_downloaded_before(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    cached = tmp_path / "models/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
    cached.parent.mkdir()
    cached.touch()
    assert find_weights("mobilenet_v2", given) == cached
    assert find_weights("efficientnet_lite0", given).suffix == ".pth"


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Keras."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras"


@contextmanager
def server(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> Iterator[None]:
    """Let the weights lie on a server that gives this answer to one connection."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as beside:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        monkeypatch.setattr(weights_of, "KERAS", address)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        served = beside.submit(serve)
        yield
        served.result()


def http(content: bytes, length: int | None = None, status: str = "200 OK") -> bytes:
    length = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + content


def test_the_weights_lie_where_keras_has_them_from(monkeypatch: pytest.MonkeyPatch) -> None:
    keras = pytest.importorskip("keras")
    asked: list[tuple[str, str]] = []

    def get_file(name: str, origin: str, **_: object) -> str:
        asked.append((name, origin))
        raise OSError

    module = sys.modules[keras.applications.MobileNetV2.__module__]
    monkeypatch.setattr(module.file_utils, "get_file", get_file)
    with pytest.raises(OSError):
        keras.applications.MobileNetV2(include_top=False, input_shape=(224, 224, 3))
    assert asked == [(KERAS_FILE.name, f"{weights_of.KERAS}{KERAS_FILE}")]


def test_weights_are_downloaded_once_and_whole_into_kerass_cache(
    keras_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = HDF5 + np.random.default_rng(0).bytes(1_000_000)
    with server(monkeypatch, http(content)):
        file = find_weights("mobilenet_v2", None)
    assert file == keras_home / "models" / KERAS_FILE.name
    assert file.read_bytes() == content
    assert find_weights("mobilenet_v2", "imagenet") == file, "with no server any more"
    assert list((keras_home / "models").iterdir()) == [file]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (http(HDF5, length=9_000_000), "IncompleteRead"),
        (http(b"<html>Welcome to our hotel"), "no Keras file"),
        (http(b"", status="404 Not Found"), "404"),
        (b"", "closed connection"),
    ],
    ids=["cut off", "another page", "missing", "hung up"],
)
def test_what_is_no_whole_file_of_weights_is_not_kept(
    answer: bytes, found: str, keras_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        server(monkeypatch, answer),
        pytest.raises(WeightsError, match=f"could not download .*{found}.*--weights"),
    ):
        find_weights("mobilenet_v2", None)
    assert not list(keras_home.rglob("*.h5"))


def test_a_server_that_does_not_answer_is_left_after_seconds(
    keras_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights_of.SECONDS_TO_ANSWER <= 5
    monkeypatch.setattr(weights_of, "SECONDS_TO_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(weights_of, "KERAS", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(WeightsError, match=r"could not download .*timed out"):
            find_weights("mobilenet_v2", None)


# --- the flatbuffer --------------------------------------------------------------------------


def test_random_bytes_are_no_weights_and_leave_nothing_in_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights.write_bytes(np.random.default_rng(0).bytes(100_000))
    with pytest.raises(
        WeightsError, match=r"expected mobilenet_v2 weights .* does not fit"
    ) as told:
        flatbuffer(identify(MOBILENET, weights, 96), weights)
    assert str(weights) in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert list((tmp_path / "cache/fruits/models").iterdir()) == []


def test_a_model_converted_before_comes_from_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = identify(MOBILENET, weights, 224)
    cached = tmp_path / "fruits/models" / f"{model.id}.tflite"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"converted before")
    assert flatbuffer(model, weights) == b"converted before"


def pictures(size: int) -> np.ndarray:
    """Return a gradient, noise, white and black, shape (4, size, size, 3)."""
    down, across = np.mgrid[0:size, 0:size] * 255 // (size - 1)
    gradient = np.stack([down, across, 255 - down], axis=-1)
    noise = np.random.default_rng(5).integers(0, 256, (size, size, 3))
    flat = (np.full((size, size, 3), value) for value in (255, 0))
    return np.stack([gradient, noise, *flat]).astype(np.uint8)


def assert_keras_agrees(model: Model, weights: Path, content: bytes) -> None:
    pytest.importorskip("keras")
    network_of = NETWORKS[model.network]
    pixels = pictures(model.input_size)
    network = load_network(content)
    found = np.stack([network(one) for one in pixels])
    scaling = network_of.scaling
    scaled = pixels.astype(np.float32) * scaling.scale + scaling.offset
    expected = network_of.build(weights, model.input_size)(scaled, training=False).numpy()
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (4, model.dimensions)
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < 1e-3
    np.testing.assert_array_equal(network(pixels[0]), found[0], "an image changes the next one's")


def test_litert_gives_mobilenets_features_as_keras_does(real_weights: Path) -> None:
    model = identify(MOBILENET, real_weights, 224)
    assert_keras_agrees(model, real_weights, flatbuffer(model, real_weights))


def test_litert_gives_efficientnets_features_as_keras_does(
    small_network: tuple[Model, bytes],
) -> None:
    model, content = small_network
    assert_keras_agrees(model, find_weights(model.network, None), content)


def test_another_network_of_keras_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(1)
    resnet50 = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg"
    )
    file = tmp_path / "resnet50.weights.h5"
    resnet50.save_weights(file)

    means = (-103.939, -116.779, -123.68)  # of ImageNet's blue, green and red
    entry = Network(
        "resnet50",
        "ResNet50",
        dimensions=2048,
        scaling=Scaling(1.0, means, bgr=True),
        build=keras_application("ResNet50"),
        weights=lambda: file,
    )
    monkeypatch.setitem(NETWORKS, "resnet50", entry)
    model = identify(entry, find_weights("resnet50", None), 32)
    assert model.id.startswith("resnet50-32-")
    assert "BGR" in model.preprocessing

    network = load_network(convert(entry, 32, file))
    pixels = pictures(32)
    found = np.stack([network(one) for one in pixels])
    scaled = keras.applications.resnet50.preprocess_input(pixels.astype(np.float32))
    expected = resnet50(scaled, training=False).numpy()
    assert found.shape == (4, model.dimensions)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
