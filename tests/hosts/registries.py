"""The package registries this machine is set up to use, so that its hosts may use the same.

No registry is named here: apt, pip and Ivy are asked where they go, and the settings that point
them or uv at a mirror are read from this machine and handed on.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import socket
import sys
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.engine.jars import JarError, spark_home
from tests.hosts.commands import HostsError, call, os_release

CERTIFICATES = Path("/usr/local/share/ca-certificates")  # those a machine trusts beside Debian's
_BUNDLE = "/etc/ssl/certs"  # what Debian makes of both; every host has it, too

_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "cert", "default-timeout")
_VARIABLES = (
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INSECURE_HOST",
    "UV_HTTP_TIMEOUT", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS",
    "DEFAULT_ARTIFACT_REPOSITORY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
_URL = re.compile(r"https?://[^\s\"',\]]+")


@functools.cache
def pip_settings() -> dict[str, str]:
    """Return which index and certificates pip is told to use here, empty where it is not told."""
    with suppress(HostsError):  # a venv that uv made has no pip
        listed = call(sys.executable, "-m", "pip", "config", "list")
        pairs = (line.partition("=") for line in listed.splitlines())
        found = {name.rpartition(".")[2]: value.strip("'\"") for name, _, value in pairs}
        return {
            name: value
            for name, value in found.items()
            if name in _PIP_SETTINGS and _is_valid_on_a_host(value)
        }
    return {}


def environment() -> dict[str, str]:
    """Return the variables that uv, Ivy and TLS clients need on a host, as far as set here."""
    found = {
        name: os.environ[name]
        for name in _VARIABLES
        if _is_valid_on_a_host(os.environ.get(name, ""))
    }
    index = pip_settings().get("index-url")
    if index:
        found.setdefault("UV_DEFAULT_INDEX", index)  # uv does not read pip's settings
    if any(CERTIFICATES.glob("**/*.crt")):
        found.setdefault("UV_SYSTEM_CERTS", "1")  # uv trusts its own list otherwise
    return found


def _is_valid_on_a_host(value: str) -> bool:
    return value != "" and (not value.startswith("/") or value.startswith(_BUNDLE))


def apt_settings() -> list[str]:
    """Return this machine's settings of how apt downloads: proxies, certificates, checks of age."""
    dump = call("apt-config", "dump", "--no-empty").splitlines()
    return [line for line in dump if re.match(r"Acquire::(https?|Check-|Retries)", line)]


@functools.cache
def apt_sources(suite: str) -> list[str]:
    """Return this machine's own sources of Debian, for `suite`; empty where it has none of use."""
    release = os_release()
    if release.get("ID") != "debian":
        return []
    own = release.get("VERSION_CODENAME", "")
    form = "$(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)"
    listed = call("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    targets = [line.split() for line in sorted(set(listed.splitlines()))]
    wanted = (own, f"{own}-updates", f"{own}-security")
    return [
        f"deb {target[3]} {target[2].replace(own, suite)} main"
        for target in targets
        if target[:2] == ["Debian", "main"] and target[2] in wanted and _URL.match(target[3])
    ]


def registry_endpoints(image: Path) -> set[tuple[str, int]]:
    """Return the addresses and ports of every registry that hosts made from `image` may use."""
    apt_files = [*image.glob("etc/apt/sources.list*"), *image.glob("etc/apt/*.d/*")]
    settings = [file.read_text() for file in apt_files if file.is_file()]
    settings += [*pip_settings().values(), *environment().values()]
    urls = {url for text in settings for url in _URL.findall(text)}
    return _endpoints(urls | _pip_domains() | _maven_repositories())


def _pip_domains() -> set[str]:
    """Return the sites that pip goes to where nothing else is set."""
    program = (
        "from pip._internal.models.index import PyPI as it\n"
        "print(f'https://{it.netloc} https://{it.file_storage_domain}')"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(HostsError):
            return set(call(python, "-c", program).split())
    return set()


def _maven_repositories() -> set[str]:
    """Return the repository that Spark's Ivy goes to where no mirror is set."""
    with suppress(JarError):
        for jar in (spark_home() / "jars").glob("ivy-*.jar"):
            resolver = "org/apache/ivy/plugins/resolver/IBiblioResolver.class"
            with zipfile.ZipFile(jar) as content:
                constants = content.read(resolver).decode("latin-1")
            return set(re.findall(r"https?://[\w.:/-]*maven2/", constants))
    return set()


def _endpoints(urls: Iterable[str]) -> set[tuple[str, int]]:
    found = set()
    for url in urls:
        site = urlsplit(url)
        with suppress(ValueError):
            ports = (80, 443, site.port or 443)
            found |= {(address, port) for address in _addresses(site.hostname) for port in ports}
    return found


def _addresses(name: str | None) -> set[str]:
    """Resolve a name; one that does not resolve is no use to hosts either."""
    for _ in range(3):
        try:
            answers = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                break
            time.sleep(1)
        else:
            return {str(answer[4][0]) for answer in answers}
    return set()


def resolvers() -> list[str]:
    """Return the addresses of the DNS servers that can be reached from another address than ours.

    Where a resolver on loopback stands in front, as systemd's does, it is those behind it.
    """
    for file in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        with suppress(OSError):
            listed = re.findall(r"^nameserver\s+([\d.]+)\s*$", Path(file).read_text(), re.M)
            found = [one for one in listed if not ipaddress.ip_address(one).is_loopback]
            if found:
                return found
    return []
