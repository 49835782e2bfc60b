"""Looks at what the cluster has beside its instances: what is tagged, its roles and its network."""

from __future__ import annotations

from pipeline.cluster.aws.account import Account, Subnet
from pipeline.cluster.aws.asking import Asking

# What can carry a tag: how it is listed, and its id. Instances have a question of their own.
TAGGED = {
    "vpc": ("describe_vpcs", "Vpcs", "VpcId"),
    "subnet": ("describe_subnets", "Subnets", "SubnetId"),
    "internet-gateway": ("describe_internet_gateways", "InternetGateways", "InternetGatewayId"),
    "route-table": ("describe_route_tables", "RouteTables", "RouteTableId"),
    "vpc-endpoint": ("describe_vpc_endpoints", "VpcEndpoints", "VpcEndpointId"),
    "security-group": ("describe_security_groups", "SecurityGroups", "GroupId"),
    "launch-template": ("describe_launch_templates", "LaunchTemplates", "LaunchTemplateId"),
    "volume": ("describe_volumes", "Volumes", "VolumeId"),
}


def find_things(asking: Asking, found: Account) -> None:
    """Find what carries the cluster's tag, by type, as far as it still exists.

    The instances are those already found.
    """
    ec2 = asking.client("ec2")
    things = {"instance": [one.id for one in found.instances]}
    for kind, (call, key, name) in TAGGED.items():
        live = [
            one
            for page in ec2.get_paginator(call).paginate(Filters=[asking.ours])
            for one in page[key]
            if one.get("State") not in ("deleting", "deleted")
        ]
        things[kind] = [one[name] for one in live]
        if kind == "subnet":
            found.subnets = [Subnet(vpc=one["VpcId"], cidr=one["CidrBlock"]) for one in live]
        if kind == "volume":
            found.loose_volumes = [one[name] for one in live if one["State"] == "available"]
    with found.explained("iam"):
        things["role"] = _roles(asking)
    found.things = {kind: sorted(ids) for kind, ids in things.items() if ids}


def _roles(asking: Asking) -> list[str]:
    """Return the names of roles and of instance profiles; one may be there without the other."""
    iam, path = asking.client("iam"), asking.knobs["iam_path"]
    profiles = iam.list_instance_profiles(PathPrefix=path)["InstanceProfiles"]
    roles = iam.list_roles(PathPrefix=path)["Roles"]
    names = {one["InstanceProfileName"] for one in profiles}
    return sorted(names | {one["RoleName"] for one in roles})


def find_templates(asking: Asking, found: Account) -> None:
    """Find how instances were described last: what the newest version says of itself."""
    for template in found.things.get("launch-template", []):
        answer = asking.client("ec2").describe_launch_template_versions(
            LaunchTemplateId=template, Versions=["$Latest"]
        )
        for one in answer["LaunchTemplateVersions"]:
            found.templates[one["LaunchTemplateName"]] = one.get("VersionDescription", "")


def check_network(asking: Asking, found: Account) -> None:
    """Refuse another network than the knobs', and instances outside of it."""
    name, network = asking.knobs["cluster"], asking.knobs["network"]
    vpcs = asking.client("ec2").describe_vpcs(Filters=[asking.ours])["Vpcs"]
    if len(vpcs) > 1 or any(vpc["CidrBlock"] != network for vpc in vpcs):
        seen = ", ".join(f"{vpc['VpcId']} {vpc['CidrBlock']}" for vpc in vpcs)
        found.add_problem(
            f"Expected one VPC {network} of the cluster `{name}`, found {seen}. Set "
            "ec2_network to its network, or give this cluster another cluster_name."
        )
    strangers = {one.vpc for one in found.instances} - {vpc["VpcId"] for vpc in vpcs}
    if strangers:
        found.add_problem(
            f"Expected the instances of the cluster `{name}` in its own VPC, found some in "
            f"{', '.join(sorted(strangers))}: another cluster has this name. Set another "
            "cluster_name."
        )
