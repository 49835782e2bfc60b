"""A record of a run, as tests need one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.networks.model import Model
from pipeline.record import Cluster, Counts, Fit, Made, PCAOptions, Run, Speed

MODEL = Model(
    id="mobilenet_v2-224-scaled-e67de524",
    network="mobilenet_v2",
    input_size=224,
    preprocessing="x / 127.5 - 1",
    weights="weights.h5",
    weights_sha256="e67de524" * 8,
    dimensions=1280,
)
TIMINGS = {"list": 0.8, "features": 66.2, "pca": 4.0, "total": 72.0}


def run_of(rows: int = 20, k: int = 2, quarantined: int = 0, **changes: Any) -> Run:
    """Return the record of a run over so many images, with some fields changed."""
    listed = rows + quarantined
    run = Run(
        run_id="20261123T014700Z-ab12cd",
        started="2026-11-23T01:47:00Z",
        finished="2026-11-23T01:48:12Z",
        images="s3a://fruits/images",
        output="s3a://fruits/result",
        counts=Counts(listed, rows, quarantined, listed, 0, 0, 1),
        labels={},
        model=MODEL,
        pca=Fit(k, 0.9502, PCAOptions(None, 0.95), rows, "full", rows, "0123-abcd"),
        images_per_second=270.1,
        largest_pass=Speed(listed, 66.2, 2),
        timings=TIMINGS,
        made=Made("20261123T014700Z-ab12cd", TIMINGS, listed),
        versions={"fruits": "0.1.0", "spark": "4.3.0"},
        cluster=Cluster("spark://127.0.0.1:7077", "app-1", 2),
    )
    return replace(run, **changes)
