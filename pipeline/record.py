"""The record of a run, `run.json`: inputs, counts, parameters, versions, timings.

Report, slides and terminal show a run by it, and the next run goes on from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import StateError
from pipeline.networks.model import Model

# 3 had no drift, 2 no versions, 1 no number, no report-data/, `standardize` apart from the request.
FORMAT = 4


@dataclass(frozen=True)
class PCAOptions:
    """What to keep: `components`, or else the share `variance`; `standardize` comes first."""

    components: int | None = None
    variance: float | None = 0.95
    standardize: bool = False

    def __post_init__(self) -> None:
        if self.components is not None:
            object.__setattr__(self, "variance", None)


@dataclass(frozen=True)
class Counts:
    """Numbers of images: listed = features + quarantined.

    Attributes
    ----------
    dropped
        Gone since the run before.
    ignored
        Other objects beside the images.
    unsure
        Rows that an inventory would have changed, and is too young to.
    other_makers
        Rows that another version of the decoder or the runtime made.
    """

    listed: int
    features: int
    quarantined: int
    computed: int
    reused: int
    dropped: int
    ignored: int
    unsure: int = 0
    other_makers: int = 0


@dataclass(frozen=True)
class Fit:
    """The PCA of a result.

    Attributes
    ----------
    k
        Components that are kept.
    variance
        The share of the variance that they keep.
    rows
        Rows with features.
    fit
        `full`, `grown` (only new rows were read) or `unchanged`.
    rows_read
        Rows whose features were read for the fit.
    state
        Name of the feature table's state.
    table_version
        Delta's number of it: what is added later has a higher one.
    """

    k: int
    variance: float
    requested: PCAOptions
    rows: int
    fit: str
    rows_read: int
    state: str | None = None
    table_version: int | None = None


@dataclass(frozen=True)
class LabelDrift:
    """How far a label's added images are from its others (see Drift), and how many they are."""

    name: str
    rows: int
    distance: float
    by_chance: float


@dataclass(frozen=True)
class Drift:
    """How far the images that were added since the version before are from the rest.

    Attributes
    ----------
    added, compared
        Added images with features, and those of them whose label has others to compare with.
    new, new_labels
        How many labels are new, and the names of a few.
    is_unlike
        Whether they are unlike the rest; None where they are too few to tell.
    distance, by_chance
        In standard deviations of a label's scores, over all that are compared: beyond what chance
        does, and what chance alone does to so many.
    labels
        Those that are farthest.
    """

    added: int
    compared: int
    new: int = 0
    new_labels: tuple[str, ...] = ()
    is_unlike: bool | None = None
    distance: float = 0.0
    by_chance: float = 0.0
    labels: tuple[LabelDrift, ...] = ()


@dataclass(frozen=True)
class Speed:
    """How fast features were computed: so many images in so many seconds by so many tasks."""

    images: int
    seconds: float
    slots: int

    @property
    def images_per_second(self) -> float:
        """Of all tasks together."""
        return self.images / self.seconds


@dataclass(frozen=True)
class Made:
    """The run that made a result: a later one may have found nothing to do."""

    run_id: str
    timings: dict[str, float]
    computed: int


@dataclass(frozen=True)
class Cluster:
    """Where it ran: the master's address, the application's id, tasks at a time."""

    master: str
    application: str
    slots: int


@dataclass(frozen=True)
class Run:
    """A run's own account of itself.

    Attributes
    ----------
    started, finished
        In UTC, as ISO 8601 writes them.
    images, output
        Their addresses.
    left_out
        Other objects beside the images, by kind.
    labels
        Images with features by label; of the largest labels, where there are very many.
    images_per_second
        While features were computed; None where none were.
    largest_pass
        The pass over most images: the speed of a small one tells little.
    timings
        Seconds of each stage, and their `total`.
    drift
        What was added against the rest; None where nothing was added to a version before.
    version, folder, files
        Its number, where its files lie below `versions/`, and the bytes of each (versions.py).
    """

    run_id: str
    started: str
    finished: str
    images: str
    output: str
    counts: Counts
    labels: dict[str, int]
    model: Model
    pca: Fit
    images_per_second: float | None
    largest_pass: Speed | None
    timings: dict[str, float]
    made: Made | None
    versions: dict[str, str]
    cluster: Cluster
    drift: Drift | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    version: int = 0
    folder: str = ""
    files: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Write as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> Run:
        """Read what `to_bytes`, of this version or an older one, wrote.

        Parameters
        ----------
        source
            Where the content lies, for the message of an error.

        Raises
        ------
        StateError
            When it is damaged, or of a newer version.
        """
        try:
            told = json.loads(content)
            if told.get("format", 1) <= FORMAT:
                return _run_of(told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"{source} is damaged ({error!r}). Remove it and run again: the features are "
                "kept, and the result is made anew."
            ) from error
        raise StateError(
            f"expected a record of format {FORMAT} or less in {source}, found {told['format']}: a "
            "newer version of fruits wrote it. Use that one, or name another OUTPUT."
        )


def _run_of(told: dict[str, Any]) -> Run:
    fit, speed, made = told["pca"], told.get("largest_pass"), told.get("made")
    if told.setdefault("format", 1) == 1:
        fit["requested"]["standardize"] = fit.pop("standardize")
        fit.pop("digest", None)
        told.pop("last_pass", None)
        if speed:
            del speed["images_per_second"]
    drift = told.get("drift")
    if drift:
        labels = tuple(LabelDrift(**one) for one in drift["labels"])
        drift = Drift(**{**drift, "labels": labels, "new_labels": tuple(drift["new_labels"])})
    read = {
        "drift": drift,
        "counts": Counts(**told["counts"]),
        "model": Model(**told["model"]),
        "pca": Fit(**{**fit, "requested": PCAOptions(**fit["requested"])}),
        "largest_pass": Speed(**speed) if speed else None,
        "made": Made(**made) if made else None,
        "cluster": Cluster(**told["cluster"]),
    }
    return Run(**{**told, **read})
