"""Looks at the cluster's bucket: whose it is, and how much it holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from botocore.exceptions import ClientError

from pipeline.cluster.aws.account import Account
from pipeline.cluster.aws.asking import Asking


def find_bucket(asking: Asking, found: Account) -> None:
    """Find whose the bucket is; refuse, before anything is made, one that is not to be taken.

    It is `free`, `ours`, `elsewhere` (in another region) or `taken` (by another account).
    """
    provision, status = asking.knobs.get("provision"), _status(asking, found)
    found.bucket = status
    if provision and status == "free" and found.instances:
        _refuse_instances(asking, found)
    elif provision and status == "ours":
        _check_contents(asking, found)
    elif provision and status in ("elsewhere", "taken"):
        where = "in another region" if status == "elsewhere" else "someone else's"
        found.add_problem(
            f"Expected the bucket `{asking.knobs['bucket']}` to be free or this account's, in "
            f"{asking.knobs['region']}; found it {where}, or not for {found.caller} to "
            "see. Set another cluster_bucket: names are shared by the whole world."
        )


def find_bucket_size(asking: Asking, found: Account) -> None:
    """Take the size from CloudWatch, once a day: a listing of millions of objects is slow."""
    if found.bucket != "ours":
        return
    now = datetime.now(UTC)
    points = asking.client("cloudwatch").get_metric_statistics(
        Namespace="AWS/S3",
        MetricName="BucketSizeBytes",
        Dimensions=[
            {"Name": "BucketName", "Value": asking.knobs["bucket"]},
            {"Name": "StorageType", "Value": "StandardStorage"},
        ],
        StartTime=now - timedelta(days=3),
        EndTime=now,
        Period=86400,
        Statistics=["Average"],
    )["Datapoints"]
    if points:
        newest = max(points, key=lambda point: point["Timestamp"])
        found.bucket_gb = round(newest["Average"] / 1e9, 3)


def _status(asking: Asking, found: Account) -> str:
    try:
        answer = asking.client("s3").head_bucket(
            Bucket=asking.knobs["bucket"], ExpectedBucketOwner=found.account
        )
    except ClientError as error:
        code = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return {404: "free", 301: "elsewhere"}.get(code, "taken")
    # The client has followed S3 to the bucket's region by itself.
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return "ours" if region in (None, asking.knobs["region"]) else "elsewhere"


def _refuse_instances(asking: Asking, found: Account) -> None:
    """Refuse to take over instances: their roles would lose the bucket that they have."""
    name, bucket = asking.knobs["cluster"], asking.knobs["bucket"]
    found.add_problem(
        f"Expected no instance of a cluster `{name}` yet, or its bucket to be `{bucket}`, "
        f"found {len(found.instances)} that have another: somebody else's cluster has "
        "this name. Set another cluster_name. To give yours another bucket, make that one, tag "
        f"it Cluster: {name}, and run again."
    )


def _check_contents(asking: Asking, found: Account) -> None:
    """Refuse a bucket that holds something and is not this cluster's: its policy would go."""
    cluster, name, s3 = asking.knobs["cluster"], asking.knobs["bucket"], asking.client("s3")
    try:
        tags = s3.get_bucket_tagging(Bucket=name)["TagSet"]
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchTagSet":
            raise
        tags = []
    if {"Key": "Cluster", "Value": cluster} in tags:
        return
    if found.instances:
        _refuse_instances(asking, found)
    elif s3.list_objects_v2(Bucket=name, MaxKeys=1)["KeyCount"]:
        found.add_problem(
            f"Expected the bucket `{name}` to be new, empty or this cluster's, found it with "
            f"something in it and without the tag Cluster: {cluster}. The cluster sets its "
            "policy, encryption and ownership anew: set another cluster_bucket, or tag it."
        )
