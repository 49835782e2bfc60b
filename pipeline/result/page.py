"""Show a run on one page, because a result that can be seen is a result that gets checked.

The page is a single HTML file that asks nothing of the network: plots are inline SVG, pictures are
data URIs, and a content security policy forbids everything else. Equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from markupsafe import Markup
from matplotlib import rc_context, style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.drift import words
from pipeline.listing.names import told_of
from pipeline.quarantine import word_of
from pipeline.record import Run
from pipeline.result.samples import Samples

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

MAX_POINTS = 20_000
MAX_QUARANTINE_ROWS = 200
MAX_QUARANTINE_GROUPS = 12
THUMBNAIL_BUDGET = 2_000_000  # bytes of JPEG on the page, before base64 adds a third
MAP_POINTS, VARIETY_POINTS = 1_500, 150  # dots of a small map: all varieties, the one it is about
LEFT, RIGHT, FOOT, HEAD = 0.4, 0.1, 0.5, 0.25  # margins of the point cloud in inches
ASPECT = 0.75  # its height, for a width of 1
NARROW, NO_BREAK = "\u202f", "\u00a0"  # the space between thousands, the space before a unit

# Eight hues of Okabe and Ito, darkened until they stand out from white, and seven outlines. Eight
# and seven share no divisor, so walking both lists at once gives 56 marks before one comes again.
COLOURS = ["#0067ad", "#d45500", "#008f69", "#c25f9b", "#d18a00", "#3798d1", "#8f8400", "#596069"]
# Corners, outer radius, inner radius (the same for a plain polygon) and turn in degrees. The radii
# make all outlines look equally large.
OUTLINES = (
    (24, 1.0, 1.0, 0),
    (4, 1.25, 1.25, 45),
    (3, 1.35, 1.35, 90),
    (4, 1.25, 1.25, 0),
    (4, 1.6, 0.6, 0),
    (3, 1.35, 1.35, -90),
    (5, 1.5, 0.65, 90),
)

# What the plots are drawn with, and the name that lets the page change it for a dark screen.
INK, SOFT, LINE, ACCENT, REST = "#23282f", "#626b76", "#e3e0d8", "#25785a", "#b9bdb9"
THEME = {INK: "ink", SOFT: "soft", LINE: "line", ACCENT: "accent", REST: "rest"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the font of the page and can be searched
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
}


def render_report(run: Run, samples: Samples, variance_ratio: Floats, quarantine: pa.Table) -> str:
    """Render the page of one run.

    Parameters
    ----------
    run : Run
        The record of the run.
    samples : Samples
        Scores of images, and pictures. Beyond ``MAX_POINTS`` scores a seeded sample is drawn; the
        page says so.
    variance_ratio : ndarray of shape (components,)
        Share of the variance of every component, kept or not, largest first.
    quarantine : pyarrow.Table
        One row per image that has no features, or the first of them: ``path``, ``stage``,
        ``reason``.

    Returns
    -------
    str
        A complete HTML document. It is a pure function of the arguments.
    """
    plane = _plane(samples.scores, run.labels)
    with style.context(["default", STYLE]):  # not what the notebook around us has set
        scree = _svg(_scree(variance_ratio, run.pca.k), "scree")
        cloud = _svg(_cloud(plane, variance_ratio), "cloud")
    return _page().render(
        run=run,
        told=asdict(run),
        plane=plane,
        scree=scree,
        cloud=cloud,
        everything=_dots(plane, np.arange(len(plane.x)), MAP_POINTS),
        varieties=_varieties(plane, samples.pictures),
        marks=len(COLOURS) * len(OUTLINES),
        milestones=_milestones(variance_ratio),
        left_out=told_of(run.left_out, 3),
        drift=_drift(run, samples),
        quarantine=_quarantine(quarantine, run.images, run.counts.quarantined),
        stages=_stages(run.timings),
    )


@dataclass(frozen=True)
class Plane:
    """The points to draw, in the unit square, and the varieties they belong to."""

    x: Floats
    y: Floats
    variety: Indices  # of each point, into names and counts
    names: list[str]
    counts: list[int]  # of all images, drawn or not
    window: tuple[float, float, float, float]  # left, right, bottom, top, in units of the scores
    flat: bool  # only one component: the height of a point says nothing but its variety

    @property
    def inches(self) -> tuple[float, float]:
        """Width and height of the square that the points are drawn in."""
        return 7.0, 0.3 + 0.3 * len(self.names) if self.flat else 7.0 * ASPECT


@dataclass(frozen=True)
class Variety:
    """One entry of the legend and of the contact sheet."""

    name: str
    count: int
    colour: str
    outline: str
    dots: str
    pictures: list[str]  # JPEG in base64
    anchor: tuple[float, float] | None  # of its name on the plot, in percent; none without room


def _plane(scores: pa.Table, images: Mapping[str, int]) -> Plane:
    """Choose the points to draw and scale them to the unit square.

    `images` has for each label how many images there are: the scores may be a sample of them.
    """
    labels = [label or "" for label in scores["label"].to_pylist()]
    names = sorted(set(labels), key=natural)
    position = {name: i for i, name in enumerate(names)}
    variety = np.array([position[label] for label in labels], dtype=np.intp)
    drawn_of = np.bincount(variety, minlength=len(names)).tolist()
    counts = [max(images.get(name, 0), drawn) for name, drawn in zip(names, drawn_of, strict=True)]

    random = np.random.default_rng(0)
    drawn = np.arange(len(labels))
    if len(drawn) > MAX_POINTS:
        drawn = np.sort(random.choice(drawn, MAX_POINTS, replace=False))
    variety, x = variety[drawn], scores["pc_1"].to_numpy()[drawn]
    flat = "pc_2" not in scores.column_names
    if flat:
        y = len(names) - 1 - variety + random.uniform(-0.3, 0.3, len(drawn))
        left, right = _padded(x, 0.0)
        window = left, right + 0.3 * (right - left), -0.6, len(names) - 0.4  # names at the right
    else:
        # One unit is as long upwards as sideways: only then can distances be compared.
        y = scores["pc_2"].to_numpy()[drawn]
        span = max(np.ptp(x), np.ptp(y) / ASPECT)
        window = (*_padded(x, span), *_padded(y, span * ASPECT))
    left, right, bottom, top = window
    x, y = (x - left) / (right - left), (y - bottom) / (top - bottom)
    return Plane(x, y, variety, names, counts, window, flat)


def natural(name: str) -> tuple[bool, list[str | int], str]:
    """Order names as people do, "Apple 6" before "Apple 10", and no name at the end."""
    parts = re.split(r"(\d+)", name.casefold())
    return not name, [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _padded(values: Floats, span: float) -> tuple[float, float]:
    """Interval around the values, at least `span` long, with a margin."""
    middle = float(values.min() + values.max()) / 2
    half = max(float(np.ptp(values)), span) / 2 * 1.06 or 1.0
    return middle - half, middle + half


def _scree(ratio: Floats, k: int) -> Figure:
    """Share of each component below, what the first of them keep together above."""
    shown = min(len(ratio), max(math.ceil(1.6 * k), 12))
    component, kept = np.arange(1, shown + 1), np.cumsum(ratio)[:shown]
    figure = Figure(figsize=(7.6, 5.0))
    above = figure.add_axes((0.09, 0.42, 0.89, 0.56))
    below = figure.add_axes((0.09, 0.11, 0.89, 0.25), sharex=above)

    above.fill_between(component[:k], kept[:k], color=ACCENT, alpha=0.14, linewidth=0)
    above.plot(component, kept, color=REST, linewidth=2)
    above.plot(component[:k], kept[:k], color=ACCENT, linewidth=2)
    above.plot([k, k], [0, kept[k - 1]], color=ACCENT, linewidth=1, linestyle=(0, (3, 3)))
    above.plot(k, kept[k - 1], "o", color=ACCENT, markersize=7)
    above.annotate(
        f"{_count(k)} {'component keeps' if k == 1 else 'components keep'} {_percent(kept[k - 1])}",
        (k, kept[k - 1] / 2),
        (-10 if k > shown / 2 else 10, 0),
        textcoords="offset points",
        ha="right" if k > shown / 2 else "left",
        va="center",
    )
    above.set(ylim=(0, 1.04), xlim=(0.4, shown + 0.6))
    above.tick_params(labelbottom=False, length=0)

    # One outline for all bars of a colour keeps the page small when there are a thousand of them.
    for first, last, colour in ((0, k, ACCENT), (k, shown, REST)):
        edges = (component[first:last, None] + np.array([-0.4, 0.4])).ravel()
        heights = np.column_stack([ratio[first:last], np.zeros(last - first)]).ravel()[:-1]
        if len(heights):
            below.stairs(heights, edges, fill=True, color=colour, linewidth=0)
    below.set(ylim=(0, float(ratio[0]) * 1.08))
    below.set_xlabel("component", labelpad=8)
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below.yaxis.set_major_locator(MaxNLocator(3))
    for axes in (above, below):
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda share, _: f"{100 * share:g}{NO_BREAK}%")
        )
        axes.grid(visible=False, axis="x")
    return figure


def _cloud(plane: Plane, ratio: Floats) -> Figure:
    """Every image as a point, marked by its variety."""
    width, height = plane.inches
    figure = Figure(figsize=(width + LEFT + RIGHT, height + FOOT + HEAD))
    axes = figure.add_axes(_frame(plane))
    size = float(np.clip(900 / math.sqrt(len(plane.x)), 7, 42))
    for i in _largest_first(plane):  # so that the rare ones come on top
        mine = plane.variety == i
        axes.scatter(
            plane.x[mine],
            plane.y[mine],
            s=size * float(np.abs(outline(i)).max()) ** 2,  # Matplotlib fits outlines into it
            c=COLOURS[i % len(COLOURS)],
            marker=outline(i).tolist(),
            alpha=0.8,
            linewidths=0,
            rasterized=True,
            transform=axes.transAxes,
        )
    left, right, bottom, top = plane.window
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel(f"PC 1 · {_percent(ratio[0])}", labelpad=8)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if plane.flat:
        axes.set_yticks([])
    else:
        axes.text(0, 1.02, f"PC 2 · {_percent(ratio[1])}", color=SOFT, transform=axes.transAxes)
    return figure


def _frame(plane: Plane) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of the axes as shares of the plot."""
    width, height = plane.inches
    across, upwards = width + LEFT + RIGHT, height + FOOT + HEAD
    return LEFT / across, FOOT / upwards, width / across, height / upwards


