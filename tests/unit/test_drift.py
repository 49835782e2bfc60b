"""What was added is told to be unlike the rest where it is, and only there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import drift
from pipeline.drift import ADDED, SPREADS, SUBSETS, Spreads, compare, others_of, words
from pipeline.record import Run
from tests.records import run_of

WIDTH = 20
LABELS = ["apple", "kiwi", None]


def scores(rows: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Return scores that are correlated, as those of one label are."""
    drawn = np.random.default_rng(seed).normal(size=(rows, WIDTH))
    return drawn @ np.triu(np.full((WIDTH, WIDTH), 0.3)) + shift


def spreads_of(rest: int, added: int, shift: float = 0.0, seed: int = 1) -> Spreads:
    spreads = Spreads(WIDTH)
    for number, label in enumerate(LABELS):
        for rows, is_added, moved in ((rest, False, 0.0), (added, True, shift)):
            values = scores(rows, seed * 10 + number + 5 * is_added, number + moved)
            spreads.add(pa.array([label] * rows, pa.string()), values, np.full(rows, is_added))
    return spreads


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_spreads_merge_into_those_of_all_rows(sizes: list[int], seed: int) -> None:
    drawn = np.random.default_rng(seed)
    merged, added = Spreads(3), []
    for size in sizes:
        part, rows = Spreads(3), drawn.normal(size=(size, 3))
        part.add(pa.array(["a"] * size, pa.string()), rows, np.ones(size, bool))
        table = part.to_table()
        assert table.schema == SPREADS
        merged.merge(table)
        added.append(rows)
    together = np.concatenate(added)
    count, mean, squares = merged.part("a", ADDED)
    assert count == len(together)
    if len(together):
        np.testing.assert_allclose(mean, together.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(squares, together.var(axis=0) * count, atol=1e-10)


def test_the_others_are_dealt_to_random_subsets_and_none_is_lost() -> None:
    spreads = spreads_of(600, 0)
    counts = [spreads.part("apple", part)[0] for part in range(SUBSETS)]
    assert sum(counts) == 600
    assert min(counts) > 20
    mean, deviation = others_of(spreads, ["apple"])["apple"]
    np.testing.assert_allclose(mean, scores(600, 10).mean(axis=0))
    np.testing.assert_allclose(deviation, scores(600, 10).std(axis=0, ddof=1))


def test_nothing_is_said_where_nothing_was_added() -> None:
    assert compare(spreads_of(100, 0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_more_of_the_same_is_like_the_rest(seed: int) -> None:
    found = compare(spreads_of(500, 100, seed=seed + 1))
    assert found is not None
    assert (found.added, found.compared, found.is_unlike) == (300, 300, False)
    assert words(found) == "300 images were added and are like the rest"


@pytest.mark.parametrize("shift", [0.4, -0.4, 3.0])
def test_what_moved_is_unlike_the_rest(shift: float) -> None:
    found = compare(spreads_of(500, 100, shift))
    assert found is not None
    assert found.is_unlike
    assert found.distance > found.by_chance
    assert {one.name for one in found.labels} == {"apple", "kiwi", ""}
    assert "They are unlike the rest, most of all " in words(found)
    assert "without a label" in words(found)


def test_one_label_that_moved_comes_first() -> None:
    spreads = spreads_of(500, 100)
    rows = scores(300, 99, 2.0)
    spreads.add(pa.array(["plum"] * 300), rows - 2, np.zeros(300, bool))
    spreads.add(pa.array(["plum"] * 300), rows, np.ones(300, bool))
    found = compare(spreads)
    assert found is not None
    assert found.is_unlike
    assert (found.labels[0].name, found.labels[0].rows) == ("plum", 300)


@pytest.mark.parametrize(
    ("labels", "others", "each"), [(500, 100, 2), (300, 150, 1), (100, 120, 5)]
)
@pytest.mark.parametrize("seed", range(3))
def test_many_small_labels_are_no_alarm(labels: int, others: int, each: int, seed: int) -> None:
    spreads, drawn = Spreads(WIDTH), np.random.default_rng(seed)
    for label in range(labels):
        rows = drawn.normal(size=(others + each, WIDTH))
        names = pa.array([str(label)] * len(rows))
        spreads.add(names, rows, np.arange(len(rows)) >= others)
    found = compare(spreads)
    assert found is not None
    assert (found.compared, found.is_unlike) == (labels * each, False)


def test_a_label_of_equal_images_says_nothing() -> None:
    spreads = spreads_of(500, 100)
    spreads.add(pa.array(["same"] * 200), np.ones((200, WIDTH)), np.zeros(200, bool))
    spreads.add(pa.array(["same"] * 5), np.ones((5, WIDTH)) + 1e-6, np.ones(5, bool))
    found = compare(spreads)
    assert found is not None
    assert found.is_unlike is False
    assert found.distance < 1


def test_new_labels_and_too_few_images_are_told_as_such() -> None:
    spreads = spreads_of(500, 10)
    spreads.add(pa.array(["fig"] * 50), scores(50, 7), np.ones(50, bool))
    found = compare(spreads)
    assert found is not None
    assert (found.added, found.compared, found.is_unlike) == (80, 30, None)
    assert found.new_labels == ("fig",)
    assert words(found) == (
        "80 images were added: too few to compare (200 of labels that had 100 before). "
        "1 label is new: fig"
    )


def test_scores_that_never_vary_are_no_error() -> None:
    spreads = Spreads(2)
    for is_added in (False, True):
        spreads.add(pa.array(["a"] * 300), np.ones((300, 2)), np.full(300, is_added))
    found = compare(spreads)
    assert found is not None
    assert found.is_unlike is False


def test_of_very_many_labels_the_largest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MOST_LABELS", 2)
    spreads = spreads_of(500, 100)
    for number in range(200):
        spreads.add(pa.array([f"own folder {number}"]), scores(1, number), np.ones(1, bool))
    assert len({label for label, _ in spreads.places}) <= 2 * 2 * (SUBSETS + 1)
    assert spreads.part("apple", ADDED)[0] == 100


def test_a_record_keeps_its_drift() -> None:
    run = replace(run_of(), drift=compare(spreads_of(500, 100, 1.0)))
    assert Run.from_bytes(run.to_bytes(), "run.json") == run
