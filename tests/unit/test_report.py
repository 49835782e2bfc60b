"""The report as a reader meets it: one page that needs no network and hides nothing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest

from pipeline.record import PCAOptions
from pipeline.result import page as report
from pipeline.result.page import render_report
from pipeline.result.samples import Samples
from tests.records import run_of

VOID = {"meta", "link", "img", "br"}
EVIL = '<b onclick="x()">&"\'</b></svg><script>alert(1)</script> $\\frac{$ {{ 7 * 7 }}'


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, text, and whether tags pair."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "a tag is never closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in {"h1", "h2"}:
            self.headings.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" in self.open:
            self.styles.append(data)
            return
        self.words.append(data)
        if {"h1", "h2"} & set(self.open):
            self.headings[-1] += data

    @property
    def text(self) -> str:
        """What can be read, every space a plain one."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = {name.strip("_").replace("_", "-"): text for name, text in attributes.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def scores_of(labels, k=2, seed=1):
    values = np.random.default_rng(seed).normal(size=(len(labels), k))
    columns = {f"pc_{i + 1}": values[:, i] for i in range(k)}
    paths = [f"s3a://fruits/images/{label}/{i}.jpg" for i, label in enumerate(labels)]
    return pa.table({"path": paths, "label": pa.array(labels, pa.string()), **columns})


def quarantine_of(*rows):
    names = ("path", "stage", "reason")
    return pa.table({n: pa.array([r[i] for r in rows], pa.string()) for i, n in enumerate(names)})


def page_of(labels=("Kiwi 1", "Plum 2") * 10, k=2, quarantine=(), thumbnails=None, **changes):
    run = run_of(len(labels), k, len(quarantine), **changes)
    ratio = np.array([0.6, 0.25, 0.1, 0.05])
    samples = Samples(scores_of(labels, k), thumbnails or {})
    return Page(render_report(run, samples, ratio, quarantine_of(*quarantine)))


def names_of(page):
    """Names in the legend, in order."""
    legend = page.html.split('<ul class="legend">')[1].split("</ul>")[0]
    return re.findall(r'<a href="#variety-\d+">(.*?)</a>', legend)


def test_the_page_asks_nothing_of_the_network():
    page = page_of(
        quarantine=[("s3a://fruits/images/a.jpg", "decode", "see https://example.com/x.png")],
        thumbnails={"Kiwi 1": [b"jpeg"]},
    )
    loading = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"}
    asked = [a[name].strip() for _, a in page.elements for name in loading & a.keys()]
    assert asked
    assert [url for url in asked if not url.startswith(("data:image/", "#"))] == []
    styles = [*page.styles, *(a.get("style", "") for _, a in page.elements)]
    assert not [s for s in styles if re.search(r"@import|url\((?!#)", s)]
    assert not page.all("script")
    assert not page.all("iframe")
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_the_first_line_is_the_result():
    page = page_of(["Kiwi 1"] * 1500 + ["Plum 2"] * 12)
    assert page.headings[0] == (
        "1\u202f512 images of 2 varieties in 2 numbers each that keep 95.0\u00a0% of the variance."
    )


def test_every_section_is_there_in_order():
    assert page_of().headings[1:] == [
        "How much the components keep",
        "The images in the plane of the first two components",
        "The varieties",
        "Quarantine",
        "Where the time went",
        "Details",
    ]


def test_the_details_are_folded_and_name_model_versions_and_parameters():
    page = page_of()
    assert len(page.all("details")) == 5
    assert not [a for a in page.all("details") if "open" in a]
    for fact in ("mobilenet_v2-224-scaled-e67de524", "4.3.0", "x / 127.5 - 1", "variance 0.95"):
        assert fact in page.text


def test_both_plots_are_inline_and_described():
    page = page_of()
    described = [a["aria-label"] for a in page.all("div", role="img")]
    assert [text.split(":")[0].split(" of ")[0] for text in described] == [
        "Scree plot",
        "Scatter plot",
    ]
    assert "2 components keep 85.0 %" in page.text
    assert "PC 1 · 60.0 %" in page.text
    assert "PC 2 · 25.0 %" in page.text
    assert len(page.all("image")) == 1