def _largest_first(plane: Plane) -> list[int]:
    return sorted(range(len(plane.names)), key=lambda i: -plane.counts[i])


def outline(i: int) -> Floats:
    """Corners of the mark of variety `i`, around the origin, y upwards."""
    corners, outer, inner, turn = OUTLINES[i % len(OUTLINES)]
    angle = np.radians(turn) + np.pi * np.arange(2 * corners) / corners
    radius = np.where(np.arange(2 * corners) % 2, inner, outer)
    if inner == outer:  # no corner between two corners
        angle, radius = angle[::2], radius[::2]
    return np.column_stack([np.cos(angle), np.sin(angle)]) * radius[:, None]


def _svg(figure: Figure, salt: str) -> Markup:
    """SVG of a figure, ready to stand inside HTML."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", dpi=190, transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Namespaces mean nothing in HTML, the size is the page's affair, the style would leak into it.
    svg = re.sub(r' (xmlns(:\w+)?|version|(?<=<svg )width|height)="[^"]*"(?=[^>]*viewBox)', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'#([\w-]+)["\)]', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, name in THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)  # noqa: S704 - numbers only, no name or path is ever drawn


def _varieties(plane: Plane, thumbnails: Mapping[str, Sequence[bytes]]) -> list[Variety]:
    """Legend and contact sheet: names in order, each with its mark, its dots and its pictures."""
    each = max(map(len, thumbnails.values()), default=0)
    while sum(len(b"".join(jpegs[:each])) for jpegs in thumbnails.values()) > THUMBNAIL_BUDGET:
        each -= 1
    anchors = _anchors(plane)
    return [
        Variety(
            name=name,
            count=plane.counts[i],
            colour=COLOURS[i % len(COLOURS)],
            outline=" ".join(f"{10 * x:.1f},{-10 * y:.1f}" for x, y in outline(i)),
            dots=_dots(plane, np.flatnonzero(plane.variety == i), VARIETY_POINTS),
            pictures=[base64.b64encode(jpeg).decode() for jpeg in thumbnails.get(name, ())[:each]],
            anchor=anchors.get(i),
        )
        for i, name in enumerate(plane.names)
    ]


def _anchors(plane: Plane) -> dict[int, tuple[float, float]]:
    """Place names on the middle of their points, where no name of a larger variety stands yet.

    With one component there is a line for each variety, and its name stands at the end.
    """
    left, bottom, width, height = _frame(plane)
    line = 24 / plane.inches[1]  # height of a name in percent; a letter takes 1 % of the width
    placed: dict[int, tuple[float, float]] = {}
    for i in _largest_first(plane):
        mine = plane.variety == i
        if not mine.any():
            continue
        spot = plane.x[mine].max() if plane.flat else np.median(plane.x[mine])
        across = 100 * (left + width * float(spot))
        down = 100 * (1 - bottom - height * float(np.median(plane.y[mine])))
        if plane.flat or all(
            abs(across - x) > 4 + (len(plane.names[i]) + len(plane.names[j])) / 2
            or abs(down - y) > line
            for j, (x, y) in placed.items()
        ):
            placed[i] = round(across, 2), round(down, 2)
    return placed


def _dots(plane: Plane, points: Indices, most: int) -> str:
    """SVG path with a zero-length stroke, a dot, for at most `most` of the points, 400 by 300."""
    points = points[:: math.ceil(len(points) / most) or 1]
    return "".join(
        f"M{400 * x:.0f} {300 - 300 * y:.0f}h0"
        for x, y in zip(plane.x[points], plane.y[points], strict=True)
    )


def _milestones(ratio: Floats) -> list[tuple[float, int]]:
    """How many components it takes to keep half, most and nearly all of the variance."""
    kept = np.cumsum(ratio)
    return [
        (share, min(int(np.searchsorted(kept, share - 1e-9)) + 1, len(kept)))
        for share in (0.5, 0.8, 0.9, 0.95, 0.99)
    ]


def _quarantine(table: pa.Table, images: str, total: int) -> dict[str, Any]:
    """Rows to list, paths relative to the images, and what they have in common."""
    rows = [
        (path.removeprefix(images.rstrip("/") + "/"), stage, reason)
        for path, stage, reason in zip(
            *(table[name].to_pylist() for name in ("path", "stage", "reason")), strict=True
        )
    ]
    groups = Counter((stage, word_of(reason)) for _, stage, reason in rows)
    return {
        "total": max(total, len(rows)),
        "looked_at": len(rows),
        "rows": rows[:MAX_QUARANTINE_ROWS],
        "groups": groups.most_common(MAX_QUARANTINE_GROUPS),
        "kinds": len(groups),
    }


def _drift(run: Run, samples: Samples) -> dict[str, Any] | None:
    """What was added, in words, and what is farthest, in pictures."""
    if run.drift is None:
        return None
    return {
        "words": words(run.drift),
        "is_unlike": run.drift.is_unlike,
        "labels": run.drift.labels if run.drift.is_unlike else (),
        "pictures": [
            {**row, "source": base64.b64encode(row["jpeg"]).decode()}
            for row in samples.farthest.to_pylist()
        ],
    }


def _stages(timings: Mapping[str, float]) -> list[tuple[str, float, float, float]]:
    """Name, seconds, start and share of the total, for one bar after another."""
    stages = {name: seconds for name, seconds in timings.items() if name != "total"}
    spent = sum(stages.values())
    total = max(timings.get("total", spent), spent) or 1.0
    if total - spent > 0.01 * total:
        stages["other"] = total - spent
    starts = np.cumsum([0.0, *stages.values()])
    return [
        (name, seconds, float(start) / total, seconds / total)
        for (name, seconds), start in zip(stages.items(), starts, strict=False)
    ]


def _page() -> jinja2.Template:
    """Template of the page; whatever it is given is escaped unless it is markup of our own."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.result", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=_count, percent=_percent, duration=_duration, moment=_moment)
    return environment.get_template("report.html.j2")


def _count(number: int) -> str:
    return f"{number:,}".replace(",", NARROW)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}{NO_BREAK}%"


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (0 if hours else rest, "s")]
    return " ".join(f"{value}{NO_BREAK}{unit}" for value, unit in parts if value)


def _moment(iso: str) -> str:
    time = datetime.fromisoformat(iso)
    return f"{time.day}{NO_BREAK}{time:%B %Y, %H:%M %Z}".strip()
