"""A run that fails is completed by the next one, or removed by destroy, wherever it failed.

Here it fails at a change of each kind; `make soak` has it fail at every one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aws.account import (
    Account,
    Request,
    Rule,
    by_role,
    changes,
    fail,
    fail_after,
    only,
    things,
)
from tests.aws.admin import Admin, Play

pytestmark = pytest.mark.timeout(3600)

MADE_ONCE = {
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
GONE = ("-e", "destroy=storm", "-e", "bucket=storm-bucket")


@pytest.fixture(scope="module")
def admin(aws: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    folder: Path = tmp_path_factory.mktemp("failures")
    yield Admin(folder, aws, cluster_name="storm", cluster_bucket="storm-bucket", ec2_spot=True)


def made(requests: list[Request]) -> Counter[str]:
    return Counter(r.action for r in requests if r.action.startswith(("Create", "Run")))


def provision(admin: Admin, stopped: Rule) -> tuple[Play, list[Request]]:
    """Provision until it is stopped; return what it said, and all that it asked."""
    with admin.aws.answering(stopped), admin.aws.recording() as requests:
        play = admin.play("provision.yml", fails=True)
    return play, requests


def test_half_a_cluster_is_told_and_destroyed_without_a_trace(admin: Admin) -> None:
    provision(admin, only(24))
    left = things(admin.aws, "storm")
    assert len(left) > 8
    told = admin.play("status.yml")
    assert told.says("Left by a run that was cut off: ")
    assert all(told.says(one) for one in left)
    admin.play("destroy.yml", *GONE)
    assert things(admin.aws, "storm") == []


def test_a_failure_half_way_is_completed_by_the_next_run(admin: Admin) -> None:
    asked: list[Request] = []

    # In the network: a gateway that was made and not attached is nobody's yet.
    _, requests = provision(admin, fail("AttachInternetGateway", "UnsupportedOperation"))
    asked += requests
    with admin.aws.recording() as requests:
        check = admin.play("site.yml", "--check")
    assert changes(requests) == []
    assert check.says("Only a part of this cluster is there yet")

    # At the first launch: without a master, which watches for idle hours, no worker is launched.
    _, requests = provision(admin, fail("RunInstances", "Unsupported"))
    asked += requests
    assert not by_role(admin.aws, cluster="storm")

    # At the second, which leaves what was launched before.
    play, requests = provision(admin, fail("RunInstances", "VcpuLimitExceeded", nth=2))
    asked += requests
    assert play.says("VcpuLimitExceeded")
    assert by_role(admin.aws, cluster="storm") == {"master": 1}

    # After it: the run hears no more of what it launched. Nothing but that was made by it.
    lost = fail_after("RunInstances", "DescribeInstances", "UnsupportedOperation")
    _, requests = provision(admin, lost)
    asked += requests
    assert made(requests) == {"RunInstances": 1}
    assert by_role(admin.aws, cluster="storm") == {"master": 1, "worker": 2}

    # Nothing is missing: a run that nothing disturbs has nothing to do.
    with admin.aws.recording() as requests:
        play = admin.play("provision.yml")
    assert play.changed == 0
    assert changes(requests) == []
    refused = {"RunInstances": 2}
    assert made(asked) == Counter(MADE_ONCE) + Counter(refused)
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
    admin.play("stop.yml", "-e", "reach_seconds=2")
    assert by_role(admin.aws, "stopped", cluster="storm") == {"master": 1}


def test_a_failure_half_way_of_the_end_is_completed_by_the_next_run(admin: Admin) -> None:
    there = things(admin.aws, "storm")
    # At what costs most, in the network, and at what goes last.
    for action in ("TerminateInstances", "DeleteSubnet", "DELETE"):
        with admin.aws.answering(fail(action, "UnsupportedOperation")):
            admin.play("destroy.yml", *GONE, fails=True)
        left = things(admin.aws, "storm")
        assert (left == there) == (action == "TerminateInstances")
    assert left == []
    assert admin.play("destroy.yml", *GONE).changed == 1
    buckets = admin.aws.client("s3").list_buckets()["Buckets"]
    assert "storm-bucket" not in {one["Name"] for one in buckets}


# --- at every change ------------------------------------------------------------------------------


def change_by_change(admin: Admin, playbook: str, *said: str) -> list[Request]:
    """Fail a playbook again and again until it passes; return the changes that were made.

    Every run makes the change at which the one before it failed, and fails at the next.
    """
    done: list[Request] = []
    allowed = 0
    while True:
        with admin.aws.answering(only(allowed)), admin.aws.recording() as requests:
            play = admin.try_to_play(playbook, *said)
        asked = [request for request in requests if request.changes_something]
        done += asked[:allowed]
        if play.status == 0:
            assert len(asked) <= allowed
            return done
        assert len(asked) > allowed, play.output[-3000:]  # it failed where it was made to
        assert len(done) < 100, [request.action for request in done]
        allowed = 1


@pytest.mark.soak
def test_a_failure_at_every_change_is_completed_by_the_next_run(admin: Admin) -> None:
    assert made(change_by_change(admin, "provision.yml")) == MADE_ONCE
    assert by_role(admin.aws, cluster="storm") == {"master": 1, "worker": 2}
    assert admin.play("provision.yml").changed == 0


@pytest.mark.soak
def test_a_failure_at_every_change_of_the_end_is_completed_by_the_next_run(admin: Admin) -> None:
    change_by_change(admin, "destroy.yml", *GONE)
    assert things(admin.aws, "storm") == []
    buckets = admin.aws.client("s3").list_buckets()["Buckets"]
    assert "storm-bucket" not in {one["Name"] for one in buckets}
