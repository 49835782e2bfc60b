"""Results without a pipeline: files that name their run, published as versions, and seen."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.record import Run
from pipeline.s3.access import S3Settings
from pipeline.storage import BucketStore, FolderStore, Store, open_store
from pipeline.versions import RESULT, copy_newest, open_result, publish
from tests.records import run_of

FILES = {
    "matrix.parquet": ["matrix.parquet/part-0.parquet", "matrix.parquet/_SUCCESS"],
    "model": ["model/pca.npz"],
    "report-data": ["report-data/scores.parquet", "report-data/pictures.parquet"],
}
NAMES = [file for name in RESULT for file in FILES.get(name, [name])]


class Killed(BaseException):
    """What ends a run between two steps."""


class Dying:
    """What a store becomes whose user is killed after so many changes of it."""

    steps = 10**9
    taken: list[str]

    def _step(self, name: str) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Killed
        self.taken.append(name)

    def write(self, key: str, content: bytes) -> None:
        self._step(f"write {key}")
        super().write(key, content)

    def write_new(self, key: str, content: bytes) -> bool:
        self._step(f"publish {key}")
        return super().write_new(key, content)

    def copy(self, source: str, target: str) -> None:
        self._step(f"copy {target}")
        super().copy(source, target)

    def delete(self, prefix: str) -> None:
        self._step(f"delete {prefix}")
        super().delete(prefix)


class DyingFolder(Dying, FolderStore):
    """Such a folder."""


class DyingBucket(Dying, BucketStore):
    """Such a bucket."""


def settings(store: Store) -> S3Settings:
    return store.s3 if isinstance(store, BucketStore) else S3Settings()


def again(store: Store) -> Store:
    """Return the same store, as another process opens it."""
    return open_store(store.address, settings(store))


def prepare(store: Store, name: str) -> Run:
    """Write the files of a result, each of which holds the name of the run."""
    files = again(store)
    for file in NAMES:
        files.write(f"versions/{name}/{file}", name.encode())
    return run_of(run_id=name, folder=name)


def make(store: Store, name: str, is_current: Callable[[], bool] = lambda: True) -> Run:
    run = publish(store, prepare(store, name), is_current)
    copy_newest(store)
    return run


def seen(store: Store) -> str | None:
    """Return whose result a reader sees, all of it."""
    run, files = open_result(again(store), settings(store))
    if run is None:
        return None
    contents = {files.read(name) for name in run.files}
    assert contents == {run.run_id.encode()}
    assert run.files.keys() == set(NAMES)
    return run.run_id


def copied(store: Store) -> set[bytes | None]:
    return {store.read(name) for name in NAMES}
