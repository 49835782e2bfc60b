"""What of the user's environment a cluster on loopback hears.

A laptop has variables of other installations: another Spark, Hadoop or Java, credentials for AWS.
The cluster's processes get none of them; what concerns S3 reaches them as settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.s3.access import NO_FILE

# Of other installations. PYTHONPATH and its like would bring other packages than the locked ones.
OTHERS = ("SPARK_", "PYSPARK_", "HADOOP_", "HDFS_", "YARN_", "HIVE_", "MAPRED_")
NAMES = {
    "CLASSPATH", "JAVA_OPTS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "MASTER",
    "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONUSERBASE",
}  # fmt: skip
OF_AWS = ("AWS_", "BOTO_")


def without_aws(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which no S3 client finds anything of the user's."""
    left = {name: value for name, value in environment.items() if not name.startswith(OF_AWS)}
    return left | NO_FILE | {"AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def environment_of(values: Mapping[str, str], *, with_s3: bool) -> Iterator[None]:
    """Give this process, and those that it starts, the environment of a cluster on loopback.

    Parameters
    ----------
    values
        What the cluster's own variables are.
    with_s3
        S3 is on loopback, too: this process then leaves the user's AWS alone.
    """
    before = dict(os.environ)
    kept = {
        name: value
        for name, value in before.items()
        if not name.startswith(OTHERS) and name not in NAMES
    }
    _become({**(without_aws(kept) if with_s3 else kept), **values})
    try:
        yield
    finally:
        _become(before)


def _become(values: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)
