"""A cluster's life on EC2: the tests of this file follow each other as an admin's days do."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator

import pytest
import yaml
from moto.iam.access_control import IAMPolicy, PermissionResult

from tests.aws.account import Account, Request, by_role, changes, instances, tags, things
from tests.aws.admin import REPOSITORY, Admin

pytestmark = pytest.mark.timeout(600)

NOBODY = ("-e", "reach_seconds=2")  # the hosts are made up: who waits for them waits in vain


@pytest.fixture(scope="module")
def admin(aws: Account, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    yield Admin(
        tmp_path_factory.mktemp("life"), aws, ec2_prices={"t3.large": 0.1, "m5.large": 0.11}
    )


def fields(request: Request, beginning: str) -> dict[str, str]:
    return {
        name.removeprefix(beginning): value
        for name, value in request.parameters.items()
        if name.startswith(beginning)
    }


# --- an empty account ---------------------------------------------------------------------------


def test_a_check_of_an_empty_account_passes_and_makes_nothing(admin: Admin) -> None:
    with admin.aws.recording() as requests:
        play = admin.play("site.yml", "--check")
    assert changes(requests) == []
    assert play.says("Nothing of this cluster is there yet")
    assert play.says("1 x t3.large and 2 x m5.large; 0.32 USD per hour")
    assert requests  # it did look


def test_it_provisions(admin: Admin) -> None:
    with admin.aws.recording() as requests:
        play = admin.play("provision.yml")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}
    assert play.says("debian-12-amd64-20260601")

    # Launch templates, where moto forgets what it was told.
    templates = [r for r in requests if r.action == "CreateLaunchTemplate"]
    assert len(templates) == 2
    for template in templates:
        data = fields(template, "LaunchTemplateData.")
        assert data["MetadataOptions.HttpTokens"] == "required"
        assert data["MetadataOptions.HttpPutResponseHopLimit"] == "1"
        assert data["BlockDeviceMapping.1.DeviceName"] == "/dev/xvda"
        assert data["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert data["BlockDeviceMapping.1.Ebs.VolumeType"] == "gp3"
        assert data["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"
        assert ":instance-profile/fruits/orchard/" in data["IamInstanceProfile.Arn"]
        assert "KeyName" not in data
        assert not any(name.startswith("InstanceMarketOptions") for name in data)
        tagged = {v for name, v in data.items() if name.endswith("ResourceType")}
        assert tagged == {"instance", "volume", "network-interface"}
        user_data = base64.b64decode(data["UserData"]).decode()
        keys = yaml.safe_load(user_data)["ssh_authorized_keys"]
        assert keys == [admin.key.read_text().strip()]

    # What is made is tagged in the request that makes it.
    for request in requests:
        makes = request.service == "ec2" and request.action.startswith("Create")
        if makes and request.action not in ("CreateRoute", "CreateTags"):
            assert "orchard" in fields(request, "TagSpecification.1.Tag.").values(), request
    assert not [
        request for request in requests if request.action in ("CreateAccessKey", "CreateUser")
    ]


def test_the_network_lets_in_members_and_the_admin_only(admin: Admin) -> None:
    ec2 = admin.aws.client("ec2")
    ours = [{"Name": "tag:Cluster", "Values": ["orchard"]}]
    groups = {
        one["GroupName"].rpartition("-")[2]: one
        for one in ec2.describe_security_groups(Filters=ours)["SecurityGroups"]
    }
    assert groups.keys() == {"members", "door"}
    for rule in groups["members"]["IpPermissions"]:
        if rule["FromPort"] == 22:
            assert [one["CidrIp"] for one in rule["IpRanges"]] == ["203.0.113.7/32"]
            assert not rule["UserIdGroupPairs"]
        else:
            assert not rule["IpRanges"] and not rule["Ipv6Ranges"]
            pairs = [pair["GroupId"] for pair in rule["UserIdGroupPairs"]]
            assert pairs == [groups["members"]["GroupId"]]
    (door,) = groups["door"]["IpPermissions"]
    assert (door["FromPort"], door["ToPort"]) == (8443, 8443)
    assert [one["CidrIp"] for one in door["IpRanges"]] == ["203.0.113.7/32"]
    for one in instances(admin.aws):
        names = {group["GroupName"].rpartition("-")[2] for group in one["SecurityGroups"]}
        assert names == ({"members", "door"} if tags(one)["Role"] == "master" else {"members"})
        assert one["PublicIpAddress"]
        assert one["PrivateIpAddress"].startswith("10.80.0.")
    (endpoint,) = ec2.describe_vpc_endpoints(Filters=ours)["VpcEndpoints"]
    assert endpoint["VpcEndpointType"] == "Gateway"
    assert endpoint["ServiceName"].endswith(".s3")
    (table,) = ec2.describe_route_tables(Filters=ours)["RouteTables"]
    assert endpoint["RouteTableIds"] == [table["RouteTableId"]]


def test_the_bucket_is_private_encrypted_and_tls_only(admin: Admin) -> None:
    s3 = admin.aws.client("s3")
    bucket = {"Bucket": "orchard-bucket"}
    assert all(s3.get_public_access_block(**bucket)["PublicAccessBlockConfiguration"].values())
    (rule,) = s3.get_bucket_encryption(**bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (statement,) = json.loads(s3.get_bucket_policy(**bucket)["Policy"])["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    (lifecycle,) = s3.get_bucket_lifecycle_configuration(**bucket)["Rules"]
    assert lifecycle["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 7
    assert lifecycle["NoncurrentVersionExpiration"]["NoncurrentDays"] == 30
    assert "Status" not in s3.get_bucket_versioning(**bucket)


def _allows(document: dict, action: str, resource: str, tagged: dict[str, str]) -> bool:
    """Ask moto's evaluator about each statement: for it, a condition that fails is a denial."""
    results = [
        (
            statement["Effect"],
            IAMPolicy(json.dumps({"Statement": [statement]})).is_action_permitted(
                action, resource=resource, incoming_condition_values=tagged
            ),
        )
        for statement in document["Statement"]
    ]
    return ("Allow", PermissionResult.PERMITTED) in results and (
        "Deny",
        PermissionResult.DENIED,
    ) not in results