def test_no_id_is_used_twice():
    page = page_of(["Kiwi", "Plum", "Fig"] * 5)
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert [name for name, count in ids.items() if count > 1] == []
    links = {a["href"][1:] for a in page.all("a")}
    assert links == {"variety-0", "variety-1", "variety-2"}
    assert links <= ids.keys()


def test_names_paths_and_reasons_are_text_and_never_markup():
    harmless = page_of(
        ["Kiwi", "Plum"] * 10,
        quarantine=[("x", "decode", "y")],
        thumbnails={"Kiwi": [b"1"]},
    )
    page = page_of(
        [EVIL, "Plum"] * 10,
        quarantine=[(f"s3a://fruits/images/{EVIL}/1.jpg", EVIL, EVIL)],
        thumbnails={EVIL: [b"1"]},
        run_id=EVIL,
        images="s3a://fruits/images",
        output=EVIL,
    )
    tags = [Counter(tag for tag, _ in p.elements) for p in (harmless, page)]
    assert tags[0] == tags[1]
    assert not [a for _, a in page.elements if "onclick" in a]
    assert page.all("img", alt=f"{EVIL}, picture 1")
    assert f"{EVIL}/1.jpg" in "".join(page.words)


def test_an_image_without_a_label_is_shown_as_such_and_last():
    page = page_of([None, "Kiwi", None, "Zebra melon"] * 5, thumbnails={"": [b"root"]})
    assert names_of(page) == ["Kiwi", "Zebra melon", "<i>without a label</i>"]
    assert page.all("img", alt="Without a label, picture 1")


def test_images_without_any_label_make_a_page_too():
    assert names_of(page_of([None] * 6)) == ["<i>without a label</i>"]


def test_names_are_ordered_as_people_count():
    labels = ["Apple 10", "kiwi", "apple 6", "Apple 6b", "² odd", "Banana", "Kiwi"]
    ordered = ["apple 6", "Apple 6b", "Apple 10", "Banana", "Kiwi", "kiwi", "² odd"]
    assert names_of(page_of(labels)) == names_of(page_of(labels[::-1])) == ordered


def test_one_component_is_drawn_as_one_line_for_each_variety():
    page = page_of(["Kiwi", "Plum", "Fig"] * 10, k=1)
    assert "The images along the first component" in page.headings
    assert "in 1 number each that keeps" in page.headings[0]
    assert "PC 1 ·" in page.text
    assert "PC 2" not in page.text
    assert len(page.all("a", class_="end")) == 3


@pytest.mark.parametrize("rows", [2, 3])
def test_a_handful_of_images_is_enough(rows):
    ratio = np.array([0.7, 0.3])[: rows - 1]
    k = len(ratio)
    samples = Samples(scores_of(["Kiwi"] * rows, k), {})
    page = Page(render_report(run_of(rows, k), samples, ratio, quarantine_of()))
    assert f"{rows} images of 1 variety in" in page.headings[0]


def test_images_that_all_look_the_same_can_be_drawn():
    scores = scores_of(["Kiwi"] * 5)
    for name in ("pc_1", "pc_2"):
        index = scores.column_names.index(name)
        scores = scores.set_column(index, name, pa.array([0.0] * 5))
    samples = Samples(scores, {})
    page = Page(render_report(run_of(5), samples, np.array([0.6, 0.4]), quarantine_of()))
    drawn = [a[name] for _, a in page.elements for name in ("d", "style") if name in a]
    assert drawn
    assert not [text for text in drawn if "nan" in text or "inf" in text]


def test_a_sample_is_drawn_of_many_images_and_the_caption_says_so(monkeypatch):
    labels = ["Kiwi", "Plum"] * 500
    assert not page_of(labels).all("figcaption")
    monkeypatch.setattr(report, "MAX_POINTS", 400)
    page = page_of(labels)
    assert len(page.all("figcaption")) == 1
    assert "a random sample of 400 of the 1\u202f000 images" in " ".join(page.words)


