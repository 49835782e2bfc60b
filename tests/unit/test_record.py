"""`run.json` is read by the version that wrote it and by later ones, and told when it cannot be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import StateError
from pipeline.record import FORMAT, PCAOptions, Run
from pipeline.result.samples import Samples
from pipeline.storage import Address, FolderStore
from tests.records import run_of


def as_format_1(run: Run) -> dict[str, Any]:
    """Write a record as versions before 2 did, with what some of them told."""
    told = asdict(run)
    del told["format"], told["counts"]["other_makers"]
    told["pca"]["standardize"] = told["pca"]["requested"].pop("standardize")
    told["largest_pass"]["images_per_second"] = 1.0
    told["pca"]["digest"], told["last_pass"] = "0123", {"images": 20}
    return told


def read(told: dict[str, Any]) -> Run:
    return Run.from_bytes(json.dumps(told).encode(), "s3a://b/out/run.json")


@pytest.mark.parametrize("changes", [{}, {"largest_pass": None, "made": None}])
def test_a_record_is_read_as_it_was_written(changes: dict[str, Any]) -> None:
    run = run_of(labels={"Kiwi": 20}, **changes)
    assert Run.from_bytes(run.to_bytes(), "") == run


def test_a_record_of_the_first_versions_is_read() -> None:
    run = run_of()
    run = replace(run, pca=replace(run.pca, requested=PCAOptions(7, None, standardize=True)))
    assert read(as_format_1(run)) == replace(run, format=1)


def test_a_record_that_tells_less_of_its_speed_is_read() -> None:
    told = as_format_1(run_of())
    del told["largest_pass"], told["made"]
    assert (read(told).largest_pass, read(told).made) == (None, None)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"images": ', b"{}", b"\xff"])
def test_a_damaged_record_is_named_with_what_to_do(content: bytes) -> None:
    with pytest.raises(StateError, match=r"s3a://b/out/run\.json is damaged .* Remove it and run"):
        Run.from_bytes(content, "s3a://b/out/run.json")


def test_a_record_of_a_newer_version_is_not_taken_for_a_damaged_one() -> None:
    told = asdict(run_of()) | {"format": FORMAT + 1, "more": "than is known"}
    with pytest.raises(StateError, match=f"format {FORMAT} or less .*, found {FORMAT + 1}: a"):
        read(told)


def test_samples_are_read_as_they_were_written(tmp_path: Any) -> None:
    store = FolderStore(Address.parse(str(tmp_path)))
    with pytest.raises(
        StateError, match=r"report-data/scores.parquet beside run.json .* Run the job"
    ):
        Samples.read(store)
    scores = pa.table({"path": ["a.jpg"], "label": pa.array([None], pa.string()), "pc_1": [0.5]})
    samples = Samples(scores, {"": [b"one"], "Kiwi": [b"two", b"three"]})
    samples.write(store)
    assert Samples.read(store) == samples
