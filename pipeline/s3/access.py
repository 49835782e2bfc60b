"""How S3 is reached: endpoint, region and credentials, the same for each client that asks it.

Four do: S3A in Spark, obstore in tasks and for files, delta-rs for the table, boto3 on the driver.
Where a cluster's settings name keys, all take those; on EC2 its hosts have a role, and no client
takes anything else. On the user's own machine the credentials are the user's, as boto3 finds them:
profile, SSO, login, environment, process, web identity, role. Keys that stay are handed on as they
are; in the place of those that end, the others get new ones from `pipeline.s3.desk`.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import os
import re
import shutil
import ssl
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache, partial
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.errors import StorageError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential, S3Store

S3A = "spark.hadoop.fs.s3a."
SIMPLE = "org.apache.hadoop.fs.s3a.SimpleAWSCredentialsProvider"
TEMPORARY = "org.apache.hadoop.fs.s3a.TemporaryAWSCredentialsProvider"
CONTAINER = "software.amazon.awssdk.auth.credentials.ContainerCredentialsProvider"
# Where systems keep the certificates of whom they trust: Debian, Fedora and Amazon Linux, macOS.
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
PEM = rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----"
CHECKSUMS = ("x-amz-checksum-", "x-amz-sdk-checksum-")
OF_AWS = ("AWS_", "BOTO_")
NO_FILES = dict.fromkeys(
    ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "BOTO_CONFIG"), os.devnull
)


@dataclass(frozen=True)
class Desk:
    """Where processes of this machine get the user's credentials, and the file of their word."""

    url: str
    token_file: str


@dataclass(frozen=True)
class S3Settings:
    """How to reach S3; every field None means AWS itself with the machine's own role.

    Attributes
    ----------
    desk
        Where the processes of this machine get credentials that end.
    trust_store
        For Java: the file of the certificates that are trusted.
    """

    endpoint: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = None
    session_token: str | None = None
    desk: Desk | None = None
    trust_store: str | None = None

    @classmethod
    def from_spark(cls, settings: Mapping[str, str]) -> S3Settings:
        """Read the `spark.hadoop.fs.s3a.*` settings, so that S3A and the others agree."""
        return cls(
            endpoint=settings.get(S3A + "endpoint"),
            region=settings.get(S3A + "endpoint.region"),
            access_key=settings.get(S3A + "access.key"),
            secret_key=settings.get(S3A + "secret.key"),
            session_token=settings.get(S3A + "session.token"),
        )

    def __repr__(self) -> str:
        """Leave the keys out: this may end in a log."""
        return f"S3Settings(endpoint={self.endpoint!r}, region={self.region!r})"

    @property
    def is_aws(self) -> bool:
        """Whether this is AWS's own S3."""
        return self.endpoint is None or "amazonaws.com" in self.endpoint

    def for_spark(self) -> dict[str, str]:
        """Return S3A's settings, with Spark's names for them."""
        named = {"endpoint": self.endpoint, "endpoint.region": self.region}
        if self.endpoint:
            named["path.style.access"] = "true"
        if self.desk:
            named["aws.credentials.provider"] = CONTAINER
        elif self.access_key:
            named["aws.credentials.provider"] = TEMPORARY if self.session_token else SIMPLE
            named |= {"access.key": self.access_key, "secret.key": self.secret_key}
            named["session.token"] = self.session_token
        return {S3A + name: value for name, value in named.items() if value is not None}

    def for_java(self) -> list[str]:
        """Return the options with which a JVM finds the desk and whom to trust, none a secret."""
        options = []
        if self.desk:
            options += [
                f"-Daws.containerCredentialsFullUri={self.desk.url}",
                f"-Daws.containerAuthorizationTokenFile={self.desk.token_file}",
            ]
        if self.trust_store:
            options += [
                f"-Djavax.net.ssl.trustStore={self.trust_store}",
                "-Djavax.net.ssl.trustStorePassword=",
            ]
        return options


