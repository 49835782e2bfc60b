"""S3 of other makers: older ones, and one with a certificate of its own and keys that end.

`python -m tests.s3.servers` runs this folder on other servers.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pipeline.local import seaweed
from pipeline.local.loopback import Loopback
from pipeline.s3.access import S3Settings
from pipeline.storage import BucketStore
from tests.conftest import run_fruits
from tests.s3_proxy import Behaviour, s3_proxy
from tests.waiting import eventually


def test_an_s3_older_than_amazons_checksums_is_written_read_and_cleared(
    cluster: Loopback, bucket: BucketStore, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(secrets.token_bytes(70_000_000))  # more than goes in one part
    with s3_proxy(str(cluster.s3.endpoint), Behaviour(older=1)) as older:
        store = BucketStore(bucket.address, replace(cluster.s3, endpoint=older.endpoint))
        store.write("a/first", b"first")
        store.upload("a/large", large)
        store.copy("a/large", "a/copy")
        assert store.write_new("a/new", b"new")
        assert not store.write_new("a/new", b"newer")
        store.join([("a/large", 70_000_000), ("a/first", 5)], "a/joined")
        assert (store.read("a/joined") or b"")[-6:-1] == large.read_bytes()[-1:] + b"firs"
        assert {entry.key for entry in store.list("a/")} == {
            "a/first", "a/large", "a/copy", "a/new", "a/joined",
        }  # fmt: skip
        store.delete("a")
        assert not list(store.list())
    assert older.requests > 10
    assert older.refused == 0


# --- a company's own S3 ----------------------------------------------------------------------

LOGIN = """
import datetime, json, pathlib
import boto3
sts = boto3.client("sts", endpoint_url={endpoint!r}, region_name="eu-west-3",
                   aws_access_key_id={access_key!r}, aws_secret_access_key={secret_key!r})
keys = sts.assume_role(RoleArn={role!r}, RoleSessionName="me")["Credentials"]
with pathlib.Path(__file__).with_name("logins").open("a") as logins:
    logins.write("x")
