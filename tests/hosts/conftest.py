"""One set of hosts for all tests of the cluster, which follow each other as an admin's days do."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.storage import Address, BucketStore, FolderStore, open_store
from pipeline.upload import upload
from tests.hosts.cluster import SERVICES, Matrix, Work, hosts_of, on
from tests.hosts.commands import HostsError
from tests.hosts.rehearsal import BUCKET, Rehearsal

# What the first two runs said, and what a check of fresh hosts left on them: in the rehearsal's
# folder, and kept with a cluster that is cloned.
FIRST_CHECK, FIRST_RUN, LEFT = "first-check.log", "first-run.log", "left-by-a-check.log"


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


def first_runs(rehearsal: Rehearsal) -> None:
    """Check fresh hosts, then configure them, telling as much as Ansible can."""
    check = rehearsal.play("configure.yml", "--check", quiet=True)
    (rehearsal.folder / FIRST_CHECK).write_text(check.stdout + check.stderr)
    made = "ls -d /opt/fruits /etc/fruits /etc/*.d/fruits.conf /usr/lib/jvm"
    left = "".join(on(rehearsal, host, made, check=False) for host in SERVICES)
    (rehearsal.folder / LEFT).write_text(left)
    run = rehearsal.play("configure.yml", "-vvv", quiet=True)
    (rehearsal.folder / FIRST_RUN).write_text(run.stdout + run.stderr)


@pytest.fixture(scope="package")
def converged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """A master and two workers after configure.yml, and an S3 server; metrics are on."""
    folder = tmp_path_factory.mktemp("rehearsal")
    with hosts_of(folder, tag="fruitstest", subnet="10.79.0.0/24") as rehearsal:
        rehearsal.converge(workers=2, first=first_runs, cluster_metrics=True)
        yield rehearsal


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