def without_aws(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which no S3 client finds anything of the user's."""
    left = {name: value for name, value in environment.items() if not name.startswith(OF_AWS)}
    return left | NO_FILES


def settings_here(settings: Mapping[str, str]) -> S3Settings:
    """Return how S3 is reached from here, by Spark's settings or as the user reaches it.

    Where Spark's settings describe a cluster, this process does without the user's own variables
    and files for AWS: the cluster's other processes have none.

    Raises
    ------
    StorageError
        When the user has no credentials, or they cannot be had.
    """
    s3 = S3Settings.from_spark(settings)
    if s3.access_key or "spark.master" in settings:
        for name in [name for name in os.environ if name.startswith(OF_AWS)]:
            del os.environ[name]
        os.environ.update(NO_FILES)
        return s3
    return _of_user(s3)


def _of_user(s3: S3Settings) -> S3Settings:
    from botocore.exceptions import BotoCoreError, NoCredentialsError
    from botocore.session import get_session

    from pipeline.s3.desk import CredentialsError, credentials, open_desk

    session = get_session()
    try:
        region = session.get_config_variable("region") or os.environ.get("AWS_REGION")
        s3 = replace(s3, region=s3.region or region or None)
        s3 = replace(s3, endpoint=s3.endpoint or _endpoint_of(session, s3.region))
        if s3.endpoint and not s3.region:
            s3 = replace(s3, region="us-east-1")  # what most of other makers' take; S3A has another
        named = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        trust(named)
        if not (s3.endpoint or "").startswith("http:"):
            s3 = replace(s3, trust_store=_trust_store())
        told = credentials().fresh()
    except NoCredentialsError as error:
        raise StorageError(
            "expected AWS credentials, found none. Set AWS_PROFILE, log in (aws sso login, aws "
            "configure) or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (BotoCoreError, CredentialsError) as error:
        raise StorageError(
            f"the AWS credentials could not be had: {error}. Log in anew or correct AWS_PROFILE, "
            "then run again."
        ) from error
    if told["Token"]:
        return replace(s3, desk=open_desk())
    os.environ.pop("AWS_SESSION_TOKEN", None)  # of other keys; delta-rs would send it all the same
    return replace(s3, access_key=told["AccessKeyId"], secret_key=told["SecretAccessKey"])


def _endpoint_of(session: Any, region: str | None) -> str | None:
    """Return the address that the user's settings name, None for AWS's usual one."""
    from botocore.configprovider import ConfiguredEndpointProvider

    if not session.get_config_variable("ignore_configured_endpoint_urls"):
        named: str | None = ConfiguredEndpointProvider(
            session.full_config, session.get_scoped_config(), client_name="s3"
        ).provide()
        if named:
            return named
    # Only boto3 knows of these; the others are given the address.
    fips = "-fips" if session.get_config_variable("use_fips_endpoint") else ""
    dual = ".dualstack" if session.get_config_variable("use_dualstack_endpoint") else ""
    return f"https://s3{fips}{dual}.{region or 'us-east-1'}.amazonaws.com" if fips or dual else None


def trust(named: str | None) -> None:
    """Have all clients trust a bundle of certificates beside those that this system trusts.

    obstore and delta-rs read SSL_CERT_FILE, which takes the place of the system's.
    """
    if not named:
        return
    system = certificates()
    both = scratch() / "certificates.pem"
    try:
        parts = [Path(file).read_bytes() for file in (system, named) if file]
    except OSError as error:
        raise StorageError(
            f"expected certificates in {named} (ca_bundle, AWS_CA_BUNDLE), found: "
            f"{error.strerror}. Correct the name."
        ) from error
    both.write_bytes(b"\n".join(parts))
    os.environ["SSL_CERT_FILE"] = str(both)


def certificates() -> str | None:
    """Return the file of the certificates that this system trusts, None where there is none.

    boto3 would trust a list of its own.
    """
    found = (ssl.get_default_verify_paths().cafile, *BUNDLES)
    return next((file for file in found if file and Path(file).is_file()), None)


@cache
def _trust_store() -> str | None:
    """Write the certificates that are trusted as Java reads them."""
    from cryptography.hazmat.primitives.serialization import NoEncryption
    from cryptography.hazmat.primitives.serialization.pkcs12 import (
        PKCS12Certificate,
        serialize_java_truststore,
    )
    from cryptography.x509 import load_pem_x509_certificate

    file = certificates()
    if file is None:
        return None
    named = []
    for number, text in enumerate(re.findall(PEM, Path(file).read_bytes(), re.DOTALL)):
        # Some systems have certificates of old that keep to no standard: no S3 is signed by them.
        with suppress(ValueError), warnings.catch_warnings(action="ignore"):
            name = str(number).encode()
            named.append(PKCS12Certificate(load_pem_x509_certificate(text), name))
    store = scratch() / "trusted.p12"
    store.write_bytes(serialize_java_truststore(named, NoEncryption()))
    return str(store)


@cache
def scratch() -> Path:
    """Return a folder of this user's alone, which goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fruits-s3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def located(bucket: str | None, s3: S3Settings) -> S3Settings:
    """Return how to reach a bucket of AWS: in its own region, whatever the settings' is.

    boto3 and S3A follow AWS's redirects by themselves, obstore and delta-rs do not.
    """
    if bucket is None or s3.endpoint:
        return s3
    region = _region_of(bucket, s3)
    return replace(s3, region=region) if region else s3


@cache
def _region_of(bucket: str, s3: S3Settings) -> str | None:
    """Ask S3, which tells the region of a bucket even to those who may not use it."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = boto3_client(s3).head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError:
        return None  # the first real request tells what is wrong
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region: str | None = headers.get("x-amz-bucket-region")
    return region


def obstore_client(bucket: str | None, prefix: str, s3: S3Settings) -> S3Store:
    """Open a prefix of a bucket; without keys and desk it finds the machine's own role."""
    from obstore.store import S3Store

    # Certificates of buckets' own names have no dots in them.
    by_path = s3.endpoint is not None or "." in str(bucket)
    # What the environment may say otherwise is said here.
    config: S3Config = {
        "virtual_hosted_style_request": not by_path,
        "skip_signature": False,
        "request_payer": False,
    }
    if s3.endpoint:
        config["endpoint"] = s3.endpoint
    if s3.region:
        config["region"] = s3.region
    options: ClientConfig = {
        "allow_http": (s3.endpoint or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=30),
    }
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options=options,
        retry_config={"max_retries": 8, "retry_timeout": timedelta(seconds=90)},
        credential_provider=_provider(s3),
    )


def _provider(s3: S3Settings) -> Callable[[], S3Credential] | None:
    """Return what gives obstore its keys, which it would look for in the environment first."""
    if s3.desk:
        return partial(_asked, s3.desk)
    return None if s3.access_key is None else partial(_keys, s3)


def _keys(s3: S3Settings) -> S3Credential:
    return {
        "access_key_id": str(s3.access_key),
        "secret_access_key": str(s3.secret_key),
        "token": s3.session_token,
        "expires_at": None,
    }


def _asked(desk: Desk) -> S3Credential:
    """Ask the desk, through no proxy."""
    parts = urlsplit(desk.url)
    line = HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    try:
        line.request(
            "GET", parts.path, headers={"Authorization": Path(desk.token_file).read_text()}
        )
        answer = line.getresponse()
        told = json.loads(answer.read())
    finally:
        line.close()
    if answer.status != 200:
        raise OSError(f"{desk.url}: {told['message']}")
    return {
        "access_key_id": told["AccessKeyId"],
        "secret_access_key": told["SecretAccessKey"],
        "token": told["Token"],
        "expires_at": datetime.fromisoformat(told["Expiration"]),
    }


def delta_options(bucket: str, s3: S3Settings) -> dict[str, str]:
    """Return delta-rs's storage options for tables in a bucket, for the next minutes.

    It asks for credentials while it holds Python's lock: a desk in this process could not answer.
    """
    from pipeline.s3.desk import credentials

    by_path = s3.endpoint is not None or "." in bucket
    told = credentials().fresh() if s3.desk else {}
    options = {
        "endpoint_url": s3.endpoint,
        "region": s3.region,
        "access_key_id": told.get("AccessKeyId", s3.access_key),
        "secret_access_key": told.get("SecretAccessKey", s3.secret_key),
        "session_token": told.get("Token", s3.session_token),
        "allow_http": "true" if (s3.endpoint or "").startswith("http://") else None,
        "virtual_hosted_style_request": "false" if by_path else "true",
    }
    return {f"aws_{name}": value for name, value in options.items() if value is not None}


@cache
def boto3_client(s3: S3Settings) -> Any:
    """Make a client, which takes a tenth of a second: all stores of an S3 share one.

    Its own retries cover throttling and short outages.
    """
    from botocore.config import Config

    from pipeline.s3.desk import provider
    from pipeline.s3.pages import client

    checksums = "when_supported" if s3.is_aws else "when_required"
    made = client(
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        aws_session_token=s3.session_token,
        provider=None if s3.desk is None else provider(),
        verify=certificates(),
        config=Config(
            connect_timeout=5,
            read_timeout=40,  # four times: a server that stands still for a while is sat out
            retries={"total_max_attempts": 4, "mode": "standard"},
            max_pool_connections=32,
            s3={"addressing_style": "path" if s3.endpoint else "auto"},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        ),
    )
    if not s3.is_aws:
        made.meta.events.register("before-sign.s3", _with_md5)
    return made


def _with_md5(request: Any, **_event: Any) -> None:
    """Prove a body, where S3 wants proof, as every S3 understands it.

    Some do not know Amazon's newer checksums, which boto3 would send (a list of keys to delete is
    one such body).
    """
    newer = [name for name in request.headers if name.lower().startswith(CHECKSUMS)]
    if newer and isinstance(request.data, bytes):
        for name in newer:
            del request.headers[name]
        digest = hashlib.md5(request.data, usedforsecurity=False).digest()
        request.headers["Content-MD5"] = base64.b64encode(digest).decode()
