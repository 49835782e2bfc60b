"""What the playbooks ask of AWS where Ansible has no module: looks, and changes nothing.

    python -m pipeline.cluster.ec2 look < knobs.json   the knobs, and the account as they want it
    python -m pipeline.cluster.ec2 host-keys INSTANCE ...        as the consoles printed them
    python -m pipeline.cluster.ec2 with-credentials COMMAND      run it with those of this moment

The first two print JSON. `look` collects every problem it finds, so that an admin mends them in one
go.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.cluster.knobs import mistakes

SMALLEST_MEMORY_MB = 4096
LIVE = ["pending", "running", "stopping", "stopped"]
# The quotas that count vCPUs of the standard families.
STANDARD = re.compile(r"(a|c|d|h|i|im|is|m|r|t|z)[0-9]")
QUOTAS = {"on-demand": "L-1216C47A", "spot": "L-34B43A08"}
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
DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}
PUBLIC_KEY = re.compile(r"(ssh-(rsa|ed25519)|ecdsa-sha2-\S+|sk-\S+) AAAA\S+")
HOST_KEYS = re.compile(
    r"-----BEGIN SSH HOST KEY KEYS-----(.*?)-----END SSH HOST KEY KEYS-----", re.DOTALL
)


@dataclass
class Account:
    """What was found, and in `problems` what must be mended before anything is made."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    account: str = ""
    caller: str = ""
    zone: str = ""
    cost: str = ""
    types: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    instances: list[dict[str, Any]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    things: dict[str, list[str]] = field(default_factory=dict)
    loose_volumes: list[str] = field(default_factory=list)
    subnets: list[dict[str, str]] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)
    bucket: str = "unknown"
    bucket_gb: float | None = None


