"""What the playbooks ask of AWS where Ansible has no module: looks, and changes nothing.

    python -m pipeline.cluster.ec2 look < knobs.json   the knobs, and the account as they want it
    python -m pipeline.cluster.ec2 host-keys INSTANCE ...        as the consoles printed them

They print JSON. `look` collects every problem it finds, so that an admin mends them in one
go.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import boto3

from pipeline.cluster.aws.account import Account
from pipeline.cluster.aws.asking import Asking
from pipeline.cluster.aws.bucket import find_bucket, find_bucket_size
from pipeline.cluster.aws.caller import check_permissions, find_caller
from pipeline.cluster.aws.cost import cost
from pipeline.cluster.aws.images import find_images
from pipeline.cluster.aws.instances import find_instances
from pipeline.cluster.aws.offers import check_region, find_types, find_zone
from pipeline.cluster.aws.quota import check_quota
from pipeline.cluster.aws.ssh_keys import check_public_key, host_keys
from pipeline.cluster.aws.things import check_network, find_templates, find_things
from pipeline.cluster.knobs import mistakes


def look(knobs: Mapping[str, Any]) -> Account:
    """Ask all there is to ask; with wrong knobs nothing, without credentials only those."""
    asking, found = Asking(knobs), Account(problems=mistakes(knobs))
    if not found.problems:
        check_region(asking, found)
    if found.problems:
        return found
    with found.explained("sts"):
        find_caller(asking, found)
    if not found.caller:
        return found
    with found.explained("ec2"):
        find_instances(asking, found)
        find_things(asking, found)
    with found.explained("s3"):
        find_bucket(asking, found)
    if knobs.get("size_of_bucket"):
        with found.explained("cloudwatch"):
            find_bucket_size(asking, found)
    if knobs.get("provision"):
        _look_before_provisioning(asking, found)
    found.cost = cost(knobs, found.instances)
    return found


def _look_before_provisioning(asking: Asking, found: Account) -> None:
    """Compare the knobs with the account: what is wanted must be there, and be allowed."""
    check_public_key(asking, found)
    with found.explained("ec2"):
        check_network(asking, found)
    with found.explained("ec2"):
        find_zone(asking, found)
        find_types(asking, found)
    with found.explained("ec2"):
        find_images(asking, found)
    with found.explained("ec2"):
        find_templates(asking, found)
    with found.explained("service-quotas"):
        check_quota(asking, found)
    with found.explained("iam"):
        check_permissions(asking, found)


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["look"]:
            print_json(asdict(look(json.load(sys.stdin))))
        case ["host-keys", *instances] if instances:
            ec2 = boto3.client("ec2", region_name=os.environ["AWS_DEFAULT_REGION"])
            print_json(host_keys(ec2, instances))
        case _:
            sys.exit(__doc__)


def print_json(content: Any) -> None:
    """Write what a playbook reads."""
    sys.stdout.write(f"{json.dumps(content)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
