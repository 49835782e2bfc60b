"""Spark's settings as Python reads them, and those that keep a cluster safe."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.java import one_line
from pipeline.engine.session import COMMON_SETTINGS, _standard_error_to, make_session, read_settings
from pipeline.errors import ClusterError

SETTINGS = """
# a comment
spark.master                spark://127.0.0.1:7077

   spark.authenticate.secret\tsecret#1 = 2
  # an indented comment
spark.a.flag
spark.executor.extraJavaOptions  -Da=1 -Db="2 3"
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    return tmp_path / "spark-defaults.conf"


def test_settings_are_read_as_spark_reads_them(conf: Path) -> None:
    conf.write_text(SETTINGS)
    assert read_settings() == {
        "spark.master": "spark://127.0.0.1:7077",
        "spark.authenticate.secret": "secret#1 = 2",
        "spark.a.flag": "",
        "spark.executor.extraJavaOptions": '-Da=1 -Db="2 3"',
    }


def test_without_a_file_there_are_no_settings(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings() == {}
    monkeypatch.delenv("SPARK_CONF_DIR")
    assert read_settings() == {}


def test_without_a_master_a_session_says_what_to_give(conf: Path) -> None:
    with pytest.raises(ClusterError, match=r"found none; give --master .* or set SPARK_CONF_DIR"):
        make_session("a name")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spark.authenticate", "true"),
        ("spark.network.crypto.enabled", "true"),
        ("spark.network.crypto.cipher", "AES/GCM/NoPadding"),
        ("spark.network.crypto.authEngineVersion", "2"),
        ("spark.network.crypto.saslFallback", "false"),
        ("spark.io.encryption.enabled", "true"),
        ("spark.master.rest.enabled", "false"),
        ("spark.master.ui.decommission.allow.mode", "DENY"),
        ("spark.ui.killEnabled", "false"),
        ("spark.hadoop.fs.s3a.committer.name", "magic"),
    ],
)
def test_every_cluster_is_safe_by_the_common_settings(conf: Path, name: str, value: str) -> None:
    conf.write_text(COMMON_SETTINGS.read_text())
    assert read_settings()[name] == value


def test_the_common_settings_hold_no_secret_and_no_place() -> None:
    settings = COMMON_SETTINGS.read_text()
    assert "secret " not in settings.replace("the secret itself", "")
    for word in ("secret.key", "access.key", "://", "127.0.0.1"):
        assert word not in settings


def test_what_a_child_says_goes_to_the_log_and_ours_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = [sys.executable, "-c", "import sys; sys.stderr.write('of the child')"]
    with _standard_error_to(tmp_path / "log"):
        subprocess.run(child, check=True)
    os.write(2, b"ours")
    assert (tmp_path / "log").read_text() == "of the child"
    assert capfd.readouterr().err == "ours"


def test_a_user_without_a_name_is_told_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)
    with pytest.raises(ClusterError, match=r"user with a name.*number 4000000001.*/etc/passwd"):
        make_session("nobody", "spark://127.0.0.1:1")


@pytest.mark.parametrize(
    ("locale", "given"),
    [("C.UTF-8", "C.UTF-8"), ("C", "C.UTF-8"), ("xx_XX.UTF-8", "C.UTF-8")],
)
def test_java_is_given_utf8_for_the_names_of_files(locale: str, given: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import os, pipeline; print(os.environ['LC_ALL'])"],
        env=os.environ | {"LC_ALL": locale},
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == given


def test_options_for_java_are_read_by_spark_as_they_were_written() -> None:
    options = ["-Xmx1g", '-Da=/a b/c\'s "d" \\ 100% é', "-XX:+UseSerialGC"]
    assert shlex.split(one_line(options)) == options
