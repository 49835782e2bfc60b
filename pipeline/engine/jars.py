"""Brings the jars that teach Spark to speak S3, as `jars.lock` beside this file lists them.

The PyPI package of Spark has no S3A. Its own Ivy resolver fetches the missing jars here, so that
no repository's address stands in this project: Ivy knows Maven Central, and a mirror is given with
DEFAULT_ARTIFACT_REPOSITORY, as for spark-submit. Standard library, Java and pyspark only, because
a cluster's hosts have nothing else when they run it.

    python -m pipeline.engine.jars fetch [FOLDER]   bring what is missing, check every sum
    python -m pipeline.engine.jars lock             resolve anew after a change of Spark
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from pipeline.engine.java import QUICK_START, JavaNotFoundError, find_java_home, without_options

LOCK_FILE = Path(__file__).with_name("jars.lock")

# The newest release in Maven Central. Its two classes of commit protocol did not change since
# Spark 3.1, and the tests prove on a real S3 server that they run inside the locked Spark.
SPARK_HADOOP_CLOUD = ("org.apache.spark", "spark-hadoop-cloud_2.13", "4.1.2")
SDK_MODULES = ("s3", "s3-transfer-manager", "sts")  # what S3A uses of the 600 MB SDK bundle


class JarError(ValueError):
    """A jar is missing, damaged or does not fit the installed Spark."""


@dataclass(frozen=True)
class Jar:
    """One line of the lock file: a Maven coordinate, its size in bytes and its sha256."""

    organisation: str
    name: str
    version: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the jar in the folder."""
        return f"{self.name}-{self.version}.jar"

    def problem(self, folder: Path) -> str | None:
        """Say what is wrong with this jar's file in `folder`; None when its sum is right."""
        file = folder / self.file_name
        if not file.exists():
            return "is missing"
        size = file.stat().st_size
        if size != self.size:
            return f"should be {self.size} bytes and is {size}"
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        return None if found == self.sha256 else f"should have sha256 {self.sha256} and has {found}"


def default_folder() -> Path:
    """Return the user's cache of jars, shared by all clones of the project."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fruits" / "jars"


def read_lock(file: Path = LOCK_FILE) -> list[Jar]:
    """Read the lock file: `organisation:name:version size sha256` a line, `#` begins a comment."""
    jars = []
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinate, size, sha256 = line.split()
            organisation, name, version = coordinate.split(":")
            jars.append(Jar(organisation, name, version, int(size), sha256))
    return jars


def fetch(folder: Path | None = None) -> list[Path]:
    """Bring every locked jar into `folder` and return their paths.

    Raises
    ------
    JarError
        When a jar cannot be had, or its size or sum differs from the lock's; nothing wrong
        is left in the folder.
    """
    folder = folder or default_folder()
    jars = read_lock()
    missing = [jar for jar in jars if jar.problem(folder)]
    if missing:
        megabytes = sum(jar.size for jar in missing) / 1e6
        _say(f"fetching {len(missing)} jars for S3A ({megabytes:.0f} MB) into {folder}")
        _fetch_missing(missing, folder)
    return [folder / jar.file_name for jar in jars]


def _fetch_missing(missing: list[Jar], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ivy-") as scratch:
        wanted = [(jar.organisation, jar.name, jar.version) for jar in missing]
        arrived = _resolve(wanted, Path(scratch), transitive=False, described=False)
        for jar in missing:
            (folder / jar.file_name).unlink(missing_ok=True)  # a damaged one helps nobody
            problem = jar.problem(arrived)
            if problem:
                raise JarError(
                    f"the jar {jar.file_name} {problem}. Look at the network and at the mirror "
                    f"(DEFAULT_ARTIFACT_REPOSITORY is "
                    f"{os.environ.get('DEFAULT_ARTIFACT_REPOSITORY', 'not set')}), then try again."
                )
        for jar in missing:
            (arrived / jar.file_name).replace(folder / jar.file_name)


def _resolve(
    modules: Iterable[tuple[str, str, str]],
    scratch: Path,
    *,
    transitive: bool,
    described: bool = True,
) -> Path:
    """Let Ivy bring `modules` below `scratch`; return the folder that holds the jars.

    Parameters
    ----------
    described
        Ask also for what the repository says of each module, one request after another. For jars
        whose sums are known, it takes four times as long as the jars themselves.
    """
    wanted = "default,master,runtime(default)" if described else "default"
    ask = "" if described else ' usepoms="false" checksums=""'
    dependencies = "".join(
        f"<dependency org={quoteattr(o)} name={quoteattr(n)} rev={quoteattr(v)} "
        f'transitive="{str(transitive).lower()}" conf="default->{wanted}"/>'
        for o, n, v in modules
    )
    mirror = os.environ.get("DEFAULT_ARTIFACT_REPOSITORY")
    root = f" root={quoteattr(mirror)}" if mirror else ""
    (scratch / "settings.xml").write_text(
        '<ivysettings><settings defaultResolver="central"/><resolvers>'
        f'<ibiblio name="central" m2compatible="true"{ask}{root}/></resolvers></ivysettings>'
    )
    (scratch / "ivy.xml").write_text(
        '<ivy-module version="2.0"><info organisation="fruits" module="jars"/>'
        '<configurations><conf name="default"/></configurations>'
        f"<dependencies>{dependencies}</dependencies></ivy-module>"
    )
    (ivy,) = _spark_jars().glob("ivy-*.jar")
    command = [
        str(find_java_home() / "bin" / "java"),
        *QUICK_START.split(), *_trust_machine_certificates(), *_proxies(), "-jar", str(ivy),
        "-settings", str(scratch / "settings.xml"), "-ivy", str(scratch / "ivy.xml"),
        "-cache", str(scratch / "cache"), "-types", "jar",
        "-retrieve", str(scratch / "jars" / "[artifact]-[revision].[ext]"),
    ]  # fmt: skip
    output = []
    with subprocess.Popen(  # noqa: S603
        command,
        env=without_options(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            output.append(line)
            if "[SUCCESSFUL ]" in line:
                _say("  " + line.split("]", 1)[1].split("!")[0].strip())
    if process.returncode != 0 or any("UNRESOLVED" in line for line in output):
        tail = "".join(line for line in output if line.strip("\t\n .:"))[-1500:]
        raise JarError(f"Ivy could not bring the jars. Its last words:\n{tail}")
    return scratch / "jars"


def _trust_machine_certificates() -> list[str]:
    """Let any Java trust what Debian's trusts: a mirror's own authority, for one."""
    store = Path("/etc/ssl/certs/java/cacerts")
    return [f"-Djavax.net.ssl.trustStore={store}"] if store.exists() else []


def _proxies() -> list[str]:
    """Tell Java of the proxies that the environment names, of which it knows nothing by itself.

    "Java Networking and Proxies" in the documentation of Java has the names.
    """
    options = []
    for scheme, address in getproxies().items():
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if scheme in ("http", "https") and parts.hostname:
            options.append(f"-D{scheme}.proxyHost={parts.hostname}")
            options.append(f"-D{scheme}.proxyPort={parts.port or 80}")
    direct = [name.strip() for name in getproxies().get("no", "").split(",") if name.strip()]
    hosts = [f"*{name}" if name.startswith(".") else f"{name}|*.{name}" for name in direct]
    return [*options, f"-Dhttp.nonProxyHosts={'|'.join(hosts)}"] if options and hosts else options


def lock(file: Path = LOCK_FILE) -> None:
    """Resolve S3A for the installed Spark anew and write the lock file.

    The version of hadoop-aws is that of the Hadoop client inside pyspark, and the version of the
    AWS SDK is the one hadoop-aws names; a jar of which Spark ships a release is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        hadoop_aws = ("org.apache.hadoop", "hadoop-aws", hadoop_version())
        _resolve([hadoop_aws], scratch, transitive=False)
        named = _dependencies_named_by(hadoop_aws, scratch / "cache")
        sdk = named["bundle"][2]
        # S3A's auditor reads constants of the analytics stream, even where that stream is off.
        plain = [hadoop_aws, SPARK_HADOOP_CLOUD, named["analyticsaccelerator-s3"]]
        _resolve(plain, scratch, transitive=False)
        modules = [("software.amazon.awssdk", module, sdk) for module in SDK_MODULES]
        jars = _resolve(modules, scratch, transitive=True)
        organisations = _organisations(scratch / "cache")
        shipped = {_artifact(jar) for jar in _spark_jars().glob("*.jar")}
        lines = []
        for jar in sorted(jars.glob("*.jar")):
            name, version = _artifact(jar), jar.stem.rsplit("-", 1)[1]
            if name in shipped or name in _SHIPPED_UNDER_OTHER_NAMES:
                continue
            with jar.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            lines.append(f"{organisations[name]}:{name}:{version} {jar.stat().st_size} {digest}")
    header = (
        f"# S3A for Hadoop {hadoop_version()}, the Hadoop inside pyspark.\n"
        "# Written by `python -m pipeline.engine.jars lock`: coordinate, bytes, sha256.\n"
    )
    file.write_text(header + "\n".join(sorted(lines)) + "\n")
    _say(f"locked {len(lines)} jars in {file}")


