"""The S3 stand-in: SeaweedFS from its PyPI package, for machines without AWS.

Used by the loopback cluster and by the rehearsal hosts; whoever starts the process ends it.
"""

from __future__ import annotations

import json
import secrets
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.local.ports import free_ports
from pipeline.s3.access import S3Settings

EVERYTHING = ("Admin", "Read", "Write", "List", "Tagging")
READ_ONLY = ("Read", "List")


def new_settings(host: str) -> S3Settings:
    """Choose a free port at an address of this machine, and keys."""
    return new_keys(f"http://{host}:{free_ports(host, 1)[0]}")


def new_keys(endpoint: str) -> S3Settings:
    """Make a pair of keys for a server."""
    return S3Settings(
        endpoint=endpoint,
        region="eu-west-3",
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_urlsafe(30),
    )


def command(
    home: Path, s3: S3Settings, identities: Mapping[str, tuple[S3Settings, tuple[str, ...]]]
) -> list[str]:
    """Write the server's settings below a folder and return its command.

    Parameters
    ----------
    home
        A folder that does not exist yet; the objects lie in it, too.
    s3
        The address that it listens at.
    identities
        Who may do what, by name: keys and actions.
    """
    host, port = _host_and_port(s3)
    (home / "data").mkdir(parents=True)
    known = [
        {
            "name": name,
            "credentials": [{"accessKey": keys.access_key, "secretKey": keys.secret_key}],
            "actions": list(actions),
        }
        for name, (keys, actions) in identities.items()
    ]
    write_private(home / "identities.json", json.dumps({"identities": known}))
    names = ("master.port", "volume.port", "filer.port")
    inner = [*names, *(f"{name}.grpc" for name in names), "s3.port.grpc"]
    options: dict[str, object] = {
        "dir": home / "data",
        "ip": host,
        "ip.bind": host,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 128,  # a disk holds a limited number of volumes
        "volume.max": 0,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.exposeDirectoryData": "false",
        "filer.localSocket": "filer.sock",  # relative: a socket's path has 108 characters at most
        "s3": "true",
        "s3.port": port,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": home / "identities.json",
        "s3.iam": "false",
        "s3.localSocket": "s3.sock",
        **dict(zip(inner, free_ports(host, len(inner)), strict=True)),
    }
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    arguments = [f"-{name}={value}" for name, value in options.items()]
    return [str(weed), "-logtostderr=true", "server", *arguments]


def environment() -> dict[str, str]:
    """Return keys with which SeaweedFS's inner HTTP services answer to its own S3 only.

    And two volumes for each new bucket instead of seven, so that many buckets fit on a small disk;
    and one thread of Go at a time: on two cores, more of them wait for work at Spark's expense.
    """
    names = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    keys = {f"WEED_JWT_{name}_KEY": secrets.token_urlsafe(30) for name in names}
    return {**keys, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "2", "GOMAXPROCS": "1"}


def answers(s3: S3Settings) -> bool:
    """Tell whether S3 answers; a request without credentials is refused with 403."""
    try:
        with urllib.request.urlopen(f"{s3.endpoint}/", timeout=2):  # noqa: S310
            return False
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        return False


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read; it must not exist yet."""
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(text)


def _host_and_port(s3: S3Settings) -> tuple[str, int]:
    parts = urlsplit(str(s3.endpoint))
    return str(parts.hostname), int(parts.port or 80)