class Look:
    """Asks AWS, question by question.

    Parameters
    ----------
    knobs
        The settings of the role `ec2` that a question depends on; `ansible/roles/ec2` sends them.
    """

    def __init__(self, knobs: Mapping[str, Any]) -> None:
        self.knobs = knobs
        self.found = Account()
        self.session = boto3.Session(region_name=knobs["region"])
        self._clients: dict[str, Any] = {}

    def everything(self) -> Account:
        """Ask all there is to ask; with wrong knobs nothing, without credentials only those."""
        self.found.problems += mistakes(self.knobs)
        if self.found.problems or not self._region():
            return self.found
        with self._explained("sts"):
            who = self._client("sts").get_caller_identity()
            self.found.account, self.found.caller = who["Account"], who["Arn"]
        if not self.found.caller:
            return self.found
        with self._explained("ec2"):
            self._instances()
            self._things()
        with self._explained("s3"):
            self._bucket()
        if self.knobs.get("size_of_bucket"):
            with self._explained("cloudwatch"):
                self._bucket_size()
        if self.knobs.get("provision"):
            self._public_key()
            for question in (self._network, self._types, self._images, self._templates):
                with self._explained("ec2"):
                    question()
            with self._explained("service-quotas"):
                self._quota()
            with self._explained("iam"):
                self._permissions()
        self._cost()
        return self.found

    def _client(self, service: str) -> Any:
        """Return the client of a service; making one takes a good part of a second."""
        if service not in self._clients:
            self._clients[service] = self.session.client(service)
        return self._clients[service]

    def _region(self) -> bool:
        region = self.knobs["region"]
        known = self.session.get_available_regions("ec2")
        if region not in known:
            close = ", ".join(get_close_matches(region, known)) or "eu-west-3, for one"
            self._problem(
                f"expected the name of an AWS region in cluster_region, found `{region}`; "
                f"try {close}."
            )
        return region in known

    def _instances(self) -> None:
        pages = self._client("ec2").get_paginator("describe_instances")
        wanted = [
            {"Name": "tag:Cluster", "Values": [self.knobs["cluster"]]},
            {"Name": "instance-state-name", "Values": LIVE},
        ]
        for page in pages.paginate(Filters=wanted):
            for reservation in page["Reservations"]:
                self.found.instances += map(_instance, reservation["Instances"])
        self.found.instances.sort(key=lambda one: (one["launched"], one["id"]))
        columns = ("role", "id", "type", "market", "state", "public", "private", "hours")
        rows = [[str(one[name]) for name in columns] for one in self.found.instances]
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        if rows:
            self.found.table = [
                "  ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
                for row in ([*columns], *rows)
            ]

    def _things(self) -> None:
        """Find what carries the cluster's tag, by type, as far as it still exists."""
        ec2 = self._client("ec2")
        ours = [{"Name": "tag:Cluster", "Values": [self.knobs["cluster"]]}]
        things = {"instance": [one["id"] for one in self.found.instances]}
        for kind, (call, key, name) in TAGGED.items():
            found = [
                one
                for page in ec2.get_paginator(call).paginate(Filters=ours)
                for one in page[key]
                if one.get("State") not in ("deleting", "deleted")
            ]
            things[kind] = [one[name] for one in found]
            if kind == "subnet":
                self.found.subnets = [
                    {"vpc": one["VpcId"], "cidr": one["CidrBlock"]} for one in found
                ]
            if kind == "volume":
                self.found.loose_volumes = [
                    one[name] for one in found if one["State"] == "available"
                ]
        with self._explained("iam"):
            things["role"] = self._roles()
        self.found.things = {kind: sorted(ids) for kind, ids in things.items() if ids}

    def _roles(self) -> list[str]:
        iam, path = self._client("iam"), self.knobs["iam_path"]
        profiles = iam.list_instance_profiles(PathPrefix=path)["InstanceProfiles"]
        roles = iam.list_roles(PathPrefix=path)["Roles"]
        names = {one["InstanceProfileName"] for one in profiles}
        return sorted(names | {one["RoleName"] for one in roles})

    def _network(self) -> None:
        name, network = self.knobs["cluster"], self.knobs["network"]
        wanted = [{"Name": "tag:Cluster", "Values": [name]}]
        vpcs = self._client("ec2").describe_vpcs(Filters=wanted)["Vpcs"]
        ours = {vpc["VpcId"] for vpc in vpcs}
        if len(vpcs) > 1 or any(vpc["CidrBlock"] != network for vpc in vpcs):
            seen = ", ".join(f"{vpc['VpcId']} {vpc['CidrBlock']}" for vpc in vpcs)
            self._problem(
                f"expected one VPC {network} of the cluster `{name}`, found {seen}. Set "
                "ec2_network to its network, or give this cluster another cluster_name."
            )
        strangers = {one["vpc"] for one in self.found.instances} - ours
        if strangers:
            self._problem(
                f"expected the instances of the cluster `{name}` in its own VPC, found some in "
                f"{', '.join(sorted(strangers))}: another cluster has this name. Set another "
                "cluster_name."
            )

    def _public_key(self) -> None:
        file = Path(self.knobs["public_key"]).expanduser()
        try:
            text = file.read_text().strip()
        except OSError as error:
            found = error.strerror
        else:
            if PUBLIC_KEY.match(text):
                return
            found = "something else"
        self._problem(
            f"expected an SSH public key in {file} (ec2_ssh_public_key), found: {found}. "
            "Name the right file, or make a key: ssh-keygen -t ed25519"
        )

    def _zone(self, names: set[str]) -> None:
        """Choose the zone of the subnet: not every zone of a region has every type."""
        ec2 = self._client("ec2")
        subnets = ec2.describe_subnets(
            Filters=[{"Name": "tag:Cluster", "Values": [self.knobs["cluster"]]}]
        )["Subnets"]
        offers: dict[str, set[str]] = defaultdict(set)
        pages = ec2.get_paginator("describe_instance_type_offerings")
        wanted = [{"Name": "instance-type", "Values": sorted(names)}]
        for page in pages.paginate(LocationType="availability-zone", Filters=wanted):
            for offer in page["InstanceTypeOfferings"]:
                offers[offer["Location"]].add(offer["InstanceType"])
        zones = sorted(zone for zone, types in offers.items() if names <= types)
        there = [subnet["AvailabilityZone"] for subnet in subnets]
        self.found.zone = (there or zones or [""])[0]
        missing = names - set().union(*offers.values())
        for name in sorted(missing):
            close = get_close_matches(name, self._all_types()) or ["m5.large"]
            self._problem(
                f"expected an instance type that {self.knobs['region']} has, found `{name}`; set "
                f"ec2_master_type and ec2_worker_type: {', '.join(close)}, for one."
            )
        if not missing and self.found.zone not in zones:
            self._problem(
                f"expected one zone of {self.knobs['region']} with {' and '.join(sorted(names))}, "
                f"found {', '.join(zones) or 'none'}, and the subnet is in "
                f"{self.found.zone or 'none'}; set ec2_master_type and ec2_worker_type."
            )

    def _all_types(self) -> list[str]:
        pages = self._client("ec2").get_paginator("describe_instance_type_offerings")
        return [
            one["InstanceType"]
            for page in pages.paginate()
            for one in page["InstanceTypeOfferings"]
        ]

    def _types(self) -> None:
        names = {self.knobs["master_type"], self.knobs["worker_type"]}
        self._zone(names)
        wanted = [{"Name": "instance-type", "Values": sorted(names)}]
        answer = self._client("ec2").describe_instance_types(Filters=wanted)
        for one in answer["InstanceTypes"]:
            name, memory = one["InstanceType"], one["MemoryInfo"]["SizeInMiB"]
            architectures = one["ProcessorInfo"]["SupportedArchitectures"]
            self.found.types[name] = {
                "vcpus": one["VCpuInfo"]["DefaultVCpus"],
                "memory_mb": memory,
                "architecture": "arm64" if "arm64" in architectures else "x86_64",
            }
            if memory < SMALLEST_MEMORY_MB:
                self._problem(
                    f"expected an instance type with 4 GiB of memory or more (Java, Spark and a "
                    f"network in each Python process need it), found {name} with "
                    f"{memory / 1024:g} GiB; the smallest that fits is t3.medium."
                )
        if self.knobs["spot"] and "spot" not in next(
            (
                one["SupportedUsageClasses"]
                for one in answer["InstanceTypes"]
                if one["InstanceType"] == self.knobs["worker_type"]
            ),
            ["spot"],
        ):
            self._problem(
                f"expected a worker type that is sold as spot, found {self.knobs['worker_type']}; "
                "set ec2_spot: false, or another ec2_worker_type."
            )

    def _images(self) -> None:
        disk_gb = {
            self.knobs["master_type"]: self.knobs["master_disk_gb"],
            self.knobs["worker_type"]: self.knobs["worker_disk_gb"],
        }
        for name, kind in self.found.types.items():
            image = self._image(kind["architecture"])
            if image is None:
                self._problem(
                    f"expected an image (AMI) for {kind['architecture']} in "
                    f"{self.knobs['region']}, found none for "
                    f"{self.knobs['image'] or self.knobs['image_name']}; set ec2_image."
                )
                continue
            self.found.images[name] = image
            if disk_gb[name] < image["smallest_gb"]:
                self._problem(
                    f"expected a disk of {image['smallest_gb']} GiB or more for {name}, which "
                    f"{image['name']} needs, found {disk_gb[name]}; set ec2_master_disk_gb and "
                    "ec2_worker_disk_gb."
                )

    def _image(self, architecture: str) -> dict[str, Any] | None:
        wanted = {"architecture": architecture, "state": "available"}
        owners = {}
        if self.knobs["image"]:
            wanted["image-id"] = self.knobs["image"]
        else:
            wanted["name"] = self.knobs["image_name"].format(
                architecture="amd64" if architecture == "x86_64" else architecture
            )
            owners = {"Owners": [self.knobs["image_owner"]]}
        images = self._client("ec2").describe_images(
            Filters=[{"Name": name, "Values": [value]} for name, value in wanted.items()],
            **owners,
        )["Images"]
        if not images:
            return None
        newest = max(images, key=lambda image: image["CreationDate"])
        disks = [mapping.get("Ebs", {}) for mapping in newest.get("BlockDeviceMappings", [])]
        return {
            "id": newest["ImageId"],
            "name": newest.get("Name", newest["ImageId"]),
            "root": newest["RootDeviceName"],
            "smallest_gb": max((disk.get("VolumeSize", 0) for disk in disks), default=0),
        }

    def _templates(self) -> None:
        """Find how instances were described last: what the newest version says of itself."""
        for template in self.found.things.get("launch-template", []):
            answer = self._client("ec2").describe_launch_template_versions(
                LaunchTemplateId=template, Versions=["$Latest"]
            )
            for one in answer["LaunchTemplateVersions"]:
                self.found.templates[one["LaunchTemplateName"]] = one.get("VersionDescription", "")

    def _quota(self) -> None:
        """Compare the vCPUs that will be launched with the quota, if it may be read.

        Of a type that does not exist, which is a problem of its own, nothing is launched.
        """
        vcpus = {name: kind["vcpus"] for name, kind in self.found.types.items()}
        wanted = vcpus.keys() & {self.knobs["master_type"], self.knobs["worker_type"]}
        if other := sorted(name for name in wanted if not STANDARD.match(name)):
            self.found.notes.append(f"{', '.join(other)} has a vCPU quota of its own, not checked")
            return
        there = {
            role: sum(one["role"] == role for one in self.found.instances)
            for role in ("master", "worker")
        }
        needed = {"on-demand": 0, "spot": 0}
        master, worker = self.knobs["master_type"], self.knobs["worker_type"]
        needed["on-demand"] += (1 - there["master"]) * vcpus.get(master, 0)
        needed["spot" if self.knobs["spot"] else "on-demand"] += max(
            0, self.knobs["workers"] - there["worker"]
        ) * vcpus.get(worker, 0)
        used = self._vcpus_in_use()
        quotas = self._client("service-quotas")
        for market, more in needed.items():
            if more <= 0:
                continue
            try:
                answer = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=QUOTAS[market])
            except (BotoCoreError, ClientError) as error:
                self.found.notes.append(f"the vCPU quota could not be read: {_reason(error)}")
                return
            quota = answer["Quota"]["Value"]
            if used[market] + more > quota:
                self._problem(
                    f"expected a quota of {used[market] + more} vCPUs for {market} instances "
                    f"({more} to launch, {used[market]} in use), found {quota:g}; ask AWS for "
                    f"more (Service Quotas, {QUOTAS[market]}), or take fewer or smaller instances."
                )

    def _cost(self) -> None:
        """Name the instance hours, and their price if the admin wrote one down for each type."""
        if self.knobs.get("provision"):
            workers = sum(one["role"] == "worker" for one in self.found.instances)
            types = [self.knobs["master_type"]]
            types += [self.knobs["worker_type"]] * max(self.knobs["workers"], workers)
        else:
            types = [one["type"] for one in self.found.instances if one["state"] == "running"]
        hours = Counter(types)
        prices = self.knobs["prices"]
        parts = " and ".join(f"{count} x {name}" for name, count in hours.items()) or "no instance"
        if unpriced := sorted(hours.keys() - prices.keys()):
            money = f"ec2_prices has no price of {', '.join(unpriced)}"
        else:
            money = f"{sum(count * prices[name] for name, count in hours.items()):.4g} USD per hour"
        self.found.cost = f"{parts}; {money}"

    def _vcpus_in_use(self) -> dict[str, int]:
        used = {"on-demand": 0, "spot": 0}
        pages = self._client("ec2").get_paginator("describe_instances")
        running = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        for page in pages.paginate(Filters=running):
            for reservation in page["Reservations"]:
                for one in reservation["Instances"]:
                    if not STANDARD.match(one["InstanceType"]):
                        continue
                    cpu = one.get("CpuOptions", {})
                    market = "spot" if one.get("InstanceLifecycle") == "spot" else "on-demand"
                    used[market] += cpu.get("CoreCount", 0) * cpu.get("ThreadsPerCore", 0)
        return used

    def _bucket(self) -> None:
        name = self.knobs["bucket"]
        try:
            answer = self._client("s3").head_bucket(
                Bucket=name, ExpectedBucketOwner=self.found.account
            )
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            self.found.bucket = {404: "free", 301: "elsewhere"}.get(status, "taken")
            free = self.found.bucket == "free"
            if free and self.found.instances and self.knobs.get("provision"):
                self._cluster_of_another()
        else:
            # The client has followed S3 to the bucket's region by itself.
            region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
            here = region in (None, self.knobs["region"])
            self.found.bucket = "ours" if here else "elsewhere"
            if here and self.knobs.get("provision"):
                self._bucket_of_another(name)
        if self.found.bucket in ("elsewhere", "taken") and self.knobs.get("provision"):
            where = "in another region" if self.found.bucket == "elsewhere" else "someone else's"
            self._problem(
                f"expected the bucket `{name}` to be free or this account's, in "
                f"{self.knobs['region']}; found it {where}, or not for {self.found.caller} to "
                "see. Set another cluster_bucket: names are shared by the whole world."
            )

    def _cluster_of_another(self) -> None:
        """Refuse to take over instances: their roles would lose the bucket that they have."""
        name, bucket = self.knobs["cluster"], self.knobs["bucket"]
        self._problem(
            f"expected no instance of a cluster `{name}` yet, or its bucket to be `{bucket}`, "
            f"found {len(self.found.instances)} that have another: somebody else's cluster has "
            "this name. Set another cluster_name. To give yours another bucket, make that one, tag "
            f"it Cluster: {name}, and run again."
        )

    def _bucket_of_another(self, name: str) -> None:
        """Refuse a bucket that holds something and is not this cluster's: its policy would go."""
        s3 = self._client("s3")
        try:
            tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchTagSet":
                raise
            tags = []
        cluster = self.knobs["cluster"]
        if {"Key": "Cluster", "Value": cluster} in tags:
            return
        if self.found.instances:
            self._cluster_of_another()
            return
        if s3.list_objects_v2(Bucket=name, MaxKeys=1)["KeyCount"]:
            self._problem(
                f"expected the bucket `{name}` to be new, empty or this cluster's, found it with "
                f"something in it and without the tag Cluster: {cluster}. The cluster sets its "
                "policy, encryption and ownership anew: set another cluster_bucket, or tag it."
            )

    def _bucket_size(self) -> None:
        """Take the size from CloudWatch, once a day: a listing of millions of objects is slow."""
        if self.found.bucket != "ours":
            return
        now = datetime.now(UTC)
        points = self._client("cloudwatch").get_metric_statistics(
            Namespace="AWS/S3",
            MetricName="BucketSizeBytes",
            Dimensions=[
                {"Name": "BucketName", "Value": self.knobs["bucket"]},
                {"Name": "StorageType", "Value": "StandardStorage"},
            ],
            StartTime=now - timedelta(days=3),
            EndTime=now,
            Period=86400,
            Statistics=["Average"],
        )["Datapoints"]
        if points:
            newest = max(points, key=lambda point: point["Timestamp"])
            self.found.bucket_gb = round(newest["Average"] / 1e9, 3)

    def _permissions(self) -> None:
        """Name the permissions that are missing, if the caller may ask IAM for it."""
        source = self.found.caller
        if source.endswith(":root"):
            return
        policy = json.loads(Path(self.knobs["admin_policy"]).read_text())
        iam = self._client("iam")
        pages = iam.get_paginator("simulate_principal_policy")
        denied: list[str] = []
        try:
            role = re.match(r"arn:.*:sts::\d+:assumed-role/([^/]+)/", source)
            if role:  # its path, which roles of single sign-on have, is not in the session's name
                source = iam.get_role(RoleName=role[1])["Role"]["Arn"]
            for statement in policy["Statement"]:
                resources = [
                    one.replace("::*:", f"::{self.found.account}:").replace("/*", "/fruits")
                    for one in statement["Resource"]
                ]
                for page in pages.paginate(
                    PolicySourceArn=source,
                    ActionNames=statement["Action"],
                    ResourceArns=resources,
                ):
                    denied += [
                        one["EvalActionName"]
                        for one in page["EvaluationResults"]
                        if one["EvalDecision"] != "allowed" and not one.get("MissingContextValues")
                    ]
        except (BotoCoreError, ClientError) as error:
            self.found.notes.append(f"permissions could not be checked: {_reason(error)}")
            return
        if denied:
            self._problem(
                f"expected {source} to be allowed what ansible/admin-policy.json lists, found "
                f"these missing: {', '.join(sorted(set(denied)))}. Give it that policy."
            )

    def _problem(self, text: str) -> None:
        """Note a problem, once: a permission that is missing may be missed by several questions."""
        problem = text[0].upper() + text[1:]
        if problem not in self.found.problems:
            self.found.problems.append(problem)

    @contextmanager
    def _explained(self, service: str) -> Iterator[None]:
        """Turn an error of AWS into a problem that says what to do."""
        try:
            yield
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in DENIED:
                self._problem(
                    f"expected the permission {service}:{error.operation_name} for "
                    f"{self.found.caller}, found it missing; ansible/admin-policy.json lists all "
                    "that an admin needs."
                )
            else:
                self._problem(
                    f"expected AWS credentials that are valid, found: {_reason(error)}. Get new "
                    "ones (aws sso login, for one), then run again."
                    if service == "sts"
                    else f"expected an answer to {service}:{error.operation_name}, found: "
                    f"{_reason(error)}. Run again."
                )
        except BotoCoreError as error:
            self._problem(
                f"expected AWS to answer ({service}), found: {error}. Set AWS_PROFILE or the "
                "AWS_* variables of your credentials, check the network, then run again."
            )


