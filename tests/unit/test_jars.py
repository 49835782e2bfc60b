"""The locked jars fit the installed Spark, come from nowhere in particular, and arrive whole."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.engine import jars
from pipeline.engine.jars import (
    LOCK_FILE,
    Jar,
    JarError,
    default_folder,
    fetch,
    hadoop_version,
    read_lock,
    spark_home,
)

PROJECT = Path(__file__).parents[2]
PYTHON_LOCKS = sorted(PROJECT.glob("*.lock"))
REQUIREMENT = re.compile(r"[\w.-]+(\[[\w,-]+\])?==\S+( ; .+)?")


def requirements(lock: Path) -> list[str]:
    """Return each package of a lock file with its version, its condition and its hashes."""
    return lock.read_text().replace("\\\n", "").splitlines()


def versions(lock: Path) -> list[str]:
    """Return the packages without the conditions, which tell also who else asks for them."""
    return [re.sub(r" ; .+?(?= +--hash)", "", line) for line in requirements(lock)]


def locked() -> dict[str, Jar]:
    return {jar.name: jar for jar in read_lock()}


# --- the lock files --------------------------------------------------------------------------


def test_the_lock_has_a_line_for_each_jar() -> None:
    lines = [line for line in LOCK_FILE.read_text().splitlines() if not line.startswith("#")]
    found = read_lock()
    assert len(locked()) == len(found) == len(lines) > 30
    for jar, line in zip(found, lines, strict=True):
        assert line == f"{jar.organisation}:{jar.name}:{jar.version} {jar.size} {jar.sha256}"
        assert re.fullmatch("[0-9a-f]{64}", jar.sha256)
        assert jar.size > 1000
    assert lines == sorted(lines)


def test_s3a_is_that_of_the_hadoop_inside_pyspark() -> None:
    assert locked()["hadoop-aws"].version == hadoop_version(), "run `make lock`"
    assert f"Hadoop {hadoop_version()}," in LOCK_FILE.read_text()


def test_every_module_of_the_aws_sdk_has_the_same_version() -> None:
    sdk = {jar.version for jar in read_lock() if jar.organisation == "software.amazon.awssdk"}
    assert len(sdk) == 1
    assert locked().keys() >= {*jars.SDK_MODULES, "hadoop-aws", "spark-hadoop-cloud_2.13"}


def test_the_commit_protocol_is_built_for_the_scala_of_pyspark() -> None:
    (library,) = (spark_home() / "jars").glob("scala-library-*.jar")
    scala = library.stem.removeprefix("scala-library-").rpartition(".")[0]
    assert f"spark-hadoop-cloud_{scala}" in locked()


def test_no_jar_is_one_that_spark_ships() -> None:
    shipped = {re.sub(r"-\d[^-]*$", "", jar.stem) for jar in (spark_home() / "jars").glob("*.jar")}
    assert len(shipped) > 100
    assert not shipped & locked().keys()


@pytest.mark.parametrize("file", [LOCK_FILE, *PYTHON_LOCKS], ids=lambda file: file.name)
def test_no_lock_file_names_a_place_to_download_from(file: Path) -> None:
    text = file.read_text()
    assert text.strip()
    for word in ("://", " @ ", "--index", "--extra-index", "--find-links"):
        assert word not in text


@pytest.mark.parametrize("file", PYTHON_LOCKS, ids=lambda file: file.name)
def test_every_python_package_is_locked_by_version_and_hashes(file: Path) -> None:
    assert requirements(file)
    for line in requirements(file):
        requirement, *hashes = line.split("--hash=")
        assert REQUIREMENT.fullmatch(requirement.strip()), line[:80]
        assert hashes, line[:80]
        for one in hashes:
            assert re.fullmatch("sha256:[0-9a-f]{64}", one.strip())


def test_every_place_has_its_lock_file() -> None:
    names = {file.name for file in PYTHON_LOCKS}
    places = ("admin", "build", "demo", "dev", "java", "master", "worker")
    assert names == {f"{place}.lock" for place in places}


def test_what_one_place_has_the_developers_have_too_and_the_same() -> None:
    """So `make demo` and then `make test` install each package once."""
    of_developers = set(versions(PROJECT / "dev.lock"))
    for name in ("admin", "build", "demo", "master", "worker"):
        assert set(versions(PROJECT / f"{name}.lock")) <= of_developers, name


# --- one jar ---------------------------------------------------------------------------------


def jar_of(content: bytes, name: str = "thing") -> Jar:
    return Jar("org.example", name, "1.0", len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a jar", None),
        (None, "is missing"),
        (b"a j", "should be 5 bytes and is 3"),
        (b"a rag", f"should have sha256 {hashlib.sha256(b'a jar').hexdigest()} and has "),
    ],
    ids=["right", "missing", "short", "changed"],
)
def test_a_jar_says_what_is_wrong_with_its_file(
    tmp_path: Path, content: bytes | None, problem: str | None
) -> None:
    if content is not None:
        (tmp_path / "thing-1.0.jar").write_bytes(content)
    told = jar_of(b"a jar").problem(tmp_path)
    assert told is None if problem is None else str(told).startswith(problem)


# --- fetching, with the Ivy inside pyspark and a mirror in a folder --------------------------


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Maven repository that holds `thing` and `other`."""
    for name in ("thing", "other"):
        folder = tmp_path / "mirror/org/example" / name / "1.0"
        folder.mkdir(parents=True)
        (folder / f"{name}-1.0.jar").write_bytes(name.encode())
        (folder / f"{name}-1.0.pom").write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>org.example</groupId>"
            f"<artifactId>{name}</artifactId><version>1.0</version></project>"
        )
    monkeypatch.setenv("DEFAULT_ARTIFACT_REPOSITORY", (tmp_path / "mirror").as_uri())
    return tmp_path / "mirror"


