"""Where a job runs: the S3 it reads, the Spark it starts once it needs it, the model it loads.

The command line and the demo say what they want in words; this turns the words into a job.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from pyspark.sql import SparkSession

from pipeline.engine.session import make_session, read_settings
from pipeline.errors import StateError, StorageError
from pipeline.job import Choices, Job
from pipeline.journal import Observer
from pipeline.local.loopback import loopback_cluster
from pipeline.networks.catalogue import NETWORKS
from pipeline.networks.model import Model, find_weights, flatbuffer, identify
from pipeline.s3.access import S3Settings, settings_here
from pipeline.storage import Address, Store, open_store
from pipeline.table.feature_table import FeatureTable, models_in

CLUSTERS = Path(".fruits")  # the folders of loopback clusters, below the current one


@contextmanager
def open_place(master: str | None, *, with_s3: bool = False) -> Iterator[Place]:
    """Open a place and, at the end, stop whatever was started in it.

    Parameters
    ----------
    master
        `spark://host:port`; None takes the cluster that SPARK_CONF_DIR describes, else one that is
        started on loopback once a session is asked for.
    with_s3
        Start a cluster on loopback right away, and an S3 server with it.
    """
    with ExitStack() as stack:
        yield Place(stack, master, with_s3=with_s3)


class Place:
    """An S3, the session once it is needed, and the addresses of their pages."""

    def __init__(self, stack: ExitStack, master: str | None, *, with_s3: bool) -> None:
        self.stack = stack
        self.master = master
        self.pages: dict[str, str] = {}
        self.conf: Path | None = None
        self.log: Path | None = None
        self.session: SparkSession | None = None
        if with_s3:
            self._start_cluster(None)

    @cached_property
    def s3(self) -> S3Settings:
        """How S3 is reached; looked for only where something lies there.

        A cluster's hosts have roles, or keys that its settings name: nothing of this user's goes
        there.
        """
        named = {"spark.master": self.master} if self.master else {}
        return settings_here(read_settings() | named)

    def s3_for(self, *addresses: str | Address | None) -> S3Settings:
        """Return how S3 is reached for some addresses: for folders alone, it need not be."""
        parsed = (Address.parse(str(address)) for address in addresses if address is not None)
        return self.s3 if any(address.bucket for address in parsed) else S3Settings()

    def spark(self) -> SparkSession:
        """Return the session; start it, and a loopback cluster if no other is known."""
        if self.session is None:
            if self.master is None and "spark.master" not in read_settings():
                self._start_cluster(self.s3 if "s3" in vars(self) else S3Settings())
            self.session = make_session("fruits", self.master, log=self.log or self._new_log())
            self.stack.callback(self.session.stop)
            self.pages["application"] = self.session.sparkContext.uiWebUrl or "none"
        return self.session

    def _new_log(self) -> Path:
        """Return where the driver's JVM writes: an error reaches the user as one line of ours."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="fruits-"))
        return Path(folder) / "driver.log"

    def _start_cluster(self, s3: S3Settings | None) -> None:
        cluster = self.stack.enter_context(loopback_cluster(CLUSTERS, s3))
        self.pages = dict(cluster.pages)
        self.conf = cluster.conf
        self.log = cluster.conf.parent / "driver.log"


def make_job(
    place: Place,
    observer: Observer,
    images: str,
    output: str,
    backbone: str,
    weights: str | None,
    input_size: int,
    choices: Choices,
) -> Job:
    """Return the job from IMAGES to OUTPUT by a network and its weights.

    Raises
    ------
    FruitsError
        When an address or the weights cannot be used.
    """
    file = find_weights(backbone, _fetched(weights, place))
    model = identify(NETWORKS[backbone], file, input_size)
    return Job(
        images=Address.parse(images),
        output=Address.parse(output),
        model=model,
        flatbuffer=lambda: flatbuffer(model, file),
        spark=place.spark,
        s3=place.s3_for(images, output, choices.inventory),
        observer=observer,
        choices=choices,
    )


def _fetched(weights: str | None, place: Place) -> str | None:
    """Return a local name for weights; those on S3 are fetched for the time of the run."""
    if weights is None or "://" not in weights:
        return weights
    scratch = place.stack.enter_context(tempfile.TemporaryDirectory(prefix="fruits-"))
    return str(fetch_weights(Address.parse(weights), place.s3, Path(scratch)))


def fetch_weights(address: Address, s3: S3Settings, folder: Path) -> Path:
    """Copy weights from S3 into a folder.

    Raises
    ------
    StorageError
        When there are none.
    """
    place, _, name = address.path.rpartition("/")
    content = open_store(Address(address.bucket, place), s3).read(name)
    if content is None:
        raise StorageError(f"expected weights at {address}, found none; check --weights.")
    file = folder / name
    file.write_bytes(content)
    return file


def make_job_of_table(
    place: Place,
    observer: Observer,
    output: str,
    backbone: str | None,
    choices: Choices,
) -> Job:
    """Return the job that goes on from the feature table below OUTPUT.

    Raises
    ------
    StateError
        When OUTPUT holds no complete table, or several and `backbone` does not choose one.
    """
    s3 = place.s3_for(output)
    store = open_store(Address.parse(output), s3)
    model = model_in(store, backbone)
    images = FeatureTable(store, model, s3).images()
    return Job(
        images=images,
        output=Address.parse(output),
        model=model,
        flatbuffer=lambda: b"",
        spark=place.spark,
        s3=place.s3_for(images, output),
        observer=observer,
        choices=choices,
    )


def model_in(output: Store, backbone: str | None) -> Model:
    """Return the model whose features lie below an OUTPUT.

    Raises
    ------
    StateError
        When there is none, or several and `backbone` does not choose one.
    """
    models = models_in(output)
    chosen = [model for model in models if backbone in (None, model.network)]
    if len(chosen) != 1:
        held = ", ".join(model.id for model in models) or "none"
        raise StateError(
            f"expected the features of one model in {output.address}"
            f"{f' and of {backbone}' if backbone else ''}, found: {held}. "
            + ("Choose with --backbone." if chosen else "Compute them: fruits features --help")
        )
    return chosen[0]
