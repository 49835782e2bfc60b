"""A small job in every task slot of the cluster, run by the playbook that checks it.

The tasks say where they ran; then a small table goes to the bucket through S3A and is read back.
Prints JSON: `workers`, by address, and `table`, lines for people.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from pyspark.sql import SparkSession

from pipeline.errors import ClusterError, FruitsError
from pipeline.session import make_session, read_settings, task_slots
from pipeline.storage import Address, S3Settings, open_store

ALL_SLOTS = {
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.scheduler.maxRegisteredResourcesWaitingTime": "60s",
    "spark.eventLog.enabled": "false",
}


def check(spark: SparkSession, scratch: Address) -> dict[str, Any]:
    """Run a task in every slot, and a table through S3A; return what was seen.

    Raises
    ------
    ClusterError
        When what is read from S3 is not what was written.
    """
    slots = task_slots(spark)

    def where(_: Iterable[int]) -> Iterator[str]:
        time.sleep(2)  # so that no slot runs two tasks while another has none
        yield os.environ["SPARK_LOCAL_IP"]  # the address at which the master knows this worker

    began = time.monotonic()
    hosts = Counter(
        spark.sparkContext.parallelize(range(slots), slots).mapPartitions(where).collect()
    )
    spark.range(0, 1000, numPartitions=slots).write.parquet((scratch / "numbers").uri)
    read = spark.read.parquet((scratch / "numbers").uri).count()
    if read != 1000:
        raise ClusterError(f"expected 1000 rows back from {scratch}, found {read}. Look at S3.")
    seconds = time.monotonic() - began
    table = [f"{host:16} {count} task slots" for host, count in sorted(hosts.items())]
    table.append(f"wrote to {scratch} and read it back: well, in {seconds:.0f} s")
    return {"workers": {host: {"slots": count} for host, count in hosts.items()}, "table": table}


def main() -> None:
    """Check the cluster of SPARK_CONF_DIR and print what was seen."""
    settings = read_settings()
    bucket = Address.parse(settings["spark.eventLog.dir"]).bucket
    scratch = Address(bucket, f"health/{uuid.uuid4().hex}")
    try:
        spark = make_session("health", settings=ALL_SLOTS)
        try:
            seen = check(spark, scratch)
        finally:
            spark.stop()
            open_store(Address(bucket, ""), S3Settings.from_spark(settings)).delete(scratch.path)
    except FruitsError as error:
        sys.exit(f"fruits: {error}")
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