BUCKET = "arn:aws:s3:::orchard-bucket"
INSTANCE = "arn:aws:ec2:eu-west-3:123456789012:instance/i-1"
WORKER = {"aws:ResourceTag/Cluster": "orchard", "aws:ResourceTag/Role": "worker"}
MASTER = {"aws:ResourceTag/Cluster": "orchard", "aws:ResourceTag/Role": "master"}
SPOT = {"aws:ResourceTag/Market": "spot"}


@pytest.mark.parametrize(
    ("role", "action", "resource", "tagged", "allowed"),
    [
        ("worker", "s3:ListBucket", BUCKET, {}, True),
        ("worker", "s3:GetObject", f"{BUCKET}/images/apple/1.jpg", {}, True),
        ("worker", "s3:PutObject", f"{BUCKET}/result/features/1.parquet", {}, True),
        ("worker", "s3:DeleteObject", f"{BUCKET}/result/_temporary/1", {}, True),
        ("worker", "s3:AbortMultipartUpload", f"{BUCKET}/result/1", {}, True),
        ("worker", "s3:PutObject", f"{BUCKET}/images/apple/1.jpg", {}, False),
        ("worker", "s3:DeleteObject", f"{BUCKET}/images/apple/1.jpg", {}, False),
        ("worker", "s3:PutBucketPolicy", BUCKET, {}, False),
        ("worker", "s3:DeleteBucket", BUCKET, {}, False),
        ("worker", "s3:ListBucket", "arn:aws:s3:::another", {}, False),
        ("worker", "s3:GetObject", "arn:aws:s3:::another/x", {}, False),
        ("worker", "s3:GetObject", "arn:aws:s3:::orchard-bucket-2/x", {}, False),
        ("worker", "s3:ListAllMyBuckets", "*", {}, False),
        ("worker", "ec2:StopInstances", INSTANCE, WORKER, False),
        ("worker", "ec2:DescribeInstances", "*", {}, False),
        ("worker", "iam:PassRole", "*", {}, False),
        ("master", "s3:PutObject", f"{BUCKET}/images/apple/1.jpg", {}, True),
        ("master", "s3:GetObject", f"{BUCKET}/spark-events/1", {}, True),
        ("master", "s3:PutObject", "arn:aws:s3:::another/x", {}, False),
        ("master", "s3:PutBucketPolicy", BUCKET, {}, False),
        ("master", "ec2:DescribeInstances", "*", {}, True),
        ("master", "ec2:StopInstances", INSTANCE, WORKER, True),
        ("master", "ec2:StopInstances", INSTANCE, MASTER, True),
        ("master", "ec2:StopInstances", INSTANCE, {"aws:ResourceTag/Cluster": "other"}, False),
        ("master", "ec2:StopInstances", INSTANCE, {"aws:ResourceTag/Cluster": ""}, False),
        ("master", "ec2:TerminateInstances", INSTANCE, WORKER | SPOT, True),
        ("master", "ec2:TerminateInstances", INSTANCE, WORKER, False),
        ("master", "ec2:TerminateInstances", INSTANCE, MASTER | SPOT, False),
        ("master", "ec2:RunInstances", "*", {}, False),
        ("master", "ec2:StartInstances", INSTANCE, MASTER, False),
        ("master", "iam:PassRole", "*", {}, False),
    ],
)
def test_a_role_may_do_what_the_job_needs_and_nothing_else(
    admin: Admin, role: str, action: str, resource: str, tagged: dict[str, str], allowed: bool
) -> None:
    iam = admin.aws.client("iam")
    name = f"fruits-orchard-{role}"
    assert iam.list_role_policies(RoleName=name)["PolicyNames"] == ["fruits"]
    assert not iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
    document = iam.get_role_policy(RoleName=name, PolicyName="fruits")["PolicyDocument"]
    assert _allows(document, action, resource, tagged) == allowed


