"""The matrix and its small files, and how a result takes its place as a whole."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import StateError
from pipeline.matrix import (
    NEXT,
    RESULT,
    Project,
    explained_variance_csv,
    publish,
    to_csv,
)
from pipeline.pca import PCA, Moments
from pipeline.storage import Address, FolderStore, S3Settings
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

    project = Project(parts, broadcast, ["pc_1", "pc_2"])
    table = pa.Table.from_batches(list(project(iter(["one.parquet", "two.parquet"]))))

    assert table.column_names == ["path", "label", "pc_1", "pc_2"]
    assert table["path"].to_pylist() == paths[:30], "the one without features has no row"
    assert table["label"].to_pylist() == labels[:30]
    expected = pca.transform(ROWS.astype(np.float32))
    np.testing.assert_allclose(np.column_stack([table["pc_1"], table["pc_2"]]), expected)


# --- publishing ------------------------------------------------------------------------------

FILES = {
    "matrix.parquet": ["matrix.parquet/part-0.parquet", "matrix.parquet/_SUCCESS"],
    "model": ["model/pca.npz"],
}


def prepare(store: FolderStore, content: bytes) -> set[str]:
    """Write a result below `_next/` and return the keys that it must end at."""
    files = {file for name in RESULT for file in FILES.get(name, [name])}
    for file in files:
        store.write(f"{NEXT}/{file}", content)
    return {*files, "run.json"}


@pytest.fixture
def output(tmp_path: Path) -> FolderStore:
    return FolderStore(Address.parse(str(tmp_path / "out")))


def content_of(output: FolderStore) -> dict[str, bytes | None]:
    return {entry.key: output.read(entry.key) for entry in output.list()}


def test_a_prepared_result_takes_its_place(output: FolderStore) -> None:
    expected = prepare(output, b"first")
    publish(output, b"{}")
    assert content_of(output) == {**dict.fromkeys(expected, b"first"), "run.json": b"{}"}


def test_nothing_of_an_earlier_result_is_left_and_features_are_kept(output: FolderStore) -> None:
    prepare(output, b"first")
    output.write(f"{NEXT}/matrix.parquet/part-1.parquet", b"first")
    publish(output, b"1")
    output.write("features/m/model.json", b"kept")
    expected = prepare(output, b"second")
    publish(output, b"2")
    assert content_of(output) == {
        **dict.fromkeys(expected, b"second"),
        "run.json": b"2",
        "features/m/model.json": b"kept",
    }


def test_a_result_that_another_run_has_taken_away_costs_nothing(output: FolderStore) -> None:
    prepare(output, b"first")
    publish(output, b"1")
    before = content_of(output)
    prepare(output, b"second")
    output.delete(f"{NEXT}/model")
    with pytest.raises(StateError, match=r"expected model in .*_next, found it gone: another run"):
        publish(output, b"2")
    assert before.items() <= content_of(output).items()


def test_a_table_is_marked_complete_when_all_of_it_is_there(
    output: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(output, b"first")
    moved = []
    move = FolderStore.move
    monkeypatch.setattr(
        FolderStore,
        "move",
        lambda store, source, target: (moved.append(target), move(store, source, target)),
    )
    publish(output, b"1")
    table = [name for name in moved if name.startswith("matrix.parquet/")]
    assert table == ["matrix.parquet/part-0.parquet", "matrix.parquet/_SUCCESS"]


def test_a_reader_never_sees_a_run_beside_half_a_result(
    output: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(output, b"first")
    publish(output, b"1")
    moves = prepare(output, b"second") - {"run.json"}
    seen = []
    move = FolderStore.move

    def watched(store: FolderStore, source: str, target: str) -> None:
        seen.append(store.read("run.json"))
        move(store, source, target)

    monkeypatch.setattr(FolderStore, "move", watched)
    publish(output, b"2")
    assert seen == [None] * len(moves)
    assert output.read("run.json") == b"2"