def _instance(one: Mapping[str, Any]) -> dict[str, Any]:
    tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])}
    hours = (datetime.now(UTC) - one["LaunchTime"]).total_seconds() / 3600
    state = one["State"]["Name"]
    return {
        "id": one["InstanceId"],
        "role": tags.get("Role", ""),
        "market": tags.get("Market", ""),
        "type": one["InstanceType"],
        "state": state,
        "public": one.get("PublicIpAddress", ""),
        "private": one.get("PrivateIpAddress", ""),
        "launched": one["LaunchTime"].isoformat(),
        "hours": round(hours, 1) if state == "running" else 0.0,
        "vpc": one.get("VpcId", ""),
    }


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        return f"{error.response['Error']['Code']} ({error.response['Error'].get('Message', '')})"
    return str(error)


def host_keys(ec2: Any, instances: Sequence[str]) -> dict[str, list[str]]:
    """Return the SSH host keys that cloud-init printed on each console.

    Parameters
    ----------
    ec2
        A client of EC2.
    instances
        Ids; one whose console has no keys yet (it takes minutes) has an empty list.
    """
    keys = {}
    for instance in instances:
        output = ec2.get_console_output(InstanceId=instance).get("Output", "")
        printed = HOST_KEYS.search(_console(output))
        lines = printed[1].split("\n") if printed else []
        # Each line may follow a time stamp of the kernel; a comment comes last.
        found = (PUBLIC_KEY.search(line) for line in lines)
        keys[instance] = [match[0] for match in found if match]
    return keys