def test_a_check_of_a_full_account_changes_nothing(admin: Admin) -> None:
    with admin.aws.recording() as requests:
        play = admin.play("provision.yml", "--check")
    assert play.changed == 0  # that a run without --check changes nothing is in test_failures.py
    assert changes(requests) == []
    assert play.says("there now: 2")


def test_the_inventory_gives_what_a_static_one_gives(admin: Admin) -> None:
    found = {f"{tags(one)['Role']}-{one['InstanceId']}": one for one in instances(admin.aws)}
    names = {
        "master": sorted(name for name in found if name.startswith("master-")),
        "workers": sorted(name for name in found if name.startswith("worker-")),
    }
    assert [len(names["master"]), len(names["workers"])] == [1, 2]

    # The hosts and variables by which configure.yml works are those of a static inventory.
    static = admin.folder / "inventory/hosts.yml"
    hosts = {
        group: {"hosts": {name: {"ansible_host": found[name]["PublicIpAddress"]} for name in here}}
        for group, here in names.items()
    }
    content = {"all": {"vars": {"ansible_user": "admin"}, "children": hosts}}
    static.write_text(yaml.safe_dump(content))
    shown = [
        f"{names['master']} {names['workers']} admin {one['PublicIpAddress']} orchard-bucket"
        for one in found.values()
    ]
    for inventory in ("aws_ec2.yml", "hosts.yml"):
        show = (
            "{{ groups.master }} {{ groups.workers | sort }} {{ ansible_user }} {{ ansible_host }}"
        )
        run = admin.run(
            *("ansible", "-i", str(static.with_name(inventory)), "master:workers"),
            *("-m", "ansible.builtin.debug", "-a", f"msg='{show} {{{{ cluster_bucket }}}}'"),
        )
        assert run.returncode == 0, run.stderr
        assert sorted(re.findall(r"\[.master-.*orchard-bucket", run.stdout)) == sorted(shown)
    static.unlink()


