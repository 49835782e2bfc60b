"""What of the user's environment a cluster on loopback hears.

A laptop has variables of other installations: another Spark, Hadoop or Java, credentials for AWS.
The cluster's processes get none of them; what concerns S3 reaches them as settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipeline.engine.java import without_options
from pipeline.engine.session import become
from pipeline.s3.access import without_aws

# Of other installations. PYTHONPATH and its like would bring other packages than the locked ones.
OTHERS = ("SPARK_", "PYSPARK_", "HADOOP_", "HDFS_", "YARN_", "HIVE_", "MAPRED_")
OF_PYTHON = {"PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONUSERBASE"}


def of_servers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process of the cluster: nothing of the user's is in it."""
    left = without_options(without_aws(environment))
    return {name: value for name, value in left.items() if name not in OF_PYTHON} | {
        "AWS_EC2_METADATA_DISABLED": "true"
    }


@contextmanager
def environment_of(values: Mapping[str, str], *, with_s3: bool) -> Iterator[None]:
    """Give this process the environment of the driver of a cluster on loopback.

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
        if not name.startswith(OTHERS) and name != "MASTER"
    }
    become({**(without_aws(kept) if with_s3 else kept), **values})
    try:
        yield
    finally:
        become(before)
