"""A cluster from nothing, on each release of Debian: no layer, no pack, no cache of any kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import Address, BucketStore
from tests.hosts.cluster import hosts_of, recap
from tests.hosts.rehearsal import BUCKET

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_first_host_of_a_kind_builds_and_who_comes_later_fetches(
    tmp_path: Path, suite: str
) -> None:
    places = {"cluster_packs": str(tmp_path / "sums"), "cluster_packs_in_bucket": True}
    hosts = hosts_of(tmp_path / "rehearsal", tag="fruitsnew", subnet="10.82.0.0/24", suite=suite)
    with hosts as rehearsal:
        rehearsal.up(workers=1, **places)
        first = rehearsal.play("configure.yml", quiet=True)
        assert "Install the locked packages" in first.stdout
        packs = [entry.key for entry in BucketStore(Address(BUCKET, "packs"), rehearsal.s3).list()]
        assert len(packs) == 2  # the master's and the worker's
        assert {file.name.removesuffix(".sha256") for file in (tmp_path / "sums").iterdir()} == {
            *packs
        }
        assert "read it back: well" in rehearsal.play("check.yml", quiet=True).stdout

        rehearsal.up(workers=2, **places)
        growth = rehearsal.play("scale.yml", quiet=True)
        assert "Unpack it as it comes" in growth.stdout
        assert "Install the locked packages" not in growth.stdout
        assert recap(growth.stdout)["worker2"]["failed"] == 0
        check = rehearsal.play("check.yml", quiet=True)
        assert rehearsal.machines.hosts["worker2"].address in check.stdout