end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds={seconds})
told = {{name: keys[name] for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")}}
print(json.dumps(told | {{"Version": 1, "Expiration": end.isoformat()}}))
"""
ROLE = "arn:aws:iam::role/Fruits"
OPEN = {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["*"]}
FOR_ANYBODY = {"Effect": "Allow", "Principal": "*", "Action": ["sts:AssumeRole"]}


def _policy(statement: Mapping[str, object]) -> dict[str, object]:
    return {"Version": "2012-10-17", "Statement": [statement]}


def certify(folder: Path) -> tuple[Path, Path, Path]:
    """Make an authority, and a server's certificate of it; return their files, and the key's."""
    now = datetime.now(UTC)

    def signed(
        name: str, key: ec.EllipticCurvePrivateKey, by: str, by_key: ec.EllipticCurvePrivateKey
    ) -> x509.CertificateBuilder:
        names = [
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in (name, by)
        ]
        return x509.CertificateBuilder(
            names[1],
            names[0],
            key.public_key(),
            x509.random_serial_number(),
            now,
            now + timedelta(1),
        ).add_extension(x509.BasicConstraints(ca=name == by, path_length=None), critical=True)

    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    trusted = signed("Orchard", authority, "Orchard", authority).sign(authority, hashes.SHA256())
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    shown = signed("s3", server, "Orchard", authority).add_extension(hosts, critical=False)
    contents = {
        "authority.pem": trusted.public_bytes(Encoding.PEM),
        "server.pem": shown.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM),
        "server.key": server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder / "authority.pem", folder / "server.pem", folder / "server.key"


@contextmanager
def companys_s3(folder: Path) -> Iterator[tuple[S3Settings, Path]]:
    """Run SeaweedFS over TLS, with a role that gives keys for a while; yield whom to trust, too."""
    s3 = seaweed.new_settings("127.0.0.1")
    authority, certificate, key = certify(folder)
    roles = folder / "roles.json"
    roles.write_text(
        json.dumps(
            {
                "sts": {
                    "tokenDuration": "1h",
                    "maxSessionLength": "12h",
                    "issuer": "orchard",
                    "signingKey": base64.b64encode(secrets.token_bytes(32)).decode(),
                },
                "policy": {"defaultEffect": "Deny", "storeType": "memory"},
                "policies": [{"name": "All", "document": _policy(OPEN)}],
                "roles": [
                    {
                        "roleName": "Fruits",
                        "roleArn": ROLE,
                        "trustPolicy": _policy(FOR_ANYBODY),
                        "attachedPolicies": ["All"],
                    }
                ],
            }
        )
    )
    command = seaweed.command(folder / "s3", s3, {"fruits": (s3, seaweed.EVERYTHING)})
    own = (f"-s3.iam.config={roles}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}")
    with (folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [*(option for option in command if option != "-s3.iam=false"), *own],
            env=os.environ | seaweed.environment(),
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    s3 = replace(s3, endpoint=str(s3.endpoint).replace("http:", "https:"))
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        aws_access_key_id=s3.access_key,
        aws_secret_access_key=s3.secret_key,
        verify=str(authority),
    )

    def has_bucket() -> bool:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="orchard")
            client.put_object(Bucket="orchard", Key="is-it-there", Body=b"")
        except (BotoCoreError, client.exceptions.ClientError):
            return False
        return True

    try:
        assert eventually(has_bucket), (folder / "s3.log").read_text()
        yield s3, authority
    finally:
        server.terminate()
        server.wait()


def is_let_in(login: Path, s3: S3Settings, authority: Path) -> bool:
    """Tell whether keys that end open the bucket: SeaweedFS learns of it a moment later."""
    told = subprocess.run(
        [sys.executable, login],
        env=os.environ | {"AWS_CA_BUNDLE": str(authority)},
        check=True,
        capture_output=True,
    )
    keys = json.loads(told.stdout)
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        aws_access_key_id=keys["AccessKeyId"],
        aws_secret_access_key=keys["SecretAccessKey"],
        aws_session_token=keys["SessionToken"],
        verify=str(authority),
    )
    try:
        client.list_objects_v2(Bucket="orchard")
    except client.exceptions.ClientError:
        return False
    return True


def test_the_users_login_serves_a_whole_run_on_an_s3_with_a_certificate_of_its_own(
    fruit_pictures: Path, tmp_path: Path
) -> None:
    """Profile, endpoint, authority and keys of a minute, as `aws configure` would have them."""
    with companys_s3(tmp_path) as (s3, authority):
        (tmp_path / "login.py").write_text(
            LOGIN.format(
                endpoint=s3.endpoint,
                access_key=s3.access_key,
                secret_key=s3.secret_key,
                role=ROLE,
                seconds=60,
            )
        )
        (tmp_path / ".aws").mkdir()
        (tmp_path / ".aws/config").write_text(
            f"[profile lab]\nregion = eu-west-3\nendpoint_url = {s3.endpoint}\n"
            f"ca_bundle = {authority}\n"
            f"credential_process = {shlex.join([sys.executable, str(tmp_path / 'login.py')])}\n"
        )
        assert eventually(lambda: is_let_in(tmp_path / "login.py", s3, authority))
        mine = {
            "HOME": str(tmp_path),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            "SPARK_CONF_DIR": "",  # that of a cluster which other tests have here
            "AWS_CONFIG_FILE": str(tmp_path / ".aws/config"),
            "AWS_PROFILE": "lab",
            "AWS_CA_BUNDLE": str(authority),  # for the login
            "http_proxy": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
        }

        def fruits(*arguments: object) -> str:
            done = run_fruits(tmp_path, *arguments, **mine)
            assert done.returncode == 0, done.stderr
            return done.stdout

        images, output = "s3a://orchard/images", "s3a://orchard/result"
        assert "48 files sent" in fruits("upload", fruit_pictures, images)
        small = ("--backbone", "efficientnet_lite0", "--input-size", 96, "--components", 5)
        assert "48 computed" in fruits("run", images, output, *small)
        assert "0 computed, 48 reused" in fruits("run", images, output, *small)
        assert len((tmp_path / "logins").read_text()) < 40
