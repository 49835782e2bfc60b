"""Does the feature job stay as fast when every GET takes 25 ms longer, as on real S3?

As features.py, but the workers' image reader asks a proxy (see s3_proxy.py) that adds 25 ms to the
answer of every GET. Tables still go to S3 directly. As there, the figure is that of the second job
in one application.
What the proxy itself costs the shared cores is told beside it, and not taken off the figure.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from pipeline.reading import ImageReader
from tests.benchmarks._common import MANY, Setup, application, images_on_s3
from tests.benchmarks.features import GOAL, features_per_second, mean, network_alone
from tests.benchmarks.results import Result
from tests.s3_proxy import Behaviour, s3_proxy

DELAY = 0.025


def measure(setup: Setup) -> list[Result]:
    """Return the ratio, and what the proxy cost."""
    with ExitStack() as stack:
        place = stack.enter_context(images_on_s3(setup, MANY, setup.images))
        spark = stack.enter_context(application(place.cluster))
        network = network_alone(place, spark, stack)
        s3 = place.cluster.s3
        with s3_proxy(str(s3.endpoint), Behaviour(DELAY)) as proxy:
            reader = ImageReader(place.images, replace(s3, endpoint=proxy.endpoint))
            features_per_second(place, spark, reader, "cold")
            before = network.images_per_second()
            speed = features_per_second(place, spark, reader, "warm")
            after = network.images_per_second()
    if proxy.gets < 2 * len(place.files):
        raise RuntimeError(
            f"2 x {len(place.files)} images, but only {proxy.gets} GETs were delayed"
        )
    alone = mean([before, after])
    cost = 1000 * proxy.cpu_seconds / proxy.gets
    return [
        Result("features_over_network_25ms", speed / alone, "ratio", GOAL),
        Result("features_25ms_images_per_second", speed, "images/s"),
        Result("features_25ms_proxy_cpu", cost, "ms of CPU per GET"),
    ]