def test_a_large_run_stays_a_light_page():
    labels = [f"Fruit {i % 40}" for i in range(30_000)]
    heavy = {f"Fruit {i}": [bytes(4000)] * 30 for i in range(40)}
    page = page_of(labels, thumbnails=heavy)
    assert len(page.html) < 4_000_000
    pictures = Counter(a["alt"].split(",")[0] for a in page.all("img"))
    assert set(pictures.values()) == {12}, "every variety gives up the same share"


def test_fifty_varieties_have_fifty_different_marks():
    page = page_of([f"Fruit {i}" for i in range(50)])
    legend = page.html.split('<ul class="legend">')[1].split("</ul>")[0]
    assert len(set(re.findall(r"<polygon [^>]*>", legend))) == 50


def test_every_picture_is_embedded_and_has_a_text():
    page = page_of(thumbnails={"Kiwi 1": [b"one", b"two"], "Plum 2": [b"three"]})
    pictures = {a["alt"]: a["src"] for a in page.all("img")}
    assert pictures == {
        "Kiwi 1, picture 1": "data:image/jpeg;base64,b25l",
        "Kiwi 1, picture 2": "data:image/jpeg;base64,dHdv",
        "Plum 2, picture 1": "data:image/jpeg;base64,dGhyZWU=",
    }


def test_an_empty_quarantine_is_good_news():
    page = page_of()
    assert "Empty: every image that was listed could be read" in page.text
    assert "20 listed = 20 with features + 0 in quarantine." in page.text
    assert not page.all("table", class_="rows")


def test_a_quarantined_image_is_listed_with_stage_and_reason():
    page = page_of(quarantine=[("s3a://fruits/images/Kiwi 1/7.jpg", "decode", "truncated")])
    assert "Kiwi 1/7.jpg decode truncated" in page.text
    assert "1 image could not be used." in page.text
    assert "21 listed = 20 with features + 1 in quarantine." in page.text


def test_a_long_quarantine_is_grouped_and_cut():
    rows = [(f"{i}.jpg", "decode" if i % 3 else "read", "broken") for i in range(300)]
    page = page_of(quarantine=rows)
    assert "200 decode broken 100 read broken" in page.text
    assert "The first 200 of 300" in page.text
    assert "199.jpg" in page.text
    assert "200.jpg" not in page.text


def test_an_image_that_is_neither_described_nor_quarantined_is_reported():
    counts = replace(run_of().counts, listed=23)
    assert "+ 3 unaccounted for" in page_of(counts=counts).text


def test_the_time_bars_add_up_to_the_total():
    page = page_of()
    bars = [a["style"] for a in page.all("i") if "--start" in a.get("style", "")]
    assert bars == [
        "--start: 0.0%; --share: 1.11%",
        "--start: 1.11%; --share: 91.94%",
        "--start: 93.06%; --share: 5.56%",
        "--start: 98.61%; --share: 1.39%",
    ]
    assert "other 1.0 s 1 %" in page.text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (72.4, "1 min 12 s"),
        (3599.7, "1 h"),
        (4351.0, "1 h 12 min"),
    ],
)
def test_durations_are_told_as_people_tell_them(seconds, words):
    page = page_of(timings={"features": seconds, "total": seconds})
    assert f"{words} from start to finish, one stage after another" in page.text


def test_a_run_that_computed_nothing_has_no_rate():
    assert "nothing to compute" in page_of(images_per_second=None).text


def test_a_number_of_components_can_be_asked_for():
    pca = replace(run_of().pca, requested=PCAOptions(2, None))
    assert "asked for 2 components" in page_of(pca=pca).text


def test_the_table_says_how_many_components_a_share_takes():
    assert "50 % 1 component 80 % 2 components 90 % 3 components" in page_of().text


def test_equal_input_gives_equal_pages_whatever_the_notebook_has_set():
    once = page_of(["Kiwi", "Plum"] * 10).html
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "text.usetex": True}):
        assert page_of(["Kiwi", "Plum"] * 10).html == once
        assert mpl.rcParams["font.size"] == 30
