"""Fruits!: from fruit photos on S3 to a PCA matrix, on a Spark cluster of your own."""

import locale
import os
import sys
from pathlib import Path

__version__ = "0.1.0"
DIRECT = ("localhost", "127.0.0.1", "::1", "169.254.169.254", "169.254.170.2", "169.254.170.23")


def _leave_out_other_sparks() -> None:
    """Forget what PYTHONPATH has of another Spark: its Python would be imported for ours.

    Many a .bashrc has `export PYTHONPATH=$SPARK_HOME/python:$SPARK_HOME/python/lib/py4j-...zip`.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [
        entry
        for entry in named
        if Path(entry, "pyspark").is_dir()
        and (Path(entry).name, Path(entry, "lib").is_dir()) == ("python", True)
    ]
    for entry in named:
        if any(Path(entry).is_relative_to(other) for other in others):
            sys.path[:] = [place for place in sys.path if place != entry]
            named = [other for other in named if other != entry]
    if others:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)


def _reach_this_host_directly() -> None:
    """Keep what is on this machine, and the services that tell a host its role, from any proxy."""
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return
    spellings = ("no_proxy", "NO_PROXY")
    named = [one for name in spellings for one in os.environ.get(name, "").split(",") if one]
    everything = "*" in (one.strip() for one in named)  # which means that only if it is alone
    for name in spellings:
        os.environ[name] = "*" if everything else ",".join(dict.fromkeys([*named, *DIRECT]))


def _name_files_in_utf8() -> None:
    """Give the Java that is started from here UTF-8 for the names of files.

    Python takes it by itself where the locale is C, or one that is not installed; Java then cannot
    open what has an accent in its path.
    """
    if locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ["LC_ALL"] = "C.UTF-8"


_leave_out_other_sparks()
_name_files_in_utf8()
_reach_this_host_directly()
