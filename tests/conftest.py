"""What tests share: a loopback cluster with its S3, a session, images, weights, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer

from pipeline.cli import main
from pipeline.console import err, out
from pipeline.local.given import unpack, weights_file
from pipeline.local.loopback import Loopback, loopback_cluster
from pipeline.local.sample import render_sample
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import Model, find_weights, flatbuffer, identify
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore
from tests.suites import LONGEST, Meter, Scheduling, Suites, scope_of

PROJECT = Path(__file__).parent.parent


# How many examples Hypothesis draws for each property; `make soak` takes the second.
settings.register_profile("test", max_examples=300, deadline=None)
settings.register_profile("soak", max_examples=10_000, deadline=None)
settings.load_profile("test")


def pytest_configure(config: pytest.Config) -> None:
    """Measure the suites where tests run, and tell of them where the terminal is."""
    is_worker, has_workers = hasattr(config, "workerinput"), config.getoption("numprocesses")
    if is_worker or not has_workers:
        config.pluginmanager.register(Meter())
    if not is_worker:
        config.pluginmanager.register(Suites(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin each folder with its longest file, so that all processes end together.

    Where there are several, one begins with tests/hosts, which takes it until the end.
    """
    folders = [item.path.parent for item in items]
    order = {folder: number for number, folder in enumerate(dict.fromkeys(folders))}
    has_others = hasattr(config, "workerinput")
    items.sort(
        key=lambda item: (
            has_others and scope_of(item.nodeid) != "hosts",
            order[item.path.parent],
            item.path.name not in LONGEST,
        )
    )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """Take the place of xdist's own, which know no folders."""
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A real master, two real workers and a real S3 server on loopback.

    The S3 is the stand-in, or the one that FRUITS_TEST_S3 names (`tests.s3.servers` sets it).
    """
    given = os.environ.get("FRUITS_TEST_S3")
    s3 = S3Settings(**json.loads(given)) if given else None
    with loopback_cluster(tmp_path_factory.mktemp("clusters"), s3) as running:
        yield running


def new_bucket(cluster: Loopback) -> BucketStore:
    """Make a bucket on the cluster's S3."""
    store = BucketStore(Address(f"test-{uuid.uuid4().hex[:12]}", ""), cluster.s3)
    store.create_bucket()
    return store


@pytest.fixture
def bucket(cluster: Loopback) -> BucketStore:
    """A new, empty bucket."""
    return new_bucket(cluster)


@pytest.fixture(scope="session")
def fruit_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 varieties x 4 rendered pictures."""
    folder = tmp_path_factory.mktemp("pictures") / "fruit"
    render_sample(folder, per_variety=4)
    return folder


@pytest.fixture(scope="session")
def small_network() -> tuple[Model, bytes]:
    """A real network whose weights are always at hand, at its quickest size."""
    weights = find_weights("efficientnet_lite0", None)
    model = identify(NETWORKS["efficientnet_lite0"], weights, 96)
    return model, flatbuffer(model, weights)


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 600 photos of fruits-360-sample.tar, from the folder that FRUITS_IMAGES names."""
    archive = Path(os.environ.get("FRUITS_IMAGES", "")) / "fruits-360-sample.tar"
    if not archive.is_file():
        pytest.skip("needs fruits-360-sample.tar in the folder that FRUITS_IMAGES names")
    folder = tmp_path_factory.mktemp("photos")
    unpack(archive, folder)
    return folder


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """MobileNetV2's ImageNet weights, which FRUITS_WEIGHTS names."""
    given = Path(os.environ.get("FRUITS_WEIGHTS") or "none")
    if not given.exists():
        pytest.skip("needs MobileNetV2's weights: FRUITS_WEIGHTS names a .h5 file or its folder")
    return weights_file(given)


Fruits = Callable[..., "subprocess.CompletedProcess[str]"]


def run_fruits(
    folder: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command `fruits` in a folder, as a user does, and return what it did."""
    command = Path(sys.executable).with_name("fruits")
    return subprocess.run(
        [str(command), *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def fruits(tmp_path: Path) -> Fruits:
    """The command `fruits` in a folder of the test's own."""
    return partial(run_fruits, tmp_path)


@pytest.fixture
def fruits_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fruits:
    """The same command in this very process, for what takes no process of its own to show."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        given = ["fruits", *map(str, arguments)]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        with (
            monkeypatch.context() as patch,
            redirect_stdout(StringIO()) as told,
            redirect_stderr(StringIO()) as mistakes,
        ):
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", given)
            for name, value in environment.items():
                patch.setenv(name, value)
            for console in (out, err):
                patch.setattr(console, "width", 200)
            try:
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return subprocess.CompletedProcess(given, status, told.getvalue(), mistakes.getvalue())

    return run
