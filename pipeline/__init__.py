"""Fruits!: from fruit photos on S3 to a PCA matrix, on a Spark cluster of your own."""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"


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


_leave_out_other_sparks()
