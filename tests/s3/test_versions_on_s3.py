"""Versions on a real S3 server: readers, killed runs and two who publish at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.storage import BucketStore
from pipeline.versions import RESULT, all_versions, copy_newest
from tests.versioned import NAMES, DyingBucket, Killed, again, copied, make, seen


def test_a_reader_sees_one_whole_result_through_publishes_and_kills(bucket: BucketStore) -> None:
    """Each of the steps of publishing is once the last, while a reader looks again and again."""
    store = DyingBucket(bucket.address / "out", bucket.s3)
    store.taken = []
    make(store, "first")
    over, looks = threading.Event(), []

    def look() -> None:
        while not over.wait(0.05):
            looks.append(seen(store))

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look)
        try:
            number, killed = 0, 0
            while killed == number:
                store.steps, store.taken = number, []
                try:
                    make(store, f"run-{number}")
                except Killed:
                    killed += 1
                number += 1
        finally:
            over.set()
        reader.result()
    assert killed == 3 + len(RESULT) + len(NAMES), "at each step once, then to the end"
    assert None not in looks
    assert seen(store) == f"run-{killed}"
    assert copied(store) == {f"run-{killed}".encode()}


def test_of_two_who_publish_at_once_both_end_well(bucket: BucketStore) -> None:
    store = BucketStore(bucket.address / "out", bucket.s3)
    with ThreadPoolExecutor(2) as pool:
        for turn in range(5):
            start = threading.Barrier(2)

            def run(name: str, late: float, start: threading.Barrier = start) -> int:
                mine = again(store)
                start.wait()
                time.sleep(late)
                return make(mine, name).version

            names, late = (f"{turn}-one", f"{turn}-other"), (0.01 * (turn % 3), 0.01)
            numbers = sorted(pool.map(run, names, late))
            assert numbers == [2 * turn + 1, 2 * turn + 2]
            newest = all_versions(store)[-1][1].run_id
            copy_newest(store)
            assert (seen(store), copied(store)) == (newest, {newest.encode()})
