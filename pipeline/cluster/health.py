"""A small job in every task slot of the cluster, run by the playbook that checks it.

    python -m pipeline.cluster.health MASTER_PAGE

The tasks say where they ran; then a small table goes to the bucket through S3A and is read back.
While another application has the slots, the job would only wait for it: then the master tells
which workers it knows, and an object goes to the bucket and back.
Prints JSON: `workers`, by address, and `table`, lines for people.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyspark.sql import SparkSession

from pipeline.cluster.master import PAGE_KEY, alive_workers, master_state, page_token
from pipeline.engine.session import make_session, read_settings, task_slots
from pipeline.errors import ClusterError, FruitsError
from pipeline.s3.access import settings_here
from pipeline.storage import Address, Store, open_store

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
    return _told(hosts, [f"wrote to {scratch} and read it back: well, in {seconds:.0f} s"])


def check_busy(state: Mapping[str, Any], scratch: Store) -> dict[str, Any]:
    """Return what the master knows of a cluster whose slots are taken; ask S3 without Spark.

    Raises
    ------
    ClusterError
        When what is read from S3 is not what was written.
    """
    content = uuid.uuid4().bytes
    scratch.write("object", content)
    if scratch.read("object") != content:
        raise ClusterError(f"expected {scratch.address}/object as written. Look at S3.")
    names = ", ".join(application["name"] for application in state["activeapps"])
    lines = [
        f"busy with {names}: no job was run in the slots",
        f"wrote to {scratch.address} and read it back: well",
    ]
    return _told({worker["host"]: worker["cores"] for worker in alive_workers(state)}, lines)


def _told(slots: Mapping[str, int], lines: list[str]) -> dict[str, Any]:
    table = [f"{host:16} {count} task slots" for host, count in sorted(slots.items())]
    workers = {host: {"slots": count} for host, count in slots.items()}
    return {"workers": workers, "table": [*table, *lines]}


def main(master_page: str) -> None:
    """Check the cluster of SPARK_CONF_DIR and print what was seen."""
    settings = read_settings()
    bucket = Address.parse(settings["spark.eventLog.dir"]).bucket
    scratch = Address(bucket, f"health/{uuid.uuid4().hex}")
    s3 = settings_here(settings)
    try:
        state = master_state(master_page, page_token(settings[PAGE_KEY]))
        try:
            if state["activeapps"]:
                seen = check_busy(state, open_store(scratch, s3))
            else:
                slots = sum(worker["cores"] for worker in alive_workers(state))
                seen = _check_by_a_job(scratch, slots)
        finally:
            open_store(Address(bucket, ""), s3).delete(scratch.path)
    except (FruitsError, OSError) as error:
        sys.exit(f"fruits: {error}")
    sys.stdout.write(json.dumps(seen) + "\n")


def _check_by_a_job(scratch: Address, slots: int) -> dict[str, Any]:
    if not slots:
        raise ClusterError("expected workers with task slots, found none. Look at their services.")
    # Told how many it is to have, Spark waits for all of them; otherwise, for any.
    spark = make_session("health", settings=ALL_SLOTS | {"spark.cores.max": str(slots)})
    try:
        return check(spark, scratch)
    finally:
        spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
