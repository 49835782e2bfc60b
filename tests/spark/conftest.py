"""One application on the loopback cluster, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from pipeline.engine.session import make_session
from pipeline.local.loopback import Loopback
from pipeline.local.place import Place
from tests.conftest import Fruits


@pytest.fixture(scope="package")
def spark(cluster: Loopback) -> Iterator[SparkSession]:
    """An application; it holds all cores as long as tests of this folder run."""
    session = make_session("tests", log=cluster.conf.parent / "driver.log")
    yield session
    session.stop()


@pytest.fixture
def fruits_on_spark(
    spark: SparkSession, fruits_here: Fruits, monkeypatch: pytest.MonkeyPatch
) -> Fruits:
    """The command in this process; once it asks for Spark, it gets the application above."""
    monkeypatch.setattr(Place, "spark", lambda _: spark)
    return fruits_here
