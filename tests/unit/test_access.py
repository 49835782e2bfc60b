"""Credentials, endpoint, region, trust: the user's own on a laptop, none of them on a cluster."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.local.environment import environment_of, of_servers
from pipeline.s3 import access, desk
from pipeline.s3.access import (
    CONTAINER,
    S3Settings,
    boto3_client,
    delta_options,
    located,
    obstore_client,
    settings_here,
)
from tests.waiting import eventually

LOGIN = """
import datetime, json, pathlib
times = pathlib.Path(__file__).with_name("times")
times.write_text(times.read_text() + "x" if times.exists() else "x")
end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds={seconds})
print(json.dumps({{"Version": 1, "AccessKeyId": "ASIALOGIN", "SecretAccessKey": "SECRET",
                   "SessionToken": "TOKEN", "Expiration": end.isoformat()}}))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's home without credentials, on a machine without a role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("SSL_CERT_FILE", os.environ.get("SSL_CERT_FILE", ""))
    (tmp_path / ".aws").mkdir()
    for made in (desk.credentials, desk.open_desk, boto3_client, access._region_of):
        made.cache_clear()  # type: ignore[attr-defined]
    yield tmp_path
    for made in (desk.credentials, desk.open_desk, boto3_client, access._region_of):
        made.cache_clear()  # type: ignore[attr-defined]


def logs_in(home: Path, seconds: int = 3600) -> None:
    """Give the user a profile whose credentials come from a command, and end."""
    (home / "login.py").write_text(LOGIN.format(seconds=seconds))
    words = shlex.join([sys.executable, str(home / "login.py")])
    command = f"credential_process = {words}"
    (home / ".aws/config").write_text(f"[profile lab]\n{command}\nregion = eu-north-1\n")


def test_a_profile_tells_keys_region_and_endpoint(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".aws/credentials").write_text(
        "[lab]\naws_access_key_id = AKIALAB\naws_secret_access_key = LABSECRET\n"
    )
    (home / ".aws/config").write_text(
        "[profile lab]\nregion = eu-north-1\nservices = local\n"
        "[services local]\ns3 =\n  endpoint_url = http://127.0.0.1:9\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-other-keys")
    found = settings_here({})
    assert found == S3Settings("http://127.0.0.1:9", "eu-north-1", "AKIALAB", "LABSECRET")
    assert "AWS_SESSION_TOKEN" not in os.environ  # delta-rs would send it with these keys
    assert "LABSECRET" not in repr(found)


