"""Two drivers at one table, on a real S3 server that holds both back just before their commits."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pyspark.sql import SparkSession

from pipeline.errors import FruitsError, StateError
from pipeline.features import Progress
from pipeline.job import Job
from pipeline.networks.model import Model
from pipeline.record import Counts, PCAOptions
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, BucketStore, FolderStore
from pipeline.upload import upload
from tests.s3_proxy import Behaviour, s3_proxy


class Silent:
    def stage(self, name: str) -> None: ...

    def progress(self, progress: Progress) -> None: ...


def test_of_two_drivers_with_the_same_work_one_commits_it_and_the_other_says_so(
    spark: SparkSession,
    bucket: BucketStore,
    fruit_pictures: Path,
    small_network: tuple[Model, bytes],
    tmp_path: Path,
) -> None:
    model, flatbuffer = small_network
    pictures = tmp_path / "pictures"

    def job(s3: S3Settings) -> Job:
        images, output = bucket.address / "images", bucket.address / "out"
        return Job(
            images,
            output,
            model,
            lambda: flatbuffer,
            lambda: spark,
            s3,
            Silent(),
            PCAOptions(2, None),
        )

    def put(*varieties: str) -> None:
        for variety in varieties:
            shutil.copytree(fruit_pictures / variety, pictures / variety)
        target = BucketStore(bucket.address / "images", bucket.s3)
        upload(FolderStore(Address.parse(str(pictures))), target)

    def counts(s3: S3Settings) -> Counts | FruitsError:
        try:
            return job(s3).features()
        except FruitsError as error:
            return error

    put("Banana", "Lemon")
    assert job(bucket.s3).run().counts.computed == 8
    put("Orange", "Plum")
    (pictures / "Banana").rename(tmp_path / "gone")
    gone = next((tmp_path / "gone").iterdir()).name
    bucket.delete(f"images/Banana/{gone}")
    held = s3_proxy(str(bucket.s3.endpoint), Behaviour(together=2))
    with held as proxy, ThreadPoolExecutor(2) as pool:
        far = replace(bucket.s3, endpoint=proxy.endpoint)
        outcomes = list(pool.map(counts, [far, far]))
    (won,) = (one for one in outcomes if isinstance(one, Counts))
    (told,) = (one for one in outcomes if isinstance(one, StateError))
    assert (won.listed, won.computed, won.dropped) == (15, 8, 1)
    assert "expected nobody else to write" in str(told)

    run = job(bucket.s3).run()
    assert (run.counts.computed, run.counts.features, run.pca.rows) == (0, 15, 15)
    table = job(bucket.s3).table
    paths = [row["path"] for row in table.read(spark, table.newest(), ["path"]).collect()]
    assert len(set(paths)) == len(paths) == 15
