"""Mistakes are told in a clear line before anything is made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.aws.account import (
    REGION,
    Account,
    Answer,
    Request,
    Rule,
    changes,
    error,
    quota,
    simulation,
)
from tests.aws.admin import Admin

pytestmark = pytest.mark.timeout(300)
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def machine(aws: Account, tmp_path_factory: pytest.TempPathFactory) -> Admin:
    return Admin(tmp_path_factory.mktemp("mistakes"), aws)


@pytest.fixture
def admin(machine: Admin) -> Iterator[Admin]:
    """An admin with a cluster of a name of its own."""
    number, knobs = next(NUMBERS), machine.knobs
    machine.set(cluster_name=f"mistake{number}", cluster_bucket=f"mistake-{number}")
    yield machine
    machine.knobs = knobs


def refused(admin: Admin, *rules: Rule) -> str:
    """Provision; expect a refusal and that nothing was made; return what was said."""
    with ExitStack() as stack:
        stack.enter_context(admin.aws.answering(*rules))
        requests = stack.enter_context(admin.aws.recording())
        play = admin.play("provision.yml", fails=True)
    assert changes(requests) == []
    return " ".join(play.output.replace("\\n", " ").split())


def test_wrong_knobs_are_told_all_at_once_without_asking_aws(admin: Admin) -> None:
    admin.set(
        cluster_name="Orchard!",
        cluster_bucket="Not_A_Bucket",
        cluster_s3_access_key="AKIA",
        cluster_metric=True,
        ec2_admin_cidrs=["everyone"],
        ec2_workers=0,
        ec2_workrs=3,
    )
    with admin.aws.recording() as requests:
        said = refused(admin)
    for what in (
        "found `Orchard!`",
        "found `Not_A_Bucket`",
        "Expected no access key: the instances have a role",
        "Expected only knobs that exist, found cluster_metric, ec2_workrs",
        "such as 203.0.113.7/32, or `mine`; found everyone",
        "Expected `ec2_workers` of 1 or more",
    ):
        assert what in said
    # The inventory looked for hosts; nothing else was asked.
    assert {request.action for request in requests} <= {"DescribeInstances"}


def test_what_is_meant_passes_the_world_this_machine_and_a_bucket_that_is_tagged(
    admin: Admin,
) -> None:
    def service(request: Request) -> Answer | None:
        return Answer(200, "192.0.2.44\n") if request.action == "GET /my-address" else None

    # The world is let in when said twice; this machine's address is found.
    admin.set(
        ec2_admin_cidrs=["0.0.0.0/0", "mine"],
        ec2_open_to_world=True,
        ec2_address_service=f"{admin.aws.url}/my-address",
    )
    _filled_bucket(admin, {"Cluster": str(admin.knobs["cluster_name"])})
    with admin.aws.answering(service):
        play = admin.play("provision.yml", "--check")
    assert play.says("SSH and JupyterLab for: 0.0.0.0/0, 192.0.2.44/32")


def _filled_bucket(admin: Admin, tags: dict[str, str]) -> None:
    s3, name = admin.aws.client("s3"), str(admin.knobs["cluster_bucket"])
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_object(Bucket=name, Key="holidays/beach.jpg", Body=b"x")
    tag_set = [{"Key": key, "Value": value} for key, value in tags.items()]
    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": tag_set})


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


def test_a_role_of_single_sign_on_is_asked_for_by_its_path_and_a_private_key_is_no_public_one(
    admin: Admin, tmp_path: Path
) -> None:
    private = tmp_path / "id_ed25519"
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n")
    admin.set(ec2_ssh_public_key=str(private))
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
    assert "Expected an SSH public key" in said
    assert "secret" not in said


def _taken(request: Request) -> Answer | None:
    return Answer(403, "") if request.action == "HEAD" else None


def test_what_the_account_lacks_is_told_all_at_once(admin: Admin) -> None:
    admin.set(
        ec2_master_type="m5.larg",
        ec2_worker_type="t3.micro",
        ec2_workers=9,
        ec2_image="ami-0123456789",
        ec2_ssh_public_key="/no/key",
    )
    said = refused(admin, _denied("DescribeVpcs"), simulation("ec2:RunInstances"), quota(5), _taken)
    for what in (
        "Expected the permission ec2:DescribeVpcs",
        "found these missing: ec2:RunInstances",
        f"Expected an instance type that {REGION} has, found `m5.larg`",
        "m5.large",
        "found t3.micro with 1 GiB; the smallest that fits is t3.medium",
        "Expected an SSH public key in /no/key (ec2_ssh_public_key), found: No such file",
        f"Expected an image (AMI) for x86_64 in {REGION}, found none for ami-0123456789",
        "18 to launch",
        "found 5; ask AWS for more (Service Quotas, L-1216C47A)",
        f"Expected the bucket `{admin.knobs['cluster_bucket']}` to be free or this account's",
    ):
        assert what in said
    # Several questions need that permission; its lack is told as often as another, once.
    assert said.count("Expected the permission ec2:DescribeVpcs") == said.count("18 to launch")


def test_a_cluster_of_this_name_elsewhere_is_not_taken_over(admin: Admin) -> None:
    ec2 = admin.aws.client("ec2")
    name = str(admin.knobs["cluster_name"])
    (image, *_) = ec2.describe_images(Filters=[{"Name": "name", "Values": ["debian-12-amd64-*"]}])[
        "Images"
    ]
    tags = [{"Key": "Cluster", "Value": name}, {"Key": "Role", "Value": "worker"}]
    strangers = ec2.run_instances(
        ImageId=image["ImageId"],
        MinCount=3,
        MaxCount=3,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )["Instances"]
    said = refused(admin)
    assert "found 3 that have another: somebody else's cluster has this name" in said
    assert (
        f"in its own VPC, found some in {strangers[0]['VpcId']}: another cluster has this name"
        in said
    )
    ec2.terminate_instances(InstanceIds=[one["InstanceId"] for one in strangers])


def test_a_bucket_with_something_in_it_is_not_taken_over(admin: Admin) -> None:
    _filled_bucket(admin, {"Cluster": "another"})
    said = refused(admin)
    name = admin.knobs["cluster_bucket"]
    assert f"Expected the bucket `{name}` to be new, empty or this cluster's" in said


def test_a_bucket_in_another_region_is_told(admin: Admin) -> None:
    s3, name = admin.aws.client("s3", "eu-west-1"), str(admin.knobs["cluster_bucket"])
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert "found it in another region" in refused(admin)


def test_an_inventory_of_another_kind(admin: Admin) -> None:
    static = admin.folder / "inventory/hosts.yml"
    static.write_text("all: {hosts: {}}\n")
    play = admin.play("provision.yml", "-i", str(static), fails=True)
    assert play.says("Run: export ANSIBLE_INVENTORY=inventory/aws_ec2.yml")
    static.unlink()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("playbook", "said", "told"),
    [
        ("scale.yml", ["-e", "workers=-1"], "Expected -e workers=N with 1 or more"),
        ("scale.yml", ["-e", "workers=many"], "Expected -e workers=N with 1 or more"),
        ("destroy.yml", [], "Expected -e destroy=mistake"),
        ("destroy.yml", ["-e", "destroy=fruits"], "Expected -e destroy=mistake"),
    ],
)
def test_a_number_or_a_name_that_is_wrong_ends_nothing(
    admin: Admin, playbook: str, said: list[str], told: str
) -> None:
    """test_life.py has one of each kind, and a cluster that stays."""
    with admin.aws.recording() as requests:
        assert admin.play(playbook, *said, fails=True).says(told)
    assert changes(requests) == []
