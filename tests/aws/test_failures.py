"""A run that fails is completed by the next one, or removed by destroy, wherever it failed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aws.account import Account, Request, by_role, fail, only, things
from tests.aws.admin import Admin

pytestmark = pytest.mark.timeout(3600)

# A run that fails at each of its 35 changes takes up to half an hour: FRUITS_FAIL_EVERY=1 does
# it. Without, it fails at every fifth.
STRIDE = int(os.environ.get("FRUITS_FAIL_EVERY", "5"))


@pytest.fixture(scope="module")
def admin(aws: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    folder: Path = tmp_path_factory.mktemp("failures")
    yield Admin(folder, aws, cluster_name="storm", cluster_bucket="storm-bucket", ec2_spot=True)


def step_by_step(admin: Admin, stride: int, playbook: str, *said: str) -> list[Request]:
    """Fail a playbook again and again until it passes; return the changes that were made.

    Every run makes the change at which the one before it failed, with those after it up to
    `stride`, and fails at the next.
    """
    done: list[Request] = []
    while True:
        changes = stride if done else 0
        with admin.aws.answering(only(changes)), admin.aws.recording() as requests:
            run = admin.run("ansible-playbook", f"ansible/{playbook}", *said)
        asked = [request for request in requests if request.changes_something]
        done += asked[:changes] or asked[:1]
        if run.returncode == 0:
            assert len(asked) <= changes
            return done
        assert len(asked) > changes, run.stdout[-3000:]  # it failed where it was made to
        assert len(done) < 100, [request.action for request in done]


def test_a_failure_half_way_is_completed_by_the_next_run(admin: Admin) -> None:
    # A gateway that was made and not attached is nobody's yet: the next run must know its own.
    stopped = fail("AttachInternetGateway", "UnsupportedOperation")
    with admin.aws.answering(stopped), admin.aws.recording() as begun:
        admin.play("provision.yml", fails=True)
    with admin.aws.recording() as requests:
        check = admin.play("site.yml", "--check")
    assert [request.action for request in requests if request.changes_something] == []
    assert check.says("Only a part of this cluster is there yet")
    done = step_by_step(admin, STRIDE, "provision.yml")
    assert by_role(admin.aws, cluster="storm") == {"master": 1, "worker": 2}
    made = Counter(r.action for r in [*begun, *done[1:]] if r.action.startswith(("Create", "Run")))
    assert made == {
        "CreateVpc": 1,
        "CreateSubnet": 1,
        "CreateInternetGateway": 1,
        "CreateRouteTable": 1,
        "CreateRoute": 1,
        "CreateVpcEndpoint": 1,
        "CreateSecurityGroup": 2,
        "CreateRole": 2,
        "CreateInstanceProfile": 2,
        "CreateLaunchTemplate": 2,
        "RunInstances": 2,
    }
    # Nothing is missing: a run that nothing disturbs has nothing to do.
    assert admin.play("provision.yml").changed == 0


def test_a_failure_half_way_of_the_end_is_completed_by_the_next_run(admin: Admin) -> None:
    step_by_step(
        admin, 2 * STRIDE - 1, "destroy.yml", "-e", "destroy=storm", "-e", "bucket=storm-bucket"
    )
    assert things(admin.aws, "storm") == []
    buckets = admin.aws.client("s3").list_buckets()["Buckets"]
    assert "storm-bucket" not in {one["Name"] for one in buckets}


def test_half_a_cluster_is_told_and_destroyed_without_a_trace(admin: Admin) -> None:
    with admin.aws.answering(only(24)):
        admin.play("provision.yml", fails=True)
    left = things(admin.aws, "storm")
    assert len(left) > 8
    told = admin.play("status.yml")
    assert told.says("Left by a run that was cut off: ")
    assert all(told.says(one) for one in left)
    admin.play("destroy.yml", "-e", "destroy=storm", "-e", "bucket=storm-bucket")
    assert things(admin.aws, "storm") == []


def test_a_launch_that_fails_leaves_what_was_launched_before(admin: Admin) -> None:
    with admin.aws.answering(fail("RunInstances", "VcpuLimitExceeded", nth=2)):
        play = admin.play("provision.yml", fails=True)
    assert play.says("VcpuLimitExceeded")
    assert by_role(admin.aws, cluster="storm") == {"master": 1}


def test_the_next_run_completes_it_and_makes_nothing_twice(admin: Admin) -> None:
    with admin.aws.recording() as requests:
        admin.play("provision.yml")
    assert by_role(admin.aws, cluster="storm") == {"master": 1, "worker": 2}
    assert [r.action for r in requests if r.action.startswith(("Create", "Run"))] == [
        "RunInstances"
    ]
    found = things(admin.aws, "storm")
    assert len([one for one in found if one.startswith("vpc-")]) == 1
    assert len([one for one in found if one.startswith("sg-")]) == 2


def test_workers_are_spot_as_the_request_says(admin: Admin) -> None:
    templates = [
        request
        for request in admin.aws.requests
        if request.action == "CreateLaunchTemplate"
        and request.parameters["LaunchTemplateName"] == "fruits-storm-worker"
    ]
    market = {
        name.partition("InstanceMarketOptions.")[2]: value
        for name, value in templates[-1].parameters.items()
        if "InstanceMarketOptions" in name
    }
    assert market == {
        "MarketType": "spot",
        "SpotOptions.SpotInstanceType": "one-time",
        "SpotOptions.InstanceInterruptionBehavior": "terminate",
    }


def test_spot_workers_end_when_the_cluster_stops(admin: Admin) -> None:
    admin.play("stop.yml")
    assert by_role(admin.aws, "stopped", cluster="storm") == {"master": 1}
