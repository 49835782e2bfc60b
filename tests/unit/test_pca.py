"""The PCA equals scikit-learn's, however its rows were cut into parts, and survives its files."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA as ReferencePCA
from sklearn.preprocessing import StandardScaler

from pipeline.errors import PCAError, StateError
from pipeline.pca import (
    PCA,
    Moments,
    Running,
    Tally,
    _merged,
    _states,
    feature_matrix,
    merge_all,
)

RANDOM = np.random.default_rng(20)
D = 6
SPREAD = np.array([9.0, 5.0, 3.0, 2.0, 1.0, 0.5])


def normal(n: int, scale: np.ndarray | float = SPREAD, offset: float = 0.0) -> np.ndarray:
    """Return n rows whose axes differ in spread, turned at random."""
    turn = np.linalg.qr(RANDOM.normal(size=(D, D)))[0]
    return RANDOM.normal(size=(n, D)) * scale @ turn + offset


TALL = normal(200)
DATA = {
    "more rows than features": TALL,
    "fewer rows than features": normal(4),
    "two rows": normal(2),
    "far from zero": normal(100, offset=1e6),
    "tiny": TALL * 1e-9,
    "huge": TALL * 1e9,
    "rank two": RANDOM.normal(size=(50, 2)) @ RANDOM.normal(size=(2, D)),
    "a feature twice": np.hstack([TALL, TALL[:, :1]]),
    "a constant feature": np.hstack([TALL, np.full((200, 1), 0.1)]),
    "every row twice": np.vstack([TALL, TALL]),
    "single precision": TALL.astype(np.float32),
}
ANY_DATA = pytest.mark.parametrize("rows", DATA.values(), ids=DATA)


def assert_same_moments(found: Moments, expected: Moments, tolerance: float = 1e-9) -> None:
    assert found.n == expected.n
    np.testing.assert_allclose(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    slack = tolerance * np.trace(expected.scatter)
    np.testing.assert_allclose(found.scatter, expected.scatter, rtol=0, atol=slack)


def exact_moments(rows: np.ndarray) -> Moments:
    """Return the moments by fractions, without any rounding before the end."""
    exact = [[Fraction(float(value)) for value in row] for row in rows]
    means = [sum(column) / len(exact) for column in zip(*exact, strict=True)]
    centred = [[value - m for value, m in zip(row, means, strict=True)] for row in exact]
    scatter = [
        [float(sum(row[i] * row[j] for row in centred)) for j in range(len(means))]
        for i in range(len(means))
    ]
    return Moments(len(rows), np.array([float(m) for m in means]), np.array(scatter))


# --- moments ---------------------------------------------------------------------------------


@st.composite
def rows_in_parts(draw: st.DrawFn) -> list[np.ndarray]:
    """Draw parts of 0, 1 or more rows of two features, at least one row in all."""
    number = st.integers(-1600, 1600).map(lambda sixteenths: sixteenths / 16)
    part = st.lists(st.tuples(number, number), max_size=5)
    parts = draw(st.lists(part, min_size=1, max_size=7).filter(any))
    return [np.array(rows).reshape(-1, 2) for rows in parts]


@given(rows_in_parts(), st.data())
def test_parts_merge_into_the_whole_in_any_order_and_grouping(
    parts: list[np.ndarray], data: st.DataObject
) -> None:
    moments = [Moments.of(part) for part in data.draw(st.permutations(parts))]
    while len(moments) > 1:
        left = moments.pop(data.draw(st.integers(0, len(moments) - 1)))
        right = moments.pop(data.draw(st.integers(0, len(moments) - 1)))
        moments.append(left.merge(right))
    assert_same_moments(moments[0], exact_moments(np.vstack(parts)))


def test_empty_parts_change_nothing() -> None:
    some = Moments.of(TALL)
    empty = Moments.of(np.empty((0, D), np.float32))
    assert empty.n == 0
    assert merge_all([empty, some, Moments.empty(D)], D) is some
    assert merge_all([], D).n == 0


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_a_large_offset_costs_no_accuracy(offset: float) -> None:
    rows = normal(64, offset=offset)
    merged = merge_all((Moments.of(part) for part in np.array_split(rows, 9)), D)
    assert_same_moments(merged, exact_moments(rows))
    assert_same_moments(Moments.of(rows), exact_moments(rows))


def test_moments_of_equal_rows_have_no_scatter_at_all() -> None:
    same = merge_all((Moments.of(np.full((n, D), 0.1)) for n in (10, 1, 100)), D)
    assert same.n == 111
    assert not same.scatter.any()


def test_moments_survive_their_bytes() -> None:
    moments = Moments.of(TALL)
    again = Moments.from_bytes(moments.to_bytes())
    assert again.n == moments.n
    np.testing.assert_array_equal(again.mean, moments.mean)
    np.testing.assert_array_equal(again.scatter, moments.scatter)
    assert Moments.from_bytes(Moments.empty(D).to_bytes()).n == 0


def batch_of(rows: np.ndarray) -> pa.RecordBatch:
    column = pa.array(rows.astype(np.float32).tolist(), pa.list_(pa.float32()))
    return pa.RecordBatch.from_arrays([column], ["features"])


def test_a_slice_of_an_arrow_column_is_seen_as_its_own_rows() -> None:
    lists = batch_of(TALL).column("features")
    packed = pa.array([row.astype("<f4").tobytes() for row in TALL], pa.binary())
    as_bytes = feature_matrix(packed.slice(7, 11), D)
    np.testing.assert_array_equal(as_bytes, TALL[7:18].astype(np.float32))
    assert feature_matrix(packed.slice(0, 0), D).shape == (0, D)
    column = lists.slice(7, 11)
    matrix = feature_matrix(column, D)
    np.testing.assert_array_equal(matrix, TALL[7:18].astype(np.float32))


def test_what_the_tasks_of_a_cluster_make_and_merge_is_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.pca.ROWS_PER_BLOCK", 16)
    partitions = [TALL[:90], TALL[90:90], TALL[90:]]
    tasks = [
        _states(D)(iter([batch_of(half) for half in np.array_split(rows, 2)]))
        for rows in partitions
    ]
    no_batch_at_all = _states(D)(iter([]))
    (merged,) = _merged(D)(state for task in (*tasks, no_batch_at_all) for state in task)
    (found,) = merged.column("state").to_pylist()
    assert_same_moments(Moments.from_bytes(found), Moments.of(TALL.astype(np.float32)))


# --- the fit ---------------------------------------------------------------------------------


def reference(rows: np.ndarray) -> ReferencePCA:
    return ReferencePCA(svd_solver="full").fit(rows.astype(np.float64))


def rank_of(rows: np.ndarray) -> int:
    wide = rows.astype(np.float64)
    return int(np.linalg.matrix_rank(wide - wide.mean(axis=0), tol=1e-9 * np.ptp(wide)))


def assert_same_projection(ours: PCA, rows: np.ndarray, expected: np.ndarray) -> None:
    """Compare scores up to the sign of each component."""
    scores = ours.transform(rows)
    signs = np.sign((scores * expected[:, : ours.k]).sum(axis=0))
    np.testing.assert_allclose(scores * signs, expected[:, : ours.k], atol=1e-6 * expected.std())


@ANY_DATA
def test_variances_and_scores_equal_scikit_learns(rows: np.ndarray) -> None:
    theirs = reference(rows)
    rank = rank_of(rows)
    ours = PCA.fit(Moments.of(rows), components=rank)
    np.testing.assert_allclose(ours.variances, theirs.explained_variance_[:rank], rtol=1e-6)
    np.testing.assert_allclose(
        ours.variance_ratio, theirs.explained_variance_ratio_[:rank], rtol=1e-6
    )
    assert ours.share == pytest.approx(1, abs=1e-9)
    assert_same_projection(ours, rows, theirs.transform(rows.astype(np.float64)))


@ANY_DATA
def test_standardized_it_equals_scikit_learns_on_features_of_unit_variance(
    rows: np.ndarray,
) -> None:
    wide = rows.astype(np.float64)
    deviation = wide.std(axis=0, ddof=1)
    scaled = (wide - wide.mean(axis=0)) / np.where(deviation > 1e-12, deviation, 1)
    theirs = reference(scaled)
    ours = PCA.fit(Moments.of(rows), variance=1.0, standardize=True)
    assert ours.k == rank_of(scaled)
    np.testing.assert_allclose(ours.variances, theirs.explained_variance_[: ours.k], rtol=1e-6)
    assert_same_projection(ours, rows, theirs.transform(scaled))


@ANY_DATA
def test_a_share_of_one_keeps_the_whole_rank(rows: np.ndarray) -> None:
    assert PCA.fit(Moments.of(rows), variance=1.0).k == rank_of(rows)


@given(share=st.floats(0, 1, exclude_min=True))
def test_a_share_is_kept_by_as_few_components_as_do(share: float) -> None:
    pca = PCA.fit(Moments.of(TALL), variance=share)
    kept = np.cumsum(pca.variance_ratio)
    assert kept[pca.k - 1] >= share - 1e-9
    assert pca.k == 1 or kept[pca.k - 2] < share


def test_a_number_of_components_is_taken_as_it_is() -> None:
    moments = Moments.of(TALL)
    whole = PCA.fit(moments, components=D)
    for k in range(1, D + 1):
        pca = PCA.fit(moments, components=k)
        assert (pca.k, pca.components.shape, pca.transform(TALL).shape) == (k, (k, D), (200, k))
        np.testing.assert_array_equal(pca.components, whole.components[:k])
        assert pca.share == pytest.approx(whole.variance_ratio[:k].sum())


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        (TALL, {"components": 0}, r"expected 1 to 6 components .* found 0"),
        (TALL, {"components": -1}, r"expected 1 to 6 components .* found -1"),
        (TALL, {"components": 7}, r"expected 1 to 6 components .* found 7"),
        (DATA["rank two"], {"components": 3}, r"expected 1 to 2 components"),
        (DATA["fewer rows than features"], {"components": 4}, r"expected 1 to 3 components"),
        (TALL, {"variance": 0.0}, r"above 0 and up to 1, found 0\.0"),
        (TALL, {"variance": -0.5}, r"found -0\.5"),
        (TALL, {"variance": 1.01}, r"found 1\.01"),
        (TALL, {"variance": float("nan")}, r"found nan"),
        (TALL, {}, r"one of them"),
        (TALL, {"components": 2, "variance": 0.9}, r"one of them"),
        (TALL[:1], {"variance": 0.9}, r"at least 2 images with features, found 1"),
        (TALL[:0], {"variance": 0.9}, r"at least 2 images with features, found 0"),
        (np.full((9, D), 0.1), {"variance": 0.9}, r"all features are the same"),
        (np.zeros((9, D)), {"components": 1}, r"all features are the same"),
    ],
)
def test_what_the_data_cannot_give_is_refused_in_words(
    rows: np.ndarray, options: dict[str, float], complaint: str
) -> None:
    with pytest.raises(PCAError, match=complaint):
        PCA.fit(Moments.of(rows), **options)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_signs_follow_from_the_data_alone(standardize: bool) -> None:
    fit = functools.partial(PCA.fit, components=D, standardize=standardize)
    whole = fit(Moments.of(TALL))
    largest = np.take_along_axis(
        whole.components, np.abs(whole.components).argmax(axis=1)[:, None], axis=1
    )
    assert (largest > 0).all()
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(TALL)
        parts = (Moments.of(part) for part in np.array_split(shuffled, 3 + seed))
        again = fit(merge_all(parts, D))
        np.testing.assert_allclose(again.components, whole.components, atol=1e-9)


def test_the_components_are_orthonormal() -> None:
    components = PCA.fit(Moments.of(TALL), components=D).components
    np.testing.assert_allclose(components @ components.T, np.eye(D), atol=1e-12)


# --- files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pca() -> PCA:
    return PCA.fit(Moments.of(TALL), components=3, standardize=True)


def test_a_pca_survives_its_bytes(pca: PCA) -> None:
    again = PCA.from_bytes(pca.to_bytes())
    for name in ("components", "mean", "scale", "variances"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pca, name))
    assert again.total_variance == pca.total_variance
    np.testing.assert_array_equal(again.transform(TALL), pca.transform(TALL))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"a text", Moments.of(TALL).to_bytes()])
def test_a_foreign_file_is_no_pca(content: bytes) -> None:
    with pytest.raises(StateError, match="the saved PCA is damaged"):
        PCA.from_bytes(content)


@given(st.data())
def test_a_pca_cut_short_is_damaged(pca: PCA, data: st.DataObject) -> None:
    content = pca.to_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(StateError, match="the saved PCA is damaged"):
        PCA.from_bytes(content[:length])


# --- rows that come and go -------------------------------------------------------------------


def scatter_tolerance(moments: Moments) -> float:
    return 1e-9 * max(float(np.abs(moments.scatter).max()), 1e-300)


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 40), st.booleans()), max_size=12))
def test_after_any_changes_the_moments_are_those_of_the_rows_that_are_left(
    changes: list[tuple[int, int, bool]],
) -> None:
    """A change takes the rows of a window in, or those of it that are there out again."""
    live: set[int] = set(range(0, 200, 2))
    running = Running.counted(Moments.of(TALL[sorted(live)]))
    for first, length, comes in changes:
        window = set(range(first, min(first + length, 200)))
        added, removed = (window - live, set()) if comes else (set(), window & live)
        if not added and len(live) - len(removed) < 2:
            continue
        running = running.change(*(Moments.of(TALL[sorted(rows)]) for rows in (added, removed)))
        live = (live | added) - removed
        if not running.is_exact:
            running = Running.counted(Moments.of(TALL[sorted(live)]))
    rows = TALL[sorted(live)]
    expected = Moments.of(rows)
    assert running.moments.n == len(rows)
    tolerance = scatter_tolerance(expected)
    np.testing.assert_allclose(running.moments.scatter, expected.scatter, rtol=0, atol=tolerance)
    np.testing.assert_allclose(running.moments.mean, expected.mean, rtol=1e-9, atol=1e-9)
    found = PCA.fit(running.moments, components=2, largest=running.largest)
    values = ReferencePCA(svd_solver="full").fit(rows).explained_variance_
    np.testing.assert_allclose(
        found.variances[:2], values[:2], rtol=0, atol=tolerance / (len(rows) - 1) + 1e-9 * values[0]
    )


def test_what_is_left_of_much_more_is_counted_anew() -> None:
    large = Moments.of(TALL * 1e6)
    running = Running.counted(Moments.of(TALL)).change(large, Moments.empty(D))
    assert running.is_exact
    assert not running.change(Moments.empty(D), large).is_exact


def test_after_many_changes_the_rows_are_counted_anew() -> None:
    running = replace(Running.counted(Moments.of(TALL)), changes=10_000)
    assert running.is_exact
    assert not running.change(Moments.of(TALL[:1]), Moments.empty(D)).is_exact


def test_running_moments_survive_their_arrays() -> None:
    running = Running.counted(Moments.of(TALL)).change(Moments.of(TALL[:9]), Moments.of(TALL[:3]))
    content = io.BytesIO()
    np.savez(content, **running.to_arrays())
    with np.load(io.BytesIO(content.getvalue())) as arrays:
        again = Running.from_arrays(arrays)
    assert_same_moments(again.moments, running.moments, tolerance=1e-12)
    assert (again.subtracted, again.changes) == (running.subtracted, running.changes)
    np.testing.assert_array_equal(again.largest, running.largest)


@pytest.mark.parametrize("sizes", [[3], [3, 2], [D, 1], [200], [30, 0, 2100, 5]])
def test_a_tally_packs_the_moments_of_all_its_rows(sizes: list[int]) -> None:
    rows = np.resize(TALL, (sum(sizes), D)).astype(np.float32)
    tally, other = Tally(D), Tally(D)
    first = 0
    for size in sizes:
        tally.add(rows[first : first + size])
        first += size
    other.merge(tally.to_bytes())
    expected = Moments.of(rows)
    for found in (Moments.from_bytes(tally.to_bytes()), other.result()):
        assert_same_moments(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("wiggle", [0.0, 1e-12, 1e-9, 1e-3])
def test_features_that_hardly_vary_are_standardized_as_scikit_learn_does(wiggle: float) -> None:
    rows = TALL.copy()
    rows[:, 0] = 1000 + wiggle * np.sin(np.arange(len(rows)))
    scaler = StandardScaler().fit(rows)
    is_constant = scaler.scale_[0] == 1.0
    found = PCA.fit(Moments.of(rows), components=2, standardize=True)
    assert (found.scale[0] == 1.0) == is_constant, (found.scale[0], scaler.scale_[0])
    expected = ReferencePCA(2).fit(scaler.transform(rows)).explained_variance_ratio_
    np.testing.assert_allclose(found.variance_ratio[:2], expected, rtol=1e-6)
