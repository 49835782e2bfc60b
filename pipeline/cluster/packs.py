"""Signs addresses by which hosts bring packed environments to the bucket, and fetch them.

    python -m pipeline.cluster.packs look KEY < place.json    is it there? `there` or `missing`
    python -m pipeline.cluster.packs fetch KEY < place.json    prints an address to read it from
    python -m pipeline.cluster.packs bring KEY < place.json    prints an address to write it to

`place.json` has the bucket and the region, and an endpoint with its keys where that is not AWS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

SECONDS_VALID = 3600
MISSING = {"404", "NoSuchKey", "NoSuchBucket"}
OPERATIONS = {"fetch": "get_object", "bring": "put_object"}


def client(place: Mapping[str, str]) -> Any:
    """Return a client of the place's S3: with its keys, or as the admin on AWS."""
    return boto3.client(
        "s3",
        region_name=place["region"],
        endpoint_url=place.get("endpoint") or None,
        aws_access_key_id=place.get("access_key") or None,
        aws_secret_access_key=place.get("secret_key") or None,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if place.get("endpoint") else "virtual"},
        ),
    )


def is_there(place: Mapping[str, str], key: str) -> bool:
    """Tell whether the bucket has an object."""
    try:
        client(place).head_object(Bucket=place["bucket"], Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            return False
        raise
    return True


def signed(place: Mapping[str, str], key: str, operation: str) -> str:
    """Return an address that holds for an hour.

    Parameters
    ----------
    operation
        `fetch` (GET) or `bring` (PUT).
    """
    address: str = client(place).generate_presigned_url(
        OPERATIONS[operation],
        Params={"Bucket": place["bucket"], "Key": key},
        ExpiresIn=SECONDS_VALID,
    )
    return address


def main(arguments: list[str]) -> None:
    """Run one of the commands; an error is one line."""
    match arguments:
        case ["look", key]:
            answer = "there" if is_there(json.load(sys.stdin), key) else "missing"
        case [("fetch" | "bring") as operation, key]:
            answer = signed(json.load(sys.stdin), key, operation)
        case _:
            sys.exit(__doc__)
    sys.stdout.write(f"{answer}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BotoCoreError, ClientError) as error:
        sys.exit(
            f"Expected to find packed environments in the bucket, found: {error}. Look at this "
            "machine's credentials and network, or set cluster_packs_in_bucket: false."
        )