def test_credentials_that_end_are_given_at_the_desk_to_who_has_its_word(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs_in(home)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    found = settings_here({})
    assert (found.access_key, found.region) == (None, "eu-north-1")
    assert found.desk is not None
    token_file = Path(found.desk.token_file)
    assert token_file.stat().st_mode & 0o077 == 0
    word = token_file.read_text()
    assert word not in str(found.for_java())
    assert found.for_spark()["spark.hadoop.fs.s3a.aws.credentials.provider"] == CONTAINER

    def ask(authorization: str) -> dict[str, str]:
        request = urllib.request.Request(found.desk.url, headers={"Authorization": authorization})
        with urllib.request.urlopen(request, timeout=10) as answer:
            told: dict[str, str] = json.load(answer)
        return told

    told = ask(word)
    assert (told["AccessKeyId"], told["Token"]) == ("ASIALOGIN", "TOKEN")
    assert datetime.fromisoformat(told["Expiration"]) > datetime.now(UTC) + timedelta(minutes=50)
    for other in ("", "guessed", word + "x", "caf\u00e9"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask(other)
    # delta-rs gets what the desk has now; boto3 the same, by itself.
    options = delta_options("fruits", found)
    assert (options["aws_access_key_id"], options["aws_session_token"]) == ("ASIALOGIN", "TOKEN")
    assert boto3_client(found)._request_signer._credentials.token == "TOKEN"


def test_a_login_is_made_anew_before_it_ends_and_not_for_each_request(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs_in(home, seconds=60)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    credentials = desk.credentials()
    first = credentials.fresh()
    logins = (home / "times").read_text()
    assert all(credentials.fresh() == first for _ in range(10))
    assert (home / "times").read_text() == logins
    credentials._next = datetime.now(UTC)  # two thirds of its minute are over
    assert credentials.fresh()["Expiration"] >= first["Expiration"]
    assert len((home / "times").read_text()) > len(logins)


def test_a_renewal_that_fails_ends_nothing_while_the_old_credentials_hold(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs_in(home)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    credentials = desk.credentials()
    first = credentials.fresh()
    (home / "login.py").write_text("raise SystemExit('the login server is down')")
    credentials._next = datetime.now(UTC)
    assert credentials.fresh() == first  # at once, while a login is tried beside
    assert eventually(lambda: credentials._next > datetime.now(UTC))
    assert credentials.fresh() == first
    credentials._next = credentials._end = datetime.now(UTC)
    with pytest.raises(desk.CredentialsError, match="login server is down"):
        credentials.fresh()


@pytest.mark.parametrize(
    ("mine", "endpoint", "region"),
    [
        ({"AWS_REGION": "garage"}, None, "garage"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9", "us-east-1"),
        (
            {
                "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
                "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
                "AWS_DEFAULT_REGION": "eu-west-3",
            },
            None,
            "eu-west-3",
        ),
        (
            {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_DEFAULT_REGION": "us-east-2"},
            "https://s3-fips.us-east-2.amazonaws.com",
            "us-east-2",
        ),
    ],
)
def test_the_place_is_the_same_for_all_clients(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    mine: dict[str, str],
    endpoint: str | None,
    region: str,
) -> None:
    for name, value in ({"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s"} | mine).items():
        monkeypatch.setenv(name, value)
    found = settings_here({})
    assert (found.endpoint, found.region) == (endpoint, region)
    assert delta_options("fruits", found)["aws_region"] == region
    assert found.for_spark()["spark.hadoop.fs.s3a.endpoint.region"] == region


def test_a_user_without_credentials_is_told_where_they_come_from(home: Path) -> None:
    with pytest.raises(StorageError, match=r"expected AWS credentials, found none.*AWS_PROFILE"):
        settings_here({})


def test_a_login_that_fails_is_told_in_its_own_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".aws/config").write_text(
        "[profile lab]\ncredential_process = sh -c 'echo no >&2; false'\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(StorageError, match=r"could not be had: .*no\n?.*Log in anew"):
        settings_here({})
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"could not be had: .*nobody.*correct AWS_PROFILE"):
        settings_here({})


@pytest.mark.parametrize(
    "settings",
    [
        {"spark.master": "spark://10.0.0.1:7077"},
        {"spark.hadoop.fs.s3a.access.key": "KEY", "spark.hadoop.fs.s3a.secret.key": "SECRET"},
    ],
)
def test_a_cluster_gets_nothing_of_the_users(
    home: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    (home / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = AKIALAB\naws_secret_access_key = LABSECRET\n"
    )
    mine = {"AWS_SESSION_TOKEN": "MINE", "AWS_ACCESS_KEY_ID": "AKIAMINE", "AWS_PROFILE": "mine"}
    with environment_of(os.environ | mine | {"AWS_ENDPOINT_URL": "http://mine"}, with_s3=False):
        found = settings_here(settings)
        assert found == S3Settings.from_spark(settings)
        assert not any("MINE" in value or "mine" in value for value in os.environ.values())
        if found.access_key is None:  # the host's role is all that is left to boto3, too
            assert boto3_client(found)._request_signer._credentials is None


def test_a_cluster_on_loopback_hears_of_no_other_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = {
        "SPARK_HOME": "/opt/spark", "SPARK_LOCAL_DIRS": "/nope", "HADOOP_CONF_DIR": "/etc/hadoop",
        "PYSPARK_SUBMIT_ARGS": "--master yarn", "JAVA_TOOL_OPTIONS": "-Xmx20m",
        "_JAVA_OPTIONS": "-Xmx20m", "CLASSPATH": "/nope", "PYTHONPATH": "/opt/other",
        "PYTHONSTARTUP": "/nope",
    }  # fmt: skip
    aws = {"AWS_PROFILE": "mine", "AWS_SESSION_TOKEN": "MINE", "AWS_ENDPOINT_URL": "http://mine"}
    for name, value in (others | aws).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with environment_of({"SPARK_HOME": "/ours"}, with_s3=True):
        assert os.environ["SPARK_HOME"] == "/ours"
        of_driver = {
            "JAVA_TOOL_OPTIONS",
            "_JAVA_OPTIONS",
            "CLASSPATH",
            "PYTHONPATH",
            "PYTHONSTARTUP",
        }
        assert not (others | aws).keys() & (os.environ.keys() - {"SPARK_HOME", *of_driver})
        assert not (others | aws).keys() & (of_servers(os.environ).keys() - {"SPARK_HOME"})
        assert os.environ["AWS_CONFIG_FILE"] == os.devnull
        assert os.environ["PATH"] == before["PATH"]
    assert dict(os.environ) == before
    with environment_of({}, with_s3=False):  # the driver asks AWS as the user does
        assert os.environ["AWS_PROFILE"] == "mine"
        assert not (others | aws).keys() & of_servers(os.environ).keys()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, None),
        ({"http_proxy": "http://proxy:3128"}, {"127.0.0.1", "localhost", "169.254.169.254"}),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intranet"}, {"intranet", "127.0.0.1"}),
        (
            {"ALL_PROXY": "socks5://proxy:1", "no_proxy": "a.example,127.0.0.1"},
            {"a.example", "::1"},
        ),
    ],
)
def test_no_proxy_stands_before_this_machine(given: dict[str, str], kept: set[str] | None) -> None:
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    clean = {name: value for name, value in os.environ.items() if name.lower() not in names}
    script = "import os, pipeline; print(os.environ.get('no_proxy'), os.environ.get('NO_PROXY'))"
    lower, upper = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | given,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert lower == upper
    assert kept is None if lower == "None" else kept is not None and kept <= set(lower.split(","))


class Elsewhere(BaseHTTPRequestHandler):
    """AWS, asked for a bucket of another region: it answers with a redirect that names it."""

    def do_HEAD(self) -> None:
        is_there = self.path.startswith("/faraway")
        self.send_response(301 if is_there else 404)
        if is_there:
            self.send_header("x-amz-bucket-region", "us-east-1")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_bucket_is_asked_in_its_own_region(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    s3 = S3Settings(region="eu-west-3", access_key="KEY", secret_key="SECRET")
    assert located("faraway", s3).region == "us-east-1"
    assert located("nowhere", s3) == s3  # whoever uses it tells what is wrong
    assert located(None, s3) == s3
    assert located("faraway", S3Settings("http://minio:9000", "own")).region == "own"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("bucket", "endpoint", "by_path"),
    [
        ("fruits", None, False),
        ("my.fruits.example", None, True),  # no certificate of AWS has such a name in it
        ("fruits", "https://minio.example", True),
    ],
)
def test_a_bucket_is_named_where_a_certificate_allows_it(
    bucket: str, endpoint: str | None, by_path: bool
) -> None:
    s3 = S3Settings(endpoint, "eu-west-3", "KEY", "SECRET")
    assert delta_options(bucket, s3)["aws_virtual_hosted_style_request"] == str(not by_path).lower()
    config = obstore_client(bucket, "", s3).config
    assert config["virtual_hosted_style_request"] is not by_path
