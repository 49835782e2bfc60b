"""Whose an OUTPUT is, and how a result takes its place there as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import OutputTakenError, StateError
from pipeline.networks.model import Model
from pipeline.output import NEXT, RESULT, check_output, check_run, publish
from pipeline.storage import Address, FolderStore
from tests.records import run_of

IMAGES = Address("fruits", "images")
MODEL = Model("net-32-abc", "net", 32, 3, "as it is", "weights.h5", "0" * 64)


@pytest.fixture
def output(tmp_path: Path) -> FolderStore:
    """Features of two models, and no run."""
    store = FolderStore(Address.parse(str(tmp_path)))
    for name in (MODEL.id, "other-32-def"):
        store.write(f"features/{name}/model.json", b"{}")
    return store


def hold(output: FolderStore, images: str, model: str) -> None:
    run = run_of(images=images, model=replace(MODEL, id=model))
    output.write("run.json", run.to_bytes())


def test_either_model_may_be_fitted_while_a_run_wants_an_output_of_its_own(
    output: FolderStore,
) -> None:
    assert check_run(IMAGES, MODEL, output) is None
    with pytest.raises(OutputTakenError, match="features of the model other-32-def, not of"):
        check_output(IMAGES, MODEL, output)
    assert check_output(IMAGES, MODEL, output, force=True) is None


@pytest.mark.parametrize("check", [check_run, check_output])
def test_the_run_that_is_there_is_gone_on_with_or_refused(
    output: FolderStore, check: Callable[..., Any]
) -> None:
    hold(output, str(IMAGES), MODEL.id)
    assert check(IMAGES, MODEL, output).images == str(IMAGES)
    for images, model in (("s3a://fruits/other", MODEL.id), (str(IMAGES), "other-32-def")):
        hold(output, images, model)
        with pytest.raises(OutputTakenError, match=r", not of .* --force"):
            check(IMAGES, MODEL, output)
        assert check(IMAGES, MODEL, output, force=True) is None


# --- publishing ------------------------------------------------------------------------------

FIRST, SECOND = run_of(run_id="first"), run_of(run_id="second")
FILES = {
    "matrix.parquet": ["matrix.parquet/part-0.parquet", "matrix.parquet/_SUCCESS"],
    "model": ["model/pca.npz"],
    "report-data": ["report-data/scores.parquet", "report-data/pictures.parquet"],
}


def prepare(store: FolderStore, content: bytes) -> set[str]:
    """Write a result below `_next/` and return the keys that it must end at."""
    files = {file for name in RESULT for file in FILES.get(name, [name])}
    for file in files:
        store.write(f"{NEXT}/{file}", content)
    return {*files, "run.json"}


@pytest.fixture
def free(tmp_path: Path) -> FolderStore:
    """Nothing yet."""
    return FolderStore(Address.parse(str(tmp_path / "out")))


def content_of(free: FolderStore) -> dict[str, bytes | None]:
    return {entry.key: free.read(entry.key) for entry in free.list()}


def test_a_prepared_result_takes_its_place(free: FolderStore) -> None:
    expected = prepare(free, b"first")
    publish(free, FIRST)
    assert content_of(free) == {**dict.fromkeys(expected, b"first"), "run.json": FIRST.to_bytes()}


def test_nothing_of_an_earlier_result_is_left_and_features_are_kept(free: FolderStore) -> None:
    prepare(free, b"first")
    free.write(f"{NEXT}/matrix.parquet/part-1.parquet", b"first")
    publish(free, FIRST)
    free.write("features/m/model.json", b"kept")
    expected = prepare(free, b"second")
    publish(free, SECOND)
    assert content_of(free) == {
        **dict.fromkeys(expected, b"second"),
        "run.json": SECOND.to_bytes(),
        "features/m/model.json": b"kept",
    }


def test_a_result_that_another_run_has_taken_away_costs_nothing(free: FolderStore) -> None:
    prepare(free, b"first")
    publish(free, FIRST)
    before = content_of(free)
    prepare(free, b"second")
    free.delete(f"{NEXT}/model")
    with pytest.raises(StateError, match=r"expected model in .*_next, found it gone: another run"):
        publish(free, SECOND)
    assert before.items() <= content_of(free).items()


def test_a_table_is_marked_complete_when_all_of_it_is_there(
    free: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(free, b"first")
    moved = []
    move = FolderStore.move
    monkeypatch.setattr(
        FolderStore,
        "move",
        lambda store, source, target: (moved.append(target), move(store, source, target)),
    )
    publish(free, FIRST)
    table = [name for name in moved if name.startswith("matrix.parquet/")]
    assert table == ["matrix.parquet/part-0.parquet", "matrix.parquet/_SUCCESS"]


def test_a_reader_never_sees_a_run_beside_half_a_result(
    free: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(free, b"first")
    publish(free, FIRST)
    moves = prepare(free, b"second") - {"run.json"}
    seen = []
    move = FolderStore.move

    def watched(store: FolderStore, source: str, target: str) -> None:
        seen.append(store.read("run.json"))
        move(store, source, target)

    monkeypatch.setattr(FolderStore, "move", watched)
    publish(free, SECOND)
    assert seen == [None] * len(moves)
    assert free.read("run.json") == SECOND.to_bytes()
