"""What the jury gets, made from one real run of the notebook and looked at in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page

from pipeline.errors import DeliverableError, OutputTakenError, StateError
from pipeline.present.browser import MILLISECONDS, chromium
from pipeline.present.deliverables import NOTEBOOK, build_deliverables
from pipeline.present.slides import build_presentation
from pipeline.s3.access import S3Settings
from pipeline.storage import Address
from tests.conftest import run_fruits

NAME = "dupont_marie"


@pytest.fixture(scope="module")
def executed(
    tmp_path_factory: pytest.TempPathFactory, real_images: Path, real_weights: Path
) -> Path:
    """The folder that `fruits notebook` leaves, of six photos of each variety."""
    folder = tmp_path_factory.mktemp("executed") / "notebook-output"
    photos = folder.with_name("photos")
    for variety in (real_images / "Test").iterdir():
        (photos / variety.name).mkdir(parents=True)
        for file in sorted(variety.iterdir())[:6]:
            shutil.copy(file, photos / variety.name)
    options = ["--images", photos, "--weights", real_weights, "--output", folder]
    done = run_fruits(folder.parent, "notebook", *options)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def result(executed: Path) -> Address:
    return Address.parse(str(executed / "result"))


@pytest.fixture(scope="module")
def built(executed: Path, result: Address) -> Path:
    folder = executed.parent
    missed = build_deliverables(NAME, executed / "fruits.ipynb", result, S3Settings(), folder)
    assert ["own S3" in one for one in missed] == [True]
    return folder / f"P8_{NAME}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_the_notebook_computes_each_photo_once_and_draws_it(executed: Path) -> None:
    cells = nbformat.read(executed / "fruits.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7  # the contact sheet, scree, the plane, four rows of neighbours
    text = "\n".join(str(output.get("text", output.get("data", ""))) for output in outputs)
    assert "120 computed, 0 reused, 0 quarantined" in text
    assert "120 of 120 images" in text
    assert re.search(r"120 rows x \d+ components, 120 in CSV", text)
    assert "MapInPandas" in text
    assert "/jobs/" in text


def test_the_notebook_in_git_has_no_outputs_and_one_cell_of_parameters() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    assert len([cell for cell in code if "parameters" in cell.metadata.get("tags", [])]) == 1


def test_names_files_and_counts_are_those_of_the_run(built: Path) -> None:
    run = json.loads((built / f"P8_02_images_{NAME}" / "result" / "run.json").read_text())
    assert {file.name for file in built.iterdir()} == {
        f"P8_01_notebook_{NAME}.ipynb",
        f"P8_01_notebook_{NAME}.html",
        f"P8_02_images_{NAME}",
        f"P8_03_presentation_{NAME}.html",
        f"P8_03_presentation_{NAME}.pdf",
    }
    images = built / f"P8_02_images_{NAME}"
    manifest = json.loads((images / "manifest.json").read_text())
    assert manifest["counts"] == run["counts"]
    assert manifest["counts"]["listed"] == 120
    assert pq.read_table(images / "result" / "matrix.parquet").num_rows == 120
    for name, told in manifest["files"].items():
        content = (images / "result" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == told["sha256"], name
    assert run["images"] in (images / "README.txt").read_text()


def test_a_folders_name_is_text_in_the_slides(
    built: Path, browser: Browser, tmp_path: Path
) -> None:
    copy = tmp_path / "result"
    shutil.copytree(built / f"P8_02_images_{NAME}" / "result", copy)
    evil = '<img src=x onerror="window.taken = 1">'
    pictures = copy / "report-data" / "pictures.parquet"
    rows = pq.read_table(pictures)
    renamed = pc.if_else(pc.equal(rows["label"], rows["label"][0]), evil, rows["label"])
    pq.write_table(rows.set_column(0, "label", renamed), pictures)
    done = run_fruits(tmp_path, "presentation", "--result", copy, "--output", tmp_path / "slides")
    assert done.returncode == 0, done.stderr
    page = open_file(browser, tmp_path / "slides.html")
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    captions = page.evaluate(
        "() => [...document.querySelectorAll('figcaption')].map(one => one.textContent)"
    )
    assert evil in captions
    assert page.evaluate("() => window.taken") is None
    page.close()


def test_slides_tell_the_runs_figures_and_none_overflows(built: Path, browser: Browser) -> None:
    page = open_file(browser, built / f"P8_03_presentation_{NAME}.html")
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    slides = page.evaluate(
        """() => Reveal.getSlides().map(slide => {
            const {h, v} = Reveal.getIndices(slide);
            Reveal.slide(h, v);
            return [slide.querySelector("h1, h2").innerText, slide.scrollHeight, slide.scrollWidth];
        })"""
    )
    size = page.evaluate("() => [Reveal.getConfig().height, Reveal.getConfig().width]")
    assert len(slides) > 20
    assert not [slide for slide in slides if slide[1] > size[0] or slide[2] > size[1]]
    told = page.evaluate("() => document.querySelector('.slides').textContent")
    run = json.loads((built / f"P8_02_images_{NAME}" / "result" / "run.json").read_text())
    assert f"{run['pca']['k']} composantes" in told
    assert run["run_id"] in told
    assert "Dupont Marie" in told
    broken = "() => [...document.images].filter(i => !i.naturalWidth).length"
    assert page.evaluate(broken) == 0


def test_the_pdf_has_a_page_for_each_slide(built: Path) -> None:
    content = (built / f"P8_03_presentation_{NAME}.pdf").read_bytes()
    page = (built / f"P8_03_presentation_{NAME}.html").read_text()
    slides = page[page.index("<textarea") : page.index("</textarea>")].split("\n---\n")
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) == len(slides)


def test_pages_ask_nothing_of_the_network(built: Path, browser: Browser) -> None:
    for file in sorted(built.glob("*.html")):
        asked: list[str] = []
        page = browser.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(file.as_uri(), wait_until="networkidle")
        assert [url[:80] for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def open_file(browser: Browser, file: Path) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.set_default_timeout(MILLISECONDS)
    page.goto(file.as_uri())
    return page


# --- what is told when something is missing -----------------------------------------------------


def test_slides_without_a_run_are_refused(tmp_path: Path) -> None:
    nowhere = Address.parse(str(tmp_path / "nowhere"))
    with pytest.raises(StateError, match=r"found no run\.json.*make demo"):
        build_presentation(nowhere, S3Settings(), tmp_path / "slides")
    assert not list(tmp_path.iterdir())


def test_all_that_is_missing_is_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    nowhere = Address.parse(str(tmp_path / "nowhere"))
    with pytest.raises(DeliverableError) as caught:
        build_deliverables("dupont", tmp_path / "no.ipynb", nowhere, S3Settings(), tmp_path)
    for word in ("NAME=nom_prenom", "make notebook", "OUTPUT=s3a://bucket/result"):
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_notebook_that_was_not_run_is_no_deliverable(result: Address, tmp_path: Path) -> None:
    with pytest.raises(DeliverableError, match="outputs of code cell 1"):
        build_deliverables(NAME, NOTEBOOK, result, S3Settings(), tmp_path)


def test_a_folder_that_holds_something_else_is_never_replaced(
    executed: Path, result: Address, tmp_path: Path
) -> None:
    taken = tmp_path / f"P8_{NAME}" / "thesis.txt"
    taken.parent.mkdir()
    taken.write_text("x")
    with pytest.raises(OutputTakenError, match=r"thesis\.txt"):
        build_deliverables(NAME, executed / "fruits.ipynb", result, S3Settings(), tmp_path)
    assert taken.read_text() == "x"


def test_a_matrix_that_lacks_rows_is_told(executed: Path, result: Address, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(executed / "result", short)
    lines = (short / "matrix.csv").read_text().splitlines(keepends=True)
    (short / "matrix.csv").write_text("".join(lines[:-1]))

    def build() -> None:
        build_deliverables(
            NAME, executed / "fruits.ipynb", Address.parse(str(short)), S3Settings(), tmp_path
        )

    with pytest.raises(StateError, match=r"expected matrix\.csv in .* as run\.json has it"):
        build()
    run = json.loads((short / "run.json").read_text())
    run["files"]["matrix.csv"] = (short / "matrix.csv").stat().st_size
    (short / "run.json").write_text(json.dumps(run))
    with pytest.raises(DeliverableError, match=r"120 rows.*matrix\.csv, found 119"):
        build()
    assert not list(tmp_path.glob("P8_*"))