def _console(output: str) -> str:
    """Return the text of a console, which some clients get still encoded."""
    if "SSH HOST KEY" in output:
        return output
    try:
        return base64.b64decode(output, validate=True).decode(errors="replace")
    except ValueError:
        return output


def credentials() -> dict[str, str]:
    """Return the caller's credentials as variables, for a program that knows no profiles or SSO."""
    found = boto3.Session().get_credentials()
    if found is None:
        sys.exit("expected AWS credentials, found none; set AWS_PROFILE or the AWS_* variables.")
    frozen = found.get_frozen_credentials()
    variables = {
        "AWS_ACCESS_KEY_ID": frozen.access_key,
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key,
        "AWS_SESSION_TOKEN": frozen.token,
    }
    return {name: value for name, value in variables.items() if value}


def main(arguments: list[str]) -> None:
    """Run one of the commands that the playbooks call."""
    match arguments:
        case ["look"]:
            print_json(asdict(Look(json.load(sys.stdin)).everything()))
        case ["host-keys", *instances] if instances:
            ec2 = boto3.client("ec2", region_name=os.environ["AWS_DEFAULT_REGION"])
            print_json(host_keys(ec2, instances))
        case ["with-credentials", command, *words]:
            os.execvpe(command, [command, *words], os.environ | credentials())  # noqa: S606
        case _:
            sys.exit(__doc__)


def print_json(content: Any) -> None:
    """Write what a playbook reads."""
    sys.stdout.write(f"{json.dumps(content)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
