"""Looks at what AWS offers: the region, a zone of it that has the wanted types, and those types."""

from __future__ import annotations

from collections import defaultdict
from difflib import get_close_matches

from pipeline.cluster.aws.account import Account, InstanceType
from pipeline.cluster.aws.asking import Asking

SMALLEST_MEMORY_MB = 4096


def check_region(asking: Asking, found: Account) -> None:
    """Refuse a region that does not exist; boto3 knows them all without asking."""
    region, known = asking.knobs["region"], asking.session.get_available_regions("ec2")
    if region not in known:
        close = ", ".join(get_close_matches(region, known)) or "eu-west-3, for one"
        found.add_problem(
            f"Expected the name of an AWS region in cluster_region, found `{region}`; try {close}."
        )


def find_zone(asking: Asking, found: Account) -> None:
    """Choose the zone of the subnet: not every zone of a region has every type."""
    region, names = asking.knobs["region"], _wanted(asking)
    subnets = asking.client("ec2").describe_subnets(Filters=[asking.ours])["Subnets"]
    offers = _offers(asking, names)
    zones = sorted(zone for zone, types in offers.items() if names <= types)
    there = [subnet["AvailabilityZone"] for subnet in subnets]
    found.zone = (there or zones or [""])[0]
    missing = names - set().union(*offers.values())
    for name in sorted(missing):
        close = get_close_matches(name, _all_types(asking)) or ["m5.large"]
        found.add_problem(
            f"Expected an instance type that {region} has, found `{name}`; set "
            f"ec2_master_type and ec2_worker_type: {', '.join(close)}, for one."
        )
    if not missing and found.zone not in zones:
        found.add_problem(
            f"Expected one zone of {region} with {' and '.join(sorted(names))}, "
            f"found {', '.join(zones) or 'none'}, and the subnet is in "
            f"{found.zone or 'none'}; set ec2_master_type and ec2_worker_type."
        )


def find_types(asking: Asking, found: Account) -> None:
    """Find what the wanted types have; refuse what is too small, or not sold as it is wanted."""
    worker = asking.knobs["worker_type"]
    wanted = [{"Name": "instance-type", "Values": sorted(_wanted(asking))}]
    types = asking.client("ec2").describe_instance_types(Filters=wanted)["InstanceTypes"]
    for one in types:
        name, memory = one["InstanceType"], one["MemoryInfo"]["SizeInMiB"]
        architectures = one["ProcessorInfo"]["SupportedArchitectures"]
        found.types[name] = InstanceType(
            vcpus=one["VCpuInfo"]["DefaultVCpus"],
            memory_mb=memory,
            architecture="arm64" if "arm64" in architectures else "x86_64",
        )
        if memory < SMALLEST_MEMORY_MB:
            found.add_problem(
                f"Expected an instance type with 4 GiB of memory or more (Java, Spark and a "
                f"network in each Python process need it), found {name} with "
                f"{memory / 1024:g} GiB; the smallest that fits is t3.medium."
            )
    sold = [one["SupportedUsageClasses"] for one in types if one["InstanceType"] == worker]
    if asking.knobs["spot"] and any("spot" not in markets for markets in sold):
        found.add_problem(
            f"Expected a worker type that is sold as spot, found {worker}; "
            "set ec2_spot: false, or another ec2_worker_type."
        )


def _wanted(asking: Asking) -> set[str]:
    return {asking.knobs["master_type"], asking.knobs["worker_type"]}


def _offers(asking: Asking, names: set[str]) -> dict[str, set[str]]:
    """Return the zones of the region, and which of the types each has."""
    offers: dict[str, set[str]] = defaultdict(set)
    pages = asking.client("ec2").get_paginator("describe_instance_type_offerings")
    wanted = [{"Name": "instance-type", "Values": sorted(names)}]
    for page in pages.paginate(LocationType="availability-zone", Filters=wanted):
        for offer in page["InstanceTypeOfferings"]:
            offers[offer["Location"]].add(offer["InstanceType"])
    return offers


def _all_types(asking: Asking) -> list[str]:
    pages = asking.client("ec2").get_paginator("describe_instance_type_offerings")
    return [
        one["InstanceType"] for page in pages.paginate() for one in page["InstanceTypeOfferings"]
    ]
