"""The slides of a run: the text of `notebooks/presentation.md.j2` with the figures of `run.json`.

They become one HTML file (reveal.js, which shows them without a network) and a PDF, which a browser
prints. `make presentation` calls it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import sphinx_revealjs
from markupsafe import Markup
from matplotlib import style
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from pipeline.errors import StateError
from pipeline.local.sample import VARIETIES
from pipeline.networks.catalogue import NETWORKS
from pipeline.present.browser import print_to_pdf
from pipeline.record import Run, Speed
from pipeline.result.page import (
    ACCENT,
    COLOURS,
    INK,
    LINE,
    NARROW,
    NO_BREAK,
    REST,
    SOFT,
    Floats,
    natural,
    outline,
)
from pipeline.result.samples import Samples, read_part
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, Store, open_store
from pipeline.versions import open_result

SOURCE = Path(__file__).parents[2] / "notebooks"
WIDE = 14.0, 6.0  # inches of a plot that has a slide of its own
UNLABELLED = "sans étiquette"
FRUITS_360 = "Photos : Fruits-360, Mihai Oltean, CC BY-SA 4.0."
SAMPLE = "Images dessinées par le programme, pour l'exemple."
STAGES = {
    "list": "lister",
    "model": "préparer le réseau",
    "spark": "démarrer Spark",
    "features": "décrire les images",
    "pca": "ACP",
    "matrix": "écrire la matrice",
    "report": "rapport",
}
STYLE: dict[str, Any] = {
    "font.size": 17,
    "font.family": "sans-serif",
    "svg.fonttype": "path",  # the same on every machine that shows the slides
    "svg.hashsalt": "fruits",
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}


def build_presentation(
    result: Address, s3: S3Settings, target: Path, author: str = "", credit: str | None = None
) -> list[Path]:
    """Write `<target>.html` and `<target>.pdf`.

    Parameters
    ----------
    result
        Where a run has put its result: a folder or an address on S3.
    author
        The name on the first slide.
    credit
        The line below the photos: whose they are. None takes the sample for what it is, and all
        else for Fruits-360.

    Raises
    ------
    StateError
        When there is no run, or one that does not tell how fast its features were computed.
    BrowserError
        When no Chromium is found to print with.
    """
    run, files = open_result(open_store(result, s3), s3)
    if run is None:
        raise StateError(
            f"expected the result of a run in {result}, found no run.json. Make one (make demo), "
            "or name yours: OUTPUT=folder or OUTPUT=s3a://bucket/result"
        )
    page = _page(run, files, author, credit)
    html, pdf = target.with_suffix(".html"), target.with_suffix(".pdf")
    target.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page)
    ready = "document.documentElement.dataset.printable === 'yes'"
    print_to_pdf(html, pdf, query="print-pdf", ready=ready)
    return [html, pdf]


def _page(run: Run, store: Store, author: str, credit: str | None) -> str:
    if not run.largest_pass or not run.made:
        raise StateError(
            "expected a run that tells how fast its features were computed, found one of an older "
            "version that does not. Run into a new OUTPUT and name that."
        )
    shares, samples = _variance_ratio(store), Samples.read(store)
    plots = {
        "scree": _scree(shares, run.pca.k),
        "cloud": _cloud(samples.scores, shares),
        "stages": _stages(run.made.timings),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SOURCE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        nombre=number, pourcent=percent, duree=duration, jour=day, coeurs=cores
    )
    slides = environment.get_template("presentation.md.j2").render(
        run=run,
        auteur=author,
        credit=_credit(run) if credit is None else credit,
        reseau=NETWORKS[run.model.network].title,
        varieties=_varieties(samples),
        shares=[float(share) for share in shares],
        scaling=_scaling(run, run.largest_pass),
        plot=lambda name: _image(plots[name]),
        drawing=lambda name: _image((SOURCE / f"presentation-{name}.svg").read_bytes()),
    )
    shell = environment.get_template("presentation.html.j2")
    return shell.render(run_id=run.run_id, slides=_typeset(slides), **_reveal())


def _credit(run: Run) -> str:
    return SAMPLE if run.labels.keys() <= VARIETIES.keys() else FRUITS_360


def _typeset(text: str) -> Markup:
    """Put the spaces and apostrophes of French print into a text."""
    text = re.sub(r" (?=[;:?!»%])", NO_BREAK, text)
    return Markup(re.sub(r"(?<=\w)'(?=\w)", "\u2019", text))  # noqa: S704 - escaped by Jinja


def _reveal() -> dict[str, Markup]:
    """Return reveal.js's own files, which come inside the package sphinx-revealjs."""
    folder = Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs"
    files = {
        "reset_css": "dist/reset.css",
        "reveal_css": "dist/reveal.css",
        "reveal_js": "dist/reveal.js",
        "markdown_js": "plugin/markdown/markdown.js",
        "notes_js": "plugin/notes/notes.js",
    }
    # Inside a script element, this is the only text that would end it.
    return {
        name: Markup((folder / file).read_text().replace("</script", r"<\/script"))  # noqa: S704
        for name, file in files.items()
    }


# --- what the run left ------------------------------------------------------------------------


def _variance_ratio(store: Store) -> Floats:
    table = pyarrow.csv.read_csv(io.BytesIO(read_part(store, "explained_variance.csv")))
    ratio: Floats = table["ratio"].to_numpy()
    return ratio