def fetch_locked(monkeypatch: pytest.MonkeyPatch, folder: Path, *wanted: Jar) -> dict[str, bytes]:
    """Fetch by a lock of these jars and return what the folder then holds."""
    monkeypatch.setattr(jars, "read_lock", lambda: list(wanted))
    assert fetch(folder) == [folder / jar.file_name for jar in wanted]
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_missing_and_damaged_jars_are_fetched_and_the_others_left(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jars"
    folder.mkdir()
    (folder / "thing-1.0.jar").write_bytes(b"damaged")
    (folder / "here-1.0.jar").write_bytes(b"here")
    wanted = [jar_of(name.encode(), name) for name in ("thing", "other", "here")]
    expected = {f"{name}-1.0.jar": name.encode() for name in ("thing", "other", "here")}
    assert fetch_locked(monkeypatch, folder, *wanted) == expected
    monkeypatch.setattr(jars, "_resolve", lambda *_, **__: pytest.fail("fetched again"))
    assert fetch_locked(monkeypatch, folder, *wanted) == expected


@pytest.mark.parametrize("sent", [b"thinG", b"longer than it should be"])
def test_of_jars_with_a_wrong_sum_nothing_is_left_in_the_folder(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    (mirror / "org/example/thing/1.0/thing-1.0.jar").write_bytes(sent)
    wanted = [jar_of(b"other", "other"), jar_of(b"thing")]
    with pytest.raises(JarError, match=r"thing-1\.0\.jar should .*file://.*try again"):
        fetch_locked(monkeypatch, tmp_path / "jars", *wanted)
    assert contents(tmp_path / "jars") == {}


def test_a_mirror_without_the_jar_is_told_in_ivys_words(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [jar_of(b"thing"), jar_of(b"nowhere", "nowhere")]
    with pytest.raises(JarError, match=r"(?s)could not bring the jars.*nowhere;1\.0: not found"):
        fetch_locked(monkeypatch, tmp_path / "jars", *wanted)
    assert contents(tmp_path / "jars") == {}


def test_the_jars_of_all_clones_lie_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jars.default_folder() == tmp_path / "fruits" / "jars"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jars.default_folder() == Path.home() / ".cache/fruits/jars"


class Proxy(BaseHTTPRequestHandler):
    """A proxy that has the jars of this machine's cache, whatever mirror it is asked for."""

    def do_GET(self) -> None:
        asked.append(self.path)
        jar = default_folder() / self.path.rpartition("/")[2]
        content = jar.read_bytes() if jar.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


asked: list[str] = []


def test_jars_come_through_the_proxy_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("DEFAULT_ARTIFACT_REPOSITORY", "http://mirror.invalid/maven")
    assert len(fetch(tmp_path / "jars")) == len(read_lock())
    assert asked
    assert all(path.startswith("http://mirror.invalid/maven/") for path in asked)
    proxy.shutdown()
    proxy.server_close()
