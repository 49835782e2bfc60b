"""Each wrong knob is told in a sentence; tests/aws/test_refusals.py has a playbook tell them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster.knobs import mistakes

FILE = {"path": "all.yml", "cluster": "orchard", "region": "eu-west-3", "knobs": ["cluster_name"]}
KNOBS: dict[str, Any] = {
    "file": FILE,
    "known": ["cluster_name", "ec2_workers"],
    "inventory": ["inventory/aws_ec2.yml"],
    "cluster": "orchard",
    "region": "eu-west-3",
    "bucket": "orchard-bucket",
    "key_of_aws": False,
    "admin_cidrs": ["mine", "203.0.113.7/32"],
    "open_to_world": False,
    "network": "10.80.0.0/24",
    "workers": 2,
    "master_disk_gb": 40,
    "worker_disk_gb": 40,
    "smallest_disk_gb": 20,
    "idle_hours": 2.0,
}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"admin_cidrs": ["0.0.0.0/0"], "open_to_world": True},
        {"admin_cidrs": ["10.0.0.0/8"]},
        {"idle_hours": 0.0},
        {"inventory": ["/elsewhere/aws_ec2.yaml"]},
        {"file": FILE | {"knobs": ["ec2_workers", "a_variable_of_the_admins_own"]}},
    ],
)
def test_knobs_that_make_a_cluster_pass(knobs: dict[str, Any]) -> None:
    assert mistakes(KNOBS | knobs) == []


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"admin_cidrs": ["0.0.0.0/0"]}, "only with `ec2_open_to_world: true` beside it"),
        ({"admin_cidrs": ["128.0.0.0/7"]}, "only with `ec2_open_to_world: true` beside it"),
        ({"admin_cidrs": ["everyone"]}, "such as 203.0.113.7/32, or `mine`; found everyone"),
        ({"admin_cidrs": ["everyone"], "open_to_world": True}, "or `mine`; found everyone"),
        ({"admin_cidrs": ["203.0.113.7"]}, "or `mine`; found 203.0.113.7"),
        ({"admin_cidrs": ["203.0.113.256/32"]}, "or `mine`; found 203.0.113.256/32"),
        ({"admin_cidrs": []}, "or `mine`; found none"),
        ({"bucket": "Not_A_Bucket"}, "found `Not_A_Bucket`"),
        ({"bucket": "a.dot"}, "a dot breaks TLS), found `a.dot`"),
        ({"bucket": "xn--fruit"}, "found `xn--fruit`"),
        ({"cluster": "Orchard!"}, "found `Orchard!`"),
        ({"workers": 0}, "Expected `ec2_workers` of 1 or more"),
        ({"master_disk_gb": 19}, "Expected disks of 20 GiB or more"),
        ({"worker_disk_gb": 19}, "found 40 and 19"),
        ({"idle_hours": -1.0}, "Expected `ec2_idle_hours` of 0 or more, found -1"),
        ({"network": "10.80.0.0/29"}, "from /16 to /28, found 10.80.0.0/29"),
        ({"network": "10.80.0.0"}, "from /16 to /28, found 10.80.0.0"),
        ({"key_of_aws": True}, "Expected no access key: the instances have a role"),
        (
            {"file": FILE | {"knobs": ["ec2_workrs", "ec2_workers", "cluster_metric"]}},
            "Expected only knobs that exist, found cluster_metric, ec2_workrs.",
        ),
        (
            {"inventory": ["inventory/hosts.yml"]},
            "found inventory/hosts.yml, orchard, eu-west-3. "
            "Run: export ANSIBLE_INVENTORY=inventory/aws_ec2.yml",
        ),
        ({"inventory": []}, "found none, orchard, eu-west-3"),
        ({"region": "eu-west-1"}, "which it reads (orchard, eu-west-3); found"),
    ],
)
def test_a_wrong_knob_is_told(knobs: dict[str, Any], says: str) -> None:
    assert says in " ".join(mistakes(KNOBS | knobs))


def test_several_are_told_at_once() -> None:
    wrong = {"workers": 0, "admin_cidrs": [], "bucket": "a.dot"}
    assert len(mistakes(KNOBS | wrong)) == 3