def _varieties(samples: Samples) -> list[dict[str, Any]]:
    """Return the name and the pictures of each variety that has some, in the report's order."""
    return [
        {"name": name or UNLABELLED, "pictures": [_jpeg(one) for one in samples.pictures[name]]}
        for name in sorted(samples.pictures, key=natural)
    ]


def _jpeg(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _scaling(run: Run, largest: Speed) -> list[list[str]]:
    """Return rows of what grows with the images: its name, today, ten and a hundred times."""
    images, slots = run.counts.listed, largest.slots
    dimensions, k = run.model.dimensions, run.pca.k
    seconds = images / largest.images_per_second
    times = (1, 10, 100)
    hour = [f"{max(slots, int(np.ceil(slots * seconds * n / 3600)))}" for n in times]
    return [
        [f"passe du réseau, {cores(slots)}", *(duration(seconds * n) for n in times)],
        ["cœurs pour finir en une heure", *hour],
        ["caractéristiques (float32)", *(size(images * dimensions * 4 * n) for n in times)],
        ["matrice Parquet (float64)", *(size(images * k * 8 * n) for n in times)],
    ]


# --- plots ------------------------------------------------------------------------------------


def _style() -> AbstractContextManager[None]:
    return style.context(["default", STYLE])


def _scree(shares: Floats, k: int) -> Figure:
    shown = min(len(shares), max(int(1.6 * k), 12))
    component, kept = np.arange(1, shown + 1), np.cumsum(shares)[:shown]
    with _style():
        figure = Figure(figsize=(8.4, 6.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(component, 100 * kept, color=REST, linewidth=3)
        axes.plot(component[:k], 100 * kept[:k], color=ACCENT, linewidth=4)
        axes.fill_between(component[:k], 100 * kept[:k], color=ACCENT, alpha=0.14, linewidth=0)
        axes.plot(k, 100 * kept[k - 1], "o", color=ACCENT, markersize=12)
        axes.set(xlim=(0.4, shown + 0.6), ylim=(0, 104))
        axes.set_xlabel("nombre de composantes")
        axes.set_ylabel("variance gardée, en %")
    return figure


def _cloud(scores: pa.Table, shares: Floats) -> Figure:
    labels = np.array([label or "" for label in scores["label"].to_pylist()])
    names = sorted(set(labels), key=natural)  # as in the report, each in its colour
    x = scores["pc_1"].to_numpy()
    y = scores["pc_2"].to_numpy() if "pc_2" in scores.column_names else np.zeros(len(x))
    with _style():
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            mine = labels == name
            axes.scatter(
                x[mine],
                y[mine],
                s=float(np.clip(40_000 / len(x), 8, 70)),
                color=COLOURS[i % len(COLOURS)],
                marker=outline(i).tolist(),
                alpha=0.8,
                linewidths=0,
                rasterized=True,
                label=name or UNLABELLED,
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"composante 1 ({percent(float(shares[0]))})")
        if len(shares) > 1:
            axes.set_ylabel(f"composante 2 ({percent(float(shares[1]))})")
        legend = figure.legend(
            loc="outside right center",
            ncols=1 + (len(names) > 16),
            frameon=False,
            fontsize=14,
            handletextpad=0.2,
        )
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([90])
    return figure


def _stages(timings: Mapping[str, float]) -> Figure:
    spent = {name: seconds for name, seconds in timings.items() if name in STAGES}
    with _style():
        figure = Figure(figsize=(14.0, 5.2), layout="constrained")
        axes = figure.subplots()
        rows = [STAGES[name] for name in spent]
        bars = axes.barh(rows, list(spent.values()), color=REST, height=0.66)
        bars.patches[int(np.argmax(list(spent.values())))].set_color(ACCENT)
        texts = [duration(seconds) for seconds in spent.values()]
        axes.bar_label(bars, texts, padding=8, fontsize=18)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=19, labelcolor=INK)
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.1)
    return figure


def _image(drawn: Figure | bytes) -> Markup:
    """Return a picture that stands inside the page."""
    if isinstance(drawn, Figure):
        file = io.BytesIO()
        with _style():
            drawn.savefig(file, format="svg", dpi=200, transparent=True, metadata={"Date": None})
        drawn = file.getvalue()
    content = base64.b64encode(drawn).decode()
    return Markup('<img class="drawing" alt="" src="data:image/svg+xml;base64,{}">').format(content)


# --- figures as they are written in French ----------------------------------------------------


def number(value: float, decimals: int = 0) -> str:
    """Write a number: thousands apart, a comma before decimals."""
    return f"{value:,.{decimals}f}".replace(",", NARROW).replace(".", ",")


def percent(share: float) -> str:
    """Write a share as a percentage."""
    return f"{number(100 * share, 1)}{NO_BREAK}%"


def cores(count: int) -> str:
    """Write a number of cores."""
    return f"{number(count)}{NO_BREAK}{'cœur' if count == 1 else 'cœurs'}"


def size(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("o", "ko", "Mo", "Go", "To"):
        if count < 1000 or unit == "To":
            break
        count /= 1000
    return f"{number(count, int(count < 10))}{NO_BREAK}{unit}"


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    if seconds < 9.95:
        return f"{number(seconds, 1)}{NO_BREAK}s"
    whole = round(seconds)
    parts = []
    for unit, length in (("j", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        if count:
            parts.append(f"{count}{NO_BREAK}{unit}")
    return " ".join(parts[:2])


MONTHS = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"


def day(moment: str) -> str:
    """Write the day of an ISO time."""
    when = datetime.fromisoformat(moment)
    return f"{when.day} {MONTHS.split()[when.month - 1]} {when.year}"
