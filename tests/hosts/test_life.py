"""What an admin does to a cluster that is used: a change while a job runs, growth, the end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.hosts.cluster import Matrix, Work, changed, eventually, finish, on, workers_alive
from tests.hosts.rehearsal import Rehearsal

pytestmark = pytest.mark.timeout(1800)


def test_a_job_goes_on_while_a_change_of_settings_rolls_through(
    work: Work, undisturbed: Matrix, tmp_path: Path
) -> None:
    running = work.start("upgraded")
    content = yaml.safe_load(work.rehearsal.inventory.read_text())
    content["all"]["vars"]["cluster_port_tries"] = 17
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(yaml.safe_dump(content))
    play = work.rehearsal.play("upgrade.yml", inventory=inventory, quiet=True)
    assert all(count > 0 for host, count in changed(play).items() if host != "localhost")
    finish(running)
    work.matrix("upgraded").assert_equals(undisturbed)


def test_a_job_goes_on_while_everything_is_restarted(work: Work, undisturbed: Matrix) -> None:
    running = work.start("restarted")
    work.rehearsal.play("restart.yml")
    finish(running)
    work.matrix("restarted").assert_equals(undisturbed)


def test_a_worker_leaves_after_handing_over(converged: Rehearsal) -> None:
    converged.play("scale.yml", "-e", "leave=worker2")
    assert eventually(lambda: len(workers_alive(converged)) == 1)


def test_a_cluster_in_use_is_not_reset_by_mistake(converged: Rehearsal) -> None:
    run = converged.play("reset.yml", "-e", "reset=another", check=False, quiet=True)
    assert run.returncode != 0
    assert "-e reset=rehearsal" in re.sub(r"\s+", " ", run.stdout)
    assert workers_alive(converged)


def test_a_reset_leaves_plain_hosts(converged: Rehearsal) -> None:
    converged.play("reset.yml", "-e", "reset=rehearsal")
    for host in converged.machines.hosts:
        left = "ls -d /opt/fruits /etc/fruits /var/lib/fruits /etc/systemd/system/*spark*"
        assert on(converged, host, left, check=False) == ""
        assert on(converged, host, "getent passwd spark analyst spark-history", check=False) == ""
        assert on(converged, host, "nft list tables", check=False).strip() == ""
