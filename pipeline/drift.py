"""Whether images that were added are unlike the rest: a distance by label, from their scores.

While the matrix is written, count, mean and variance of the first scores are kept for each label:
of the rows that were added since the version before, and of twenty random subsets of the others.
The distance of the added from the others is compared with that of the subsets, which only chance
parts from the others: the labels each in a direction of its own, and all of them in one, as a lamp
or a lens moves them. Nothing is read for it, and nothing is said of causes.

A label's distance is the root mean square, over the scores, of the difference of both means in
standard deviations of the others (a Mahalanobis distance with a diagonal covariance; Mahalanobis,
"On the generalised distance in statistics", 1936). Of n rows drawn from the others its square is
1/n, so that squares times n of a label, and their sums over labels, can be compared whatever n is.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.record import Drift, LabelDrift

SCORES = 50  # the first components; later ones hold little but noise
SUBSETS = 20
FEWEST = 200  # rows; fewer tell nothing
FEWEST_OTHERS = 100  # rows of a label, for its variance, and for subsets that are not empty
# Calibrated on real photos by tests/benchmarks/drift.py; its figures are in pipeline/SCALING.md.
SIGNIFICANT = 4.5  # standard deviations of the subsets
CONSIDERABLE = 0.1  # standard deviations of a label's own scores
LEAST_VARIANCE = 0.01  # of that within all labels: a label of equal images says nothing
LABELS_TOLD = 10
MOST_LABELS = 1_000  # 17 kB each
ADDED = -1  # the part of the rows that were added; 0 .. SUBSETS-1 are the subsets of the others

Floats = npt.NDArray[np.float64]
SPREADS = pa.schema(
    [
        pa.field("label", pa.string(), nullable=False),
        pa.field("part", pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", pa.list_(pa.float64()), nullable=False),
        pa.field("squares", pa.list_(pa.float64()), nullable=False),
    ]
)


class Spreads:
    """Count, mean and sum of squared deviations of scores, by label and part.

    Merged as Chan, Golub and LeVeque do ("Updating formulae and a pairwise algorithm for computing
    sample variances", 1979).
    """

    def __init__(self, scores: int) -> None:
        self.scores = scores
        self.places: dict[tuple[str, int], int] = {}
        self.has_forgotten = False
        self.count = np.zeros(0)
        self.mean = np.zeros((0, scores))
        self.squares = np.zeros((0, scores))

    def add(self, labels: pa.Array, scores: Floats, is_added: npt.NDArray[np.bool_]) -> None:
        """Count rows in; which subset one of the others belongs to is drawn.

        Parameters
        ----------
        labels
            Strings, null where there is none.
        scores
            Array (rows, at least `self.scores`).
        is_added
            Array (rows,).
        """
        if not len(labels):
            return
        encoded = labels.fill_null("").dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        # Drawn by what is drawn for: the same rows give the same subsets, in any attempt.
        drawn = np.random.default_rng(zlib.crc32(scores[0].tobytes()))
        part = np.where(is_added, ADDED, drawn.integers(0, SUBSETS, len(codes)))
        groups, place = np.unique(codes * (SUBSETS + 1) + part + 1, return_inverse=True)
        order = np.argsort(place, kind="stable")
        count = np.bincount(place).astype(float)
        starts = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(np.intp)
        sorted_scores = scores[order, : self.scores]
        mean = np.add.reduceat(sorted_scores, starts) / count[:, None]
        deviations = sorted_scores - np.repeat(mean, count.astype(np.intp), axis=0)
        squares = np.add.reduceat(deviations**2, starts)
        names = encoded.dictionary.to_pylist()
        keys = [(names[g // (SUBSETS + 1)], int(g % (SUBSETS + 1)) - 1) for g in groups.tolist()]
        self._merge(keys, count, mean, squares)
        self._keep_largest()

    def merge(self, rows: pa.Table) -> None:
        """Count in what others have counted (SPREADS)."""
        for batch in rows.to_batches():
            if batch.num_rows:
                keys = list(zip(batch["label"].to_pylist(), batch["part"].to_pylist(), strict=True))
                count = batch["count"].to_numpy().astype(float)
                self._merge(keys, count, *(self._matrix(batch[n]) for n in ("mean", "squares")))
                self._keep_largest()

    def to_table(self) -> pa.Table:
        """Return a row for each label and part (SPREADS)."""
        columns = [
            pa.array([label for label, _ in self.places], pa.string()),
            pa.array([part for _, part in self.places], pa.int64()),
            pa.array(self.count.astype(np.int64)),
            pa.array(list(self.mean), pa.list_(pa.float64())),
            pa.array(list(self.squares), pa.list_(pa.float64())),
        ]
        return pa.table(columns, schema=SPREADS)

    def part(self, label: str, part: int) -> tuple[float, Floats, Floats]:
        """Return count, mean and squares; of nothing, zeros."""
        place = self.places.get((label, part))
        if place is None:
            return 0.0, np.zeros(self.scores), np.zeros(self.scores)
        return float(self.count[place]), self.mean[place], self.squares[place]

    def _keep_largest(self) -> None:
        """Forget small labels where there are very many: folders that hold one image each."""
        if len(self.places) <= 2 * MOST_LABELS * (SUBSETS + 1):
            return
        self.has_forgotten = True
        rows: Counter[str] = Counter()
        for (label, _), place in self.places.items():
            rows[label] += int(self.count[place])
        kept = {label for label, _ in rows.most_common(MOST_LABELS)}
        places = {key: place for key, place in self.places.items() if key[0] in kept}
        at = np.array(list(places.values()))
        self.places = {key: number for number, key in enumerate(places)}
        self.count, self.mean, self.squares = self.count[at], self.mean[at], self.squares[at]

    def _merge(
        self, keys: list[tuple[str, int]], count: Floats, mean: Floats, squares: Floats
    ) -> None:
        new = [key for key in dict.fromkeys(keys) if key not in self.places]
        for key in new:
            self.places[key] = len(self.places)
        more = np.zeros((len(new), self.scores))
        self.count = np.concatenate([self.count, np.zeros(len(new))])
        self.mean = np.concatenate([self.mean, more])
        self.squares = np.concatenate([self.squares, more])
        at = np.array([self.places[key] for key in keys])
        before = self.count[at]
        total = before + count
        apart = mean - self.mean[at]
        self.squares[at] += squares + apart**2 * (before * count / total)[:, None]
        self.mean[at] += apart * (count / total)[:, None]
        self.count[at] = total

    def _matrix(self, lists: pa.Array) -> Floats:
        flat: Floats = lists.flatten().to_numpy().reshape(-1, self.scores)
        return flat


def compare(spreads: Spreads) -> Drift | None:
    """Tell how far what was added is from the rest; None where nothing was added."""
    labels = sorted({label for label, part in spreads.places if part == ADDED})
    added = sum(int(spreads.part(label, ADDED)[0]) for label in labels)
    if not added:
        return None
    others = {
        label: _together([spreads.part(label, p) for p in range(SUBSETS)]) for label in labels
    }
    # What was forgotten of very many labels is not known to be new.
    new = [] if spreads.has_forgotten else [one for one in labels if not others[one][0]]
    known = [label for label in labels if others[label][0] >= FEWEST_OTHERS]
    least = LEAST_VARIANCE * _pooled([others[label] for label in known], spreads.scores)
    found = [_Label.of(spreads, label, others[label], least) for label in known]
    compared = sum(one.rows for one in found)
    told = Drift(added, compared, len(new), tuple(new[:LABELS_TOLD]))
    if compared < FEWEST:
        return told
    distance = _root(sum(one.rows * one.beyond for one in found) / compared)
    chance = _root(sum(one.rows * one.by_chance**2 for one in found) / compared)
    each, together = _each(found), _together_of(found)
    is_significant = max(each, together) >= SIGNIFICANT
    most = sorted(found, key=lambda one: one.distance, reverse=True)
    return Drift(
        *(told.added, told.compared, told.new, told.new_labels),
        is_unlike=bool(is_significant and distance >= CONSIDERABLE),
        distance=distance,
        by_chance=chance,
        labels=tuple(
            LabelDrift(one.name, one.rows, one.distance, one.by_chance)
            for one in most[:LABELS_TOLD]
        ),
    )


def words(drift: Drift, things: str = "images") -> str:
    """Say it: labels and distances, never causes."""
    told = f"{drift.added:,} {things} were added"
    if drift.is_unlike is None:
        told += f": too few to compare ({FEWEST} of labels that had {FEWEST_OTHERS} before)"
    elif drift.is_unlike:
        most = ", ".join(f"{one.name or 'without a label'}" for one in drift.labels[:3])
        told += (
            f". They are unlike the rest, most of all {most}: {drift.distance:.2f} standard "
            f"deviations away on average, where chance alone gives {drift.by_chance:.2f}"
        )
    else:
        told += " and are like the rest"
    if drift.new:
        names = ", ".join(drift.new_labels[:3]) + (", ..." if drift.new > 3 else "")
        told += f". {drift.new:,} {'label is' if drift.new == 1 else 'labels are'} new: {names}"
    return told


def others_of(spreads: Spreads, names: Iterable[str]) -> dict[str, tuple[Floats, Floats]]:
    """Return mean and standard deviation of the others' scores for each of some labels."""
    found = {}
    for name in names:
        count, mean, squares = _together([spreads.part(name, part) for part in range(SUBSETS)])
        if count > 1:
            found[name] = mean, np.sqrt(np.maximum(squares / (count - 1), 1e-12))
    return found


class _Label:
    """A label's added rows, and subsets of its others, against its others.

    Attributes
    ----------
    apart
        Differences of the means in standard deviations: of the added rows first, then of each
        subset (1 + SUBSETS, scores).
    at
        For how many rows each of these stands, as a difference of two means has them.
    """

    def __init__(self, name: str, rows: int, apart: Floats, at: Floats) -> None:
        self.name = name
        self.rows = rows
        self.apart = apart
        self.at = at
        self.squares = np.mean(apart**2, axis=1) * at
        expected = float(self.squares[1:][at[1:] > 0].mean())
        self.beyond = (float(self.squares[0]) - expected) / float(at[0])  # below 0 by chance
        self.by_chance = _root(expected / at[0])
        self.distance = _root(self.beyond)

    @classmethod
    def of(
        cls, spreads: Spreads, label: str, of_others: tuple[float, Floats, Floats], least: Floats
    ) -> _Label:
        """Measure a label; no variance counts as less than the `least`."""
        parts = [spreads.part(label, part) for part in range(SUBSETS)]
        others, mean, squares = of_others
        variance = np.maximum(squares / (others - 1), least)
        rows, added_mean, _ = spreads.part(label, ADDED)
        # A subset is compared with the others without it.
        left = np.array([others, *(max(others - n, 1) for n, _, _ in parts)])
        count = np.array([rows, *(n for n, _, _ in parts)])
        apart = np.array([added_mean, *(of for _, of, _ in parts)]) - mean
        apart[1:] *= (others / left[1:])[:, None]
        # The variance is that of the subsets' own rows, too, and not of those that were added: a
        # square over an estimate from n others is (n - 1) / (n - 3) on average.
        apart[0] *= np.sqrt((others - 3) / (others - 1))
        at = count * left / (count + left)
        scaled = np.divide(apart, np.sqrt(variance), out=np.zeros_like(apart), where=variance > 0)
        return cls(label, int(rows), np.where(at[:, None] > 0, scaled, 0.0), at)


def _each(found: list[_Label]) -> float:
    """Return how far the labels, each in a direction of its own, are beyond the subsets."""
    of_all = np.array([one.squares for one in found])
    is_empty = np.array([one.at for one in found]) <= 0
    expected = np.array([one.by_chance**2 * one.at[0] for one in found])
    return _beyond(np.where(is_empty, expected[:, None], of_all).sum(axis=0))


def _together_of(found: list[_Label]) -> float:
    """Return how far all labels are, in one direction, as a lens or a lamp moves them."""
    at = np.array([one.at for one in found])
    apart = np.einsum("ls,lsm->sm", at, [one.apart for one in found])
    total = np.maximum(at.sum(axis=0), 1e-30)
    return _beyond(np.mean(apart**2, axis=1) / total)


def _beyond(squares: Floats) -> float:
    """Return by how many standard deviations of the subsets the first distance exceeds theirs.

    Roots, not squares: where few directions matter, squares have a long tail of their own.
    """
    distances = np.sqrt(squares)
    by_chance = distances[1:]
    return float((distances[0] - by_chance.mean()) / max(by_chance.std(ddof=1), 1e-30))


def _together(parts: Iterable[tuple[float, Floats, Floats]]) -> tuple[float, Floats, Floats]:
    counts, means, squares = (np.array(column) for column in zip(*parts, strict=True))
    total = counts.sum()
    mean = counts @ means / max(total, 1)
    return float(total), mean, squares.sum(axis=0) + counts @ (means - mean) ** 2


def _pooled(others: Sequence[tuple[float, Floats, Floats]], scores: int) -> Floats:
    """Return the variance within labels, of all of them together."""
    squares = sum((squares for _, _, squares in others), np.zeros(scores))
    pooled: Floats = squares / max(sum(count - 1 for count, _, _ in others), 1)
    return pooled


def _root(square: float) -> float:
    return float(np.sqrt(max(square, 0.0)))