# --- the verbs -----------------------------------------------------------------------------------


def test_the_status_names_instances_hours_and_costs(admin: Admin) -> None:
    with admin.aws.recording() as requests:
        play = admin.play("status.yml")
    assert changes(requests) == []
    for one in instances(admin.aws):
        assert play.says(one["InstanceId"])
        assert play.says(one["PublicIpAddress"])
    assert play.says("0.32 USD per hour")
    assert play.says("s3a://orchard-bucket (ours)")
    assert play.says("The master cannot be asked")


def test_it_grows(admin: Admin) -> None:
    before = {one["InstanceId"] for one in instances(admin.aws)}
    # The new hosts are made up: the playbook gets as far as waiting for them.
    admin.play("scale.yml", "-e", "workers=3", *NOBODY, fails=True)
    after = {one["InstanceId"] for one in instances(admin.aws)}
    assert by_role(admin.aws) == {"master": 1, "worker": 3}
    assert before < after
    # Said again, it goes on where it failed, with those that were launched.
    play = admin.play("scale.yml", "-e", "workers=3", *NOBODY, fails=True)
    assert play.says("PLAY [Wait for SSH]")
    assert {one["InstanceId"] for one in instances(admin.aws)} == after


def test_it_shrinks_after_a_drain_and_keeps_the_oldest_and_the_master(admin: Admin) -> None:
    workers = sorted(
        (one for one in instances(admin.aws) if tags(one)["Role"] == "worker"),
        key=lambda one: (one["LaunchTime"], one["InstanceId"]),
    )
    admin.ssh_log.write_text("")
    with admin.aws.recording() as requests:
        # The hosts that stay are made up: the playbook gets as far as closing their firewalls.
        play = admin.play("scale.yml", "-e", "workers=2", *NOBODY, fails=True)
    assert play.says("PLAY [Close the firewalls of those that stay]")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}
    (ended,) = [request for request in requests if request.action == "TerminateInstances"]
    assert fields(ended, "InstanceId.") == {"1": workers[-1]["InstanceId"]}
    # It was asked to hand over what it holds before anybody else was asked anything.
    asked = re.findall(r"HostKeyAlias=(i-\w+)", admin.ssh_log.read_text())
    assert asked[0] == workers[-1]["InstanceId"]
    assert len(set(asked)) == 4


def test_it_does_not_shrink_to_nothing(admin: Admin) -> None:
    play = admin.play("scale.yml", "-e", "workers=0", fails=True)
    assert play.says("Expected -e workers=N with 1 or more")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}


def test_it_stops_and_keeps_everything(admin: Admin) -> None:
    admin.ssh_log.write_text("")
    admin.play("stop.yml", *NOBODY)
    assert by_role(admin.aws, "stopped") == {"master": 1, "worker": 2}
    log = admin.ssh_log.read_text()
    for one in instances(admin.aws):
        assert (one["InstanceId"] in log) == (tags(one)["Role"] == "worker")


def test_it_starts_again_with_the_same_instances(admin: Admin) -> None:
    before = {one["InstanceId"] for one in instances(admin.aws)}
    with admin.aws.recording() as requests:
        admin.play("provision.yml")  # what start.yml begins with
    assert by_role(admin.aws) == {"master": 1, "worker": 2}
    assert {one["InstanceId"] for one in instances(admin.aws)} == before
    assert "RunInstances" not in {request.action for request in requests}