# Spark answers for commons-logging with jcl-over-slf4j.
_SHIPPED_UNDER_OTHER_NAMES = {"commons-logging"}


def hadoop_version() -> str:
    """Return the version of the Hadoop client inside the installed pyspark."""
    (client,) = _spark_jars().glob("hadoop-client-api-*.jar")
    return client.stem.removeprefix("hadoop-client-api-")


def spark_home() -> Path:
    """Return the folder of the installed pyspark, without importing it."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise JarError("pyspark is not installed for this Python; run `make demo` once.")
    return Path(spec.origin).parent


def _spark_jars() -> Path:
    return spark_home() / "jars"


def _dependencies_named_by(
    module: tuple[str, str, str], cache: Path
) -> dict[str, tuple[str, str, str]]:
    organisation, name, version = module
    descriptor = ElementTree.parse(cache / organisation / name / f"ivy-{version}.xml")  # noqa: S314
    return {
        item.attrib["name"]: (item.attrib["org"], item.attrib["name"], item.attrib["rev"])
        for item in descriptor.iter("dependency")
    }


def _organisations(cache: Path) -> dict[str, str]:
    return {
        folder.name: folder.parent.name
        for folder in cache.glob("*/*")
        if folder.is_dir() and list(folder.glob("ivy-*.xml"))
    }


def _artifact(jar: Path) -> str:
    return re.sub(r"-\d[^-]*(\.Final)?$", "", jar.stem)


def _say(text: str) -> None:
    sys.stderr.write(f"fruits: {text}\n")


def main(arguments: list[str]) -> None:
    """Run `fetch [FOLDER]` or `lock`."""
    try:
        match arguments:
            case ["fetch"]:
                fetch()
            case ["fetch", folder]:
                fetch(Path(folder))
            case ["lock"]:
                lock()
            case _:
                sys.exit(
                    f"usage: python -m pipeline.engine.jars fetch [FOLDER] | lock\n\n{__doc__}"
                )
    except (JarError, JavaNotFoundError) as error:
        sys.exit(f"fruits: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
