"""Whether the admin's knobs make a cluster, before AWS is asked anything.

`ansible/roles/ec2` sends them to `pipeline.cluster.ec2`; all that is wrong is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Any

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}[a-z0-9]")
BUCKET = re.compile(r"(?!xn--|sthree-)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
INVENTORY = re.compile(r"aws_ec2\.ya?ml$")


def mistakes(knobs: Mapping[str, Any]) -> list[str]:
    """Return what must be mended in the knobs, a sentence or two for each mistake."""
    return [*_file(knobs), *_names(knobs), *_networks(knobs), *_sizes(knobs)]


def _file(knobs: Mapping[str, Any]) -> list[str]:
    """Look at the file of the knobs, and at the inventory that reads it, too."""
    file, problems = knobs["file"], []
    named = [name for name in file["knobs"] if name.startswith(("ec2_", "cluster_"))]
    if unknown := sorted(set(named) - set(knobs["known"])):
        problems.append(
            f"Expected only knobs that exist, found {', '.join(unknown)}. All of them are in "
            "ansible/roles/ec2/defaults/main.yml and ansible/roles/cluster/defaults/main.yml."
        )
    sources = knobs["inventory"]
    same = (file["cluster"], file["region"]) == (knobs["cluster"], knobs["region"])
    if not same or not any(INVENTORY.search(source) for source in sources):
        problems.append(
            "Expected the dynamic inventory, and `cluster_name` and `cluster_region` from "
            f"{file['path']}, which it reads ({file['cluster']}, {file['region']}); found "
            f"{', '.join(sources) or 'none'}, {knobs['cluster']}, {knobs['region']}. "
            "Run: export ANSIBLE_INVENTORY=inventory/aws_ec2.yml"
        )
    return problems


def _names(knobs: Mapping[str, Any]) -> list[str]:
    problems = []
    if not NAME.fullmatch(knobs["cluster"]):
        problems.append(
            "Expected in `cluster_name` 2 to 32 of a-z, 0-9 and `-`, found "
            f"`{knobs['cluster']}`. Set it in inventory/group_vars/all.yml."
        )
    if not BUCKET.fullmatch(knobs["bucket"]):
        problems.append(
            "Expected the name of a bucket in `cluster_bucket` (3 to 63 of a-z, 0-9 and `-`; a dot "
            f"breaks TLS), found `{knobs['bucket']}`. Set it in inventory/group_vars/all.yml."
        )
    if knobs["key_of_aws"]:
        problems.append(
            "Expected no access key: the instances have a role. Take `cluster_s3_access_key` out."
        )
    return problems


def _networks(knobs: Mapping[str, Any]) -> list[str]:
    let_in, problems = knobs["admin_cidrs"], []
    networks = [_network(one) for one in let_in if one != "mine"]
    world = any(one and one.prefixlen < 8 for one in networks)
    if not let_in or None in networks or (world and not knobs["open_to_world"]):
        problems.append(
            "Expected in `ec2_admin_cidrs` the networks that may reach SSH and JupyterLab, such as "
            f"203.0.113.7/32, or `mine`; found {', '.join(let_in) or 'none'}. A network of the "
            "whole world is taken only with `ec2_open_to_world: true` beside it."
        )
    network = _network(knobs["network"])
    if not network or not 16 <= network.prefixlen <= 28:
        problems.append(f"Expected an `ec2_network` from /16 to /28, found {knobs['network']}.")
    return problems


def _network(text: str) -> IPv4Network | None:
    try:
        return IPv4Network(text, strict=False) if "/" in text else None
    except ValueError:
        return None


def _sizes(knobs: Mapping[str, Any]) -> list[str]:
    problems, smallest = [], knobs["smallest_disk_gb"]
    if knobs["workers"] < 1:
        problems.append(f"Expected `ec2_workers` of 1 or more, found {knobs['workers']}.")
    disks = knobs["master_disk_gb"], knobs["worker_disk_gb"]
    if min(disks) < smallest:
        problems.append(
            f"Expected disks of {smallest} GiB or more (`ec2_master_disk_gb`, "
            f"`ec2_worker_disk_gb`), found {disks[0]} and {disks[1]}."
        )
    if knobs["idle_hours"] < 0:
        problems.append(f"Expected `ec2_idle_hours` of 0 or more, found {knobs['idle_hours']:g}.")
    return problems
