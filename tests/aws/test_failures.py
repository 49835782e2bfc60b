"""A run that fails half-way is completed by the next one, or removed by destroy.

Each run does all over again what is before the failure, so the failures are a sample: one in each
part (network, bucket, roles, instances), at the request after which the most is half-made. They
follow each other on one cluster: a run fails where the one before it failed no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aws.account import Account, by_role, fail, things
from tests.aws.admin import Admin

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def admin(aws: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    folder: Path = tmp_path_factory.mktemp("failures")
    yield Admin(folder, aws, cluster_name="storm", cluster_bucket="storm-bucket", ec2_spot=True)


@pytest.mark.parametrize(
    ("action", "nth", "is_there", "is_not"),
    [
        ("AttachInternetGateway", 1, "igw-", "rtb-"),
        ("PUT policy", 1, "sg-", "fruits-storm"),
        ("AddRoleToInstanceProfile", 2, "fruits-storm-worker", "i-"),
    ],
)
def test_a_failure_stops_the_run_where_it_is(
    admin: Admin, action: str, nth: int, is_there: str, is_not: str
) -> None:
    with admin.aws.answering(fail(action, "UnsupportedOperation", nth=nth)):
        play = admin.play("provision.yml", fails=True)
    assert play.says("UnsupportedOperation")
    found = things(admin.aws, "storm")
    assert [one for one in found if one.startswith(is_there)]
    assert not [one for one in found if one.startswith(is_not)]


def test_the_status_tells_what_was_left(admin: Admin) -> None:
    left = things(admin.aws, "storm")
    assert len(left) > 8
    told = admin.play("status.yml")
    assert told.says("Left by a run that was cut off: ")
    assert all(told.says(one) for one in left)


def test_half_a_cluster_is_destroyed_without_a_trace_though_not_at_once(admin: Admin) -> None:
    said = ["-e", "destroy=storm", "-e", "bucket=storm-bucket"]
    with admin.aws.answering(fail("DeleteSubnet", "UnsupportedOperation")):
        admin.play("destroy.yml", *said, fails=True)
    assert things(admin.aws, "storm")
    admin.play("destroy.yml", *said)
    assert things(admin.aws, "storm") == []
    buckets = admin.aws.client("s3").list_buckets()["Buckets"]
    assert "storm-bucket" not in {one["Name"] for one in buckets}


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