def test_it_says_how_to_get_in_and_opens_the_door(admin: Admin) -> None:
    admin.set(ec2_admin_cidrs=["198.51.100.0/24"])
    play = admin.play("connect.yml", "-e", "open=true")
    (master,) = [one for one in instances(admin.aws) if tags(one)["Role"] == "master"]
    assert play.says(f"https://{master['PublicIpAddress']}:8443")
    assert play.says("ssh -N -L 8443:127.0.0.1:8443")
    groups = admin.aws.client("ec2").describe_security_groups(
        Filters=[{"Name": "tag:Cluster", "Values": ["orchard"]}]
    )["SecurityGroups"]
    open_to = {
        block["CidrIp"]
        for group in groups
        for rule in group["IpPermissions"]
        for block in rule["IpRanges"]
    }
    assert open_to == {"198.51.100.0/24"}


def test_it_uploads_and_a_second_run_has_nothing_to_send(admin: Admin) -> None:
    images = admin.folder / "fruit"
    for label in ("Apple Red 1", "Kiwi"):
        (images / label).mkdir(parents=True)
        (images / label / "0.jpg").write_bytes(b"picture of " + label.encode())
    (images / "Empty").mkdir()
    (images / "loose.jpg").write_bytes(b"beside the folders")
    # The account of loopback has no TLS, and the bucket takes nothing without: it is let in here.
    admin.aws.client("s3").delete_bucket_policy(Bucket="orchard-bucket")
    # S3 by the settings of Spark, as on the other machines; here they lead to the account.
    conf = admin.folder / "conf"
    conf.mkdir()
    settings = {"endpoint": admin.aws.url, "access.key": "AKIA", "secret.key": "made-up"}
    (conf / "spark-defaults.conf").write_text(
        "".join(f"spark.hadoop.fs.s3a.{name} {value}\n" for name, value in settings.items())
    )
    first = admin.play("upload.yml", "-e", f"images={images}")
    assert first.changed == 1
    listed = admin.aws.client("s3").list_objects_v2(Bucket="orchard-bucket")["Contents"]
    names = ["images/Apple Red 1/0.jpg", "images/Kiwi/0.jpg", "images/loose.jpg"]
    assert [one["Key"] for one in listed] == names
    assert first.says("3 files sent to s3a://orchard-bucket/images")
    assert admin.play("upload.yml", "-e", f"images={images}").changed == 0


# --- the end -------------------------------------------------------------------------------------


def test_it_is_destroyed_by_its_name_only(admin: Admin) -> None:
    play = admin.play("destroy.yml", "-e", "destroy=orchard", "-e", "bucket=x", fails=True)
    assert play.says("Expected -e destroy=orchard")
    assert by_role(admin.aws) == {"master": 1, "worker": 2}


def test_it_is_destroyed_and_the_bucket_stays(admin: Admin) -> None:
    play = admin.play("destroy.yml", "-e", "destroy=orchard")
    assert things(admin.aws) == []
    assert play.says("Left of the cluster orchard: nothing")
    assert play.says("The bucket orchard-bucket stays and is paid for")
    assert admin.aws.client("s3").list_objects_v2(Bucket="orchard-bucket")["KeyCount"] == 3


def test_destroyed_again_it_finds_nothing_and_the_bucket_goes_when_named(admin: Admin) -> None:
    play = admin.play("destroy.yml", "-e", "destroy=orchard", "-e", "bucket=orchard-bucket")
    assert play.changed == 1
    names = [one["Name"] for one in admin.aws.client("s3").list_buckets()["Buckets"]]
    assert "orchard-bucket" not in names
    with admin.aws.recording() as requests:
        again = admin.play("destroy.yml", "-e", "destroy=orchard", "-e", "bucket=orchard-bucket")
    assert again.changed == 0
    assert changes(requests) == []


def test_the_admins_policy_allows_all_that_was_asked(admin: Admin) -> None:
    policy = json.loads((REPOSITORY / "ansible/admin-policy.json").read_text())
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    asked = {f"{r.service}:{r.action}" for r in admin.aws.requests if r.service in ("ec2", "iam")}
    assert len(asked) > 40
    assert asked <= allowed
