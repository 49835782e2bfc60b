"""Looks at the cluster's instances, and lays them out for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.cluster.aws.account import Account, Instance
from pipeline.cluster.aws.asking import Asking

LIVE = ["pending", "running", "stopping", "stopped"]
COLUMNS = ["role", "id", "type", "market", "state", "public", "private", "hours"]


def find_instances(asking: Asking, found: Account) -> None:
    """Find the instances that carry the cluster's tag, the oldest first, and their table."""
    for one in described_instances(asking, [asking.ours, state_in(LIVE)]):
        found.instances.append(_instance(one))
    found.instances.sort(key=lambda one: (one.launched, one.id))
    found.table = _table(found.instances)


def described_instances(
    asking: Asking, filters: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the instances that all filters let through, as EC2 describes them."""
    pages = asking.client("ec2").get_paginator("describe_instances")
    for page in pages.paginate(Filters=filters):
        for reservation in page["Reservations"]:
            yield from reservation["Instances"]


def state_in(states: Sequence[str]) -> dict[str, Any]:
    """Return the filter of EC2 for instances in one of some states."""
    return {"Name": "instance-state-name", "Values": states}


def _instance(one: Mapping[str, Any]) -> Instance:
    tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])}
    hours = (datetime.now(UTC) - one["LaunchTime"]).total_seconds() / 3600
    state = one["State"]["Name"]
    return Instance(
        id=one["InstanceId"],
        role=tags.get("Role", ""),
        market=tags.get("Market", ""),
        type=one["InstanceType"],
        state=state,
        public=one.get("PublicIpAddress", ""),
        private=one.get("PrivateIpAddress", ""),
        launched=one["LaunchTime"].isoformat(),
        hours=round(hours, 1) if state == "running" else 0.0,
        vpc=one.get("VpcId", ""),
    )


def _table(instances: Sequence[Instance]) -> list[str]:
    if not instances:
        return []
    cells = [[str(getattr(one, name)) for name in COLUMNS] for one in instances]
    rows = [COLUMNS, *cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
