"""One set of hosts for all tests of the cluster, which follow each other as an admin's days do."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.storage import Address, BucketStore, FolderStore, open_store
from pipeline.upload import upload
from tests.hosts.cluster import SERVICES, Matrix, Work, fresh_hosts, on
from tests.hosts.commands import HostsError
from tests.hosts.rehearsal import BUCKET, Rehearsal

FIRST_RUN = "configure.log"  # what the first configure.yml said at -vvv, in the rehearsal's folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failure what the services have last said."""
    report = yield
    rehearsal = getattr(item, "funcargs", {}).get("converged")
    if report.failed and rehearsal is not None:
        for host, services in SERVICES.items():
            units = " ".join(f"-u {service}" for service in services)
            last = f"journalctl --no-pager -b {units} | grep -v ContextHandler | tail -25"
            with suppress(HostsError):
                report.sections.append((f"last words of {host}", on(rehearsal, host, last)))
    return report


@pytest.fixture(scope="package")
def cluster_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """A master and two workers, and an S3 server that they reach; metrics are on."""
    folder = tmp_path_factory.mktemp("rehearsal")
    hosts = fresh_hosts(
        folder, workers=2, tag="fruitstest", subnet="10.79.0.0/24", cluster_metrics=True
    )
    with hosts as rehearsal:
        yield rehearsal


@pytest.fixture(scope="package")
def converged(cluster_hosts: Rehearsal) -> Rehearsal:
    """The same hosts after configure.yml."""
    run = cluster_hosts.play("configure.yml", "-vvv", quiet=True)
    (cluster_hosts.folder / FIRST_RUN).write_text(run.stdout + run.stderr)
    return cluster_hosts


@pytest.fixture(scope="session")
def photos(request: pytest.FixtureRequest) -> Path:
    """The 600 real photos where there are any, rendered pictures otherwise."""
    try:
        return request.getfixturevalue("real_images")
    except pytest.skip.Exception:
        return request.getfixturevalue("fruit_pictures")


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest) -> Path | None:
    """MobileNetV2's weights where there are any."""
    try:
        return request.getfixturevalue("real_weights")
    except pytest.skip.Exception:
        return None


@pytest.fixture(scope="package")
def work(converged: Rehearsal, photos: Path, weights: Path | None) -> Work:
    """The job on the hosts, with its images and weights on their S3."""
    images = Address(BUCKET, "images")
    upload(FolderStore(Address.parse(str(photos))), open_store(images, converged.s3))
    if weights is None:
        return Work(converged, images, ("--backbone", "efficientnet_lite0"))
    BucketStore(Address(BUCKET, "weights"), converged.s3).upload(weights.name, weights)
    return Work(converged, images, ("--weights", f"s3a://{BUCKET}/weights/{weights.name}"))


@pytest.fixture(scope="package")
def undisturbed(work: Work) -> Matrix:
    """The matrix of a job that nothing disturbed."""
    work.run("undisturbed")
    return work.matrix("undisturbed")
