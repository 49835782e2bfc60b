"""Mistakes are told in a clear line before anything is made."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.aws.account import REGION, Account, Answer, Request, Rule, error, quota, simulation
from tests.aws.admin import Admin

pytestmark = pytest.mark.timeout(300)
NUMBERS = itertools.count(1)


@pytest.fixture
def admin(aws: Account, tmp_path: Path) -> Admin:
    """An admin with a cluster of a name of its own."""
    number = next(NUMBERS)
    return Admin(tmp_path, aws, cluster_name=f"mistake{number}", cluster_bucket=f"mistake-{number}")


def refused(admin: Admin, *rules: Rule) -> str:
    """Provision; expect a refusal and that nothing was made; return what was said."""
    with ExitStack() as stack:
        stack.enter_context(admin.aws.answering(*rules))
        requests = stack.enter_context(admin.aws.recording())
        play = admin.play("provision.yml", fails=True)
    assert [request.action for request in requests if request.changes_something] == []
    return " ".join(play.output.replace("\\n", " ").split())


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"ec2_admin_cidrs": ["0.0.0.0/0"]}, "only with `ec2_open_to_world: true` beside it"),
        ({"ec2_admin_cidrs": ["everyone"]}, "such as 203.0.113.7/32, or `mine`; found everyone"),
        ({"ec2_admin_cidrs": []}, "or `mine`; found none"),
        ({"cluster_bucket": "Not_A_Bucket"}, "found `Not_A_Bucket`"),
        ({"cluster_bucket": "a.dot"}, "a dot breaks TLS), found `a.dot`"),
        ({"cluster_name": "Orchard!"}, "found `Orchard!`"),
        ({"ec2_workers": 0}, "Expected `ec2_workers` of 1 or more"),
        ({"ec2_workrs": 3}, "Expected only knobs that exist, found ec2_workrs"),
        ({"cluster_metric": True}, "Expected only knobs that exist, found cluster_metric"),
        ({"cluster_s3_access_key": "AKIA"}, "Expected no access key: the instances have a role"),
    ],
)
def test_a_wrong_knob_is_told_without_asking_aws(
    admin: Admin, knobs: dict[str, object], says: str
) -> None:
    admin.set(**knobs)
    with admin.aws.recording() as requests:
        said = refused(admin)
    assert says in said
    # The inventory looked for hosts; nothing else was asked.
    assert {request.action for request in requests} <= {"DescribeInstances"}


def test_the_world_is_let_in_when_said_twice(admin: Admin) -> None:
    admin.set(ec2_admin_cidrs=["0.0.0.0/0"], ec2_open_to_world=True)
    play = admin.play("provision.yml", "--check")
    assert play.says("SSH and JupyterLab for: 0.0.0.0/0")


def test_this_machines_address_is_found(admin: Admin) -> None:
    def service(request: Request) -> Answer | None:
        return Answer(200, "192.0.2.44\n") if request.action == "GET /my-address" else None

    admin.set(ec2_admin_cidrs=["mine"], ec2_address_service=f"{admin.aws.url}/my-address")
    with admin.aws.answering(service):
        play = admin.play("provision.yml", "--check")
    assert play.says("SSH and JupyterLab for: 192.0.2.44/32")


def test_a_region_that_does_not_exist(admin: Admin) -> None:
    admin.set(cluster_region="eu-west-33")
    said = refused(admin)
    assert (
        "Expected the name of an AWS region in cluster_region, found `eu-west-33`; try eu-west-3"
        in said
    )


def _expired(request: Request) -> Answer | None:
    message = "The security token included in the request is expired"
    return error("ExpiredToken", message, 403) if request.service == "sts" else None


def test_credentials_that_have_expired(admin: Admin) -> None:
    said = refused(admin, _expired)
    assert "Expected AWS credentials that are valid, found: ExpiredToken" in said
    assert "aws sso login" in said


def _denied(action: str) -> Callable[[Request], Answer | None]:
    def rule(request: Request) -> Answer | None:
        denied = request.action == action
        return error("UnauthorizedOperation", "no", 403) if denied else None

    return rule


def test_a_role_of_single_sign_on_is_asked_for_by_its_path(admin: Admin) -> None:
    role = admin.aws.client("iam").create_role(
        RoleName="AWSReservedSSO_admin",
        Path="/aws-reserved/sso.amazonaws.com/",
        AssumeRolePolicyDocument="{}",
    )["Role"]["Arn"]

    def session(request: Request) -> Answer | None:
        if request.action != "GetCallerIdentity":
            return None
        return Answer(
            200,
            '<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<GetCallerIdentityResult><UserId>A:ada</UserId><Account>123456789012</Account>"
            "<Arn>arn:aws:sts::123456789012:assumed-role/AWSReservedSSO_admin/ada</Arn>"
            "</GetCallerIdentityResult></GetCallerIdentityResponse>",
        )

    said = refused(admin, session, simulation("ec2:RunInstances"))
    assert f"Expected {role} to be allowed what ansible/admin-policy.json lists" in said


def test_a_permission_that_is_missing_is_named(admin: Admin) -> None:
    said = refused(admin, _denied("DescribeVpcs"), simulation("ec2:RunInstances"))
    assert "Expected the permission ec2:DescribeVpcs" in said
    assert "found these missing: ec2:RunInstances" in said


def test_types_that_do_not_exist_or_are_too_small_and_a_key_that_is_missing(admin: Admin) -> None:
    admin.set(ec2_master_type="m5.larg", ec2_worker_type="t3.micro", ec2_ssh_public_key="/no/key")
    said = refused(admin)
    assert f"Expected an instance type that {REGION} has, found `m5.larg`" in said
    assert "m5.large" in said
    assert "found t3.micro with 1 GiB; the smallest that fits is t3.medium" in said
    assert "Expected an SSH public key in /no/key (ec2_ssh_public_key), found: No such file" in said


def test_a_private_key_is_not_taken_for_a_public_one(admin: Admin) -> None:
    admin.key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    said = refused(admin)
    assert "Expected an SSH public key" in said
    assert "secret" not in said


def test_an_image_that_is_absent_and_a_quota_that_is_too_small(admin: Admin) -> None:
    admin.set(ec2_image="ami-0123456789", ec2_workers=9)
    said = refused(admin, quota(5))
    assert f"Expected an image (AMI) for x86_64 in {REGION}, found none for ami-0123456789" in said
    assert "20 to launch" in said
    assert "found 5; ask AWS for more (Service Quotas, L-1216C47A)" in said


def test_a_bucket_of_someone_else_and_a_cluster_of_this_name_elsewhere(admin: Admin) -> None:
    def taken(request: Request) -> Answer | None:
        return Answer(403, "") if request.action == "HEAD" else None

    ec2 = admin.aws.client("ec2")
    name = str(admin.knobs["cluster_name"])
    (image, *_) = ec2.describe_images(Filters=[{"Name": "name", "Values": ["debian-12-amd64-*"]}])[
        "Images"
    ]
    tags = [{"Key": "Cluster", "Value": name}, {"Key": "Role", "Value": "worker"}]
    stranger = ec2.run_instances(
        ImageId=image["ImageId"],
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"][0]
    said = refused(admin, taken)
    assert (
        f"Expected the bucket `{admin.knobs['cluster_bucket']}` to be free or this account's"
        in said
    )
    assert (
        f"in its own VPC, found some in {stranger['VpcId']}: another cluster has this name" in said
    )
    ec2.terminate_instances(InstanceIds=[stranger["InstanceId"]])


def test_a_bucket_with_something_in_it_is_not_taken_over(admin: Admin) -> None:
    s3, name = admin.aws.client("s3"), str(admin.knobs["cluster_bucket"])
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket=name, Key="holidays/beach.jpg", Body=b"x")
    said = refused(admin)
    assert f"Expected the bucket `{name}` to be new, empty or this cluster's" in said
    tag = {"Key": "Cluster", "Value": str(admin.knobs["cluster_name"])}
    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": [tag]})
    admin.play("provision.yml", "--check")


def test_a_bucket_in_another_region_is_told(admin: Admin) -> None:
    s3, name = admin.aws.client("s3", "eu-west-1"), str(admin.knobs["cluster_bucket"])
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert "found it in another region" in refused(admin)


def test_an_inventory_of_another_kind(admin: Admin) -> None:
    static = admin.folder / "inventory/hosts.yml"
    static.write_text("all: {hosts: {}}\n")
    play = admin.play("provision.yml", "-i", str(static), fails=True)
    assert play.says("Run: export ANSIBLE_INVENTORY=inventory/aws_ec2.yml")


def test_the_credentials_of_a_profile_reach_a_program_that_knows_none(
    aws: Account, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(
        "[orchard]\naws_access_key_id = AKIA1\naws_secret_access_key = s1\naws_session_token = t1\n"
    )
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: v for name, v in aws.environment.items() if name not in names}
    run = subprocess.run(
        [sys.executable, "-m", "pipeline.ec2", "with-credentials", "env"],
        env=environment | {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "orchard"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in ("AWS_ACCESS_KEY_ID=AKIA1", "AWS_SECRET_ACCESS_KEY=s1", "AWS_SESSION_TOKEN=t1"):
        assert line in run.stdout.splitlines()
