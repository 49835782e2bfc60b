"""The matrix and its small files."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.pca import PCA, Moments
from pipeline.result.matrix import Project, explained_variance_csv, to_csv
from pipeline.s3.access import S3Settings
from pipeline.storage import Address
from pipeline.table.parts import Parts

ROWS = np.random.default_rng(3).normal(size=(30, 5)) * [5, 4, 3, 2, 1]


@pytest.fixture(scope="module")
def pca() -> PCA:
    return PCA.fit(Moments.of(ROWS), components=2)


def read_csv(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def test_explained_variance_has_a_row_for_each_axis_and_says_which_are_kept(pca: PCA) -> None:
    rows = read_csv(explained_variance_csv(pca))
    assert [row["component"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [row["kept"] for row in rows] == ["True", "True", "False", "False", "False"]
    np.testing.assert_array_equal([float(row["variance"]) for row in rows], pca.variances)
    np.testing.assert_allclose([float(row["ratio"]) for row in rows], pca.variance_ratio)
    assert float(rows[1]["cumulative"]) == pytest.approx(pca.share)
    assert float(rows[-1]["cumulative"]) == pytest.approx(1)


def test_csv_keeps_every_number_and_character() -> None:
    values = [1 / 3, 1e-300, -0.0, 5]
    (row,) = read_csv(to_csv(["a", "b", "c", "d"], [values]))
    assert [float(value) for value in row.values()] == values
    assert to_csv(["é"], [["日本 é"]]) == "é\n日本 é\n".encode()


def test_the_projection_of_a_task_is_that_of_the_pca(pca: PCA, tmp_path: Path) -> None:
    paths, labels = [f"a/{n}.jpg" for n in range(31)], ["a"] * 29 + [None, "a"]
    features = pa.array([*ROWS.astype(np.float32).tolist(), None], pa.list_(pa.float32()))
    columns = [pa.array(paths), pa.array(labels, pa.string()), features]
    rows = pa.table(columns, ["path", "label", "features"])
    parts = Parts(Address.parse(str(tmp_path)), S3Settings())
    parts.write("one.parquet", rows.slice(0, 20))
    parts.write("two.parquet", rows.slice(20))
    broadcast: Any = SimpleNamespace(value=pca.to_bytes())

    project = Project(parts, broadcast, ["pc_1", "pc_2"], parts, None)
    table = pa.Table.from_batches(list(project(iter(["one.parquet", "two.parquet"]))))

    assert table.column_names == ["path", "label", "pc_1", "pc_2"]
    assert table["path"].to_pylist() == paths[:30], "the one without features has no row"
    assert table["label"].to_pylist() == labels[:30]
    expected = pca.transform(ROWS.astype(np.float32))
    np.testing.assert_allclose(np.column_stack([table["pc_1"], table["pc_2"]]), expected)
