"""What is handed to the jury: the executed notebook, images and matrix, slides.

`make notebook` and `make deliverables` call it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pyarrow.csv
import pyarrow.parquet as pq
from nbconvert import HTMLExporter

from pipeline.console import observing, out
from pipeline.errors import DeliverableError
from pipeline.local.demo import check_target, copy_result, place_with_images
from pipeline.local.given import images_named, open_images
from pipeline.present.slides import SOURCE, build_presentation
from pipeline.record import Run
from pipeline.s3.access import S3Settings
from pipeline.storage import Address, Store, check_replaceable, open_store, replacing
from pipeline.versions import RESULT, open_result

NOTEBOOK = SOURCE / "fruits.ipynb"
SECONDS_TO_ANSWER = 300  # of a kernel; on a machine that stands still for a while, 4 are too few
RESULT_OF_NOTEBOOK = Address("fruits", "notebook")  # what it takes where nothing else is said


def execute_notebook(images: Path | None, weights: str | None, target: Path) -> None:
    """Run the notebook on a loopback cluster; keep it executed, as HTML, and with its result.

    Parameters
    ----------
    images, weights
        As for `pipeline.local.demo.show`.
    target
        A folder that gets `fruits.ipynb`, `fruits.html` and `result/`, all of them or none.

    Raises
    ------
    OutputTakenError
        When `target` holds anything else than an earlier run of the notebook.
    DeliverableError
        When a cell fails; the message names it.
    """
    check_replaceable(target, {"fruits.ipynb", "fruits.html", "result"})
    check_target(target / "result")
    with open_images(images or images_named()) as (folder, told), replacing(target) as fresh:
        out.print(f"Images from {told}.")
        with observing() as observer, place_with_images(folder, observer) as place:
            observer.stage("Running the notebook")
            _execute(fresh / NOTEBOOK.name, {"weights": weights or ""})
            copy_result(open_store(RESULT_OF_NOTEBOOK, place.s3), place.s3, fresh / "result")
        (fresh / "fruits.html").write_text(as_html(fresh / NOTEBOOK.name))
    out.print(
        f"Look at {target}/fruits.html.\n"
        f"Next: make deliverables NAME=nom_prenom OUTPUT={target}/result"
    )


def _execute(target: Path, parameters: dict[str, str]) -> None:
    try:
        papermill.execute_notebook(
            NOTEBOOK,
            target,
            parameters,
            kernel_name="python3",
            progress_bar=False,
            cwd=NOTEBOOK.parent,
            start_timeout=SECONDS_TO_ANSWER,
            iopub_timeout=SECONDS_TO_ANSWER,
        )
    except papermill.PapermillExecutionError as error:
        raise DeliverableError(
            f"expected every cell of {NOTEBOOK.name} to end well, found {error.ename} in cell "
            f"{error.exec_count}: {error.evalue}"
        ) from error


def as_html(notebook: Path) -> str:
    """Return a notebook as one HTML file that asks nothing of the network."""
    exporter = HTMLExporter(  # type: ignore[no-untyped-call]
        mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", embed_images=True
    )
    page, _ = exporter.from_filename(str(notebook))
    return page


def build_deliverables(
    name: str,
    notebook: Path,
    result: Address,
    s3: S3Settings,
    folder: Path,
    credit: str | None = None,
) -> list[str]:
    """Build `P8_<name>` and return what a jury would miss in it.

    Parameters
    ----------
    name
        `nom_prenom`, the end of every name.
    notebook
        The executed notebook.
    result
        What a run has written, on S3 or in a folder.
    folder
        Where `P8_<name>` is made; one that is there is replaced.
    credit
        As for `build_presentation`.

    Raises
    ------
    DeliverableError
        When a part cannot be made; all such parts are named, and nothing is written.
    """
    store = open_store(result, s3)
    absent = list(_absent(name, notebook, *open_result(store, s3)))
    if absent:
        raise DeliverableError(
            "\n".join(["the deliverables lack:", *(f"- {one}" for one in absent)])
        )
    target = folder / f"P8_{name}"
    first, second, third = (
        f"P8_{part}_{name}" for part in ("01_notebook", "02_images", "03_presentation")
    )
    pages = {f"{first}.ipynb", f"{first}.html", f"{third}.html", f"{third}.pdf"}
    check_replaceable(target, {*pages, second})
    with replacing(target) as fresh:
        copy = fresh / f"{first}.ipynb"
        shutil.copy(notebook, copy)
        copy.with_suffix(".html").write_text(as_html(notebook))
        images = fresh / second
        copied = images / "result"
        run = copy_result(store, s3, copied)
        check_matrix(copied, run)
        manifest = _manifest(copied, run)
        (images / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
        (images / "README.txt").write_text(_addresses(run))
        here = Address.parse(str(copied))
        author = name.replace("_", " ").title()
        build_presentation(here, S3Settings(), fresh / third, author, credit)
    return list(_weaknesses(run))


def _absent(name: str, notebook: Path, run: Run | None, files: Store) -> Iterator[str]:
    if not name.replace("_", "").replace("-", "").isalnum() or "_" not in name:
        yield f"a name: expected NAME=nom_prenom, found {name!r}"
    if notebook.exists():
        yield from _unfinished(notebook)
    else:
        yield (
            f"the executed notebook: expected it at {notebook}, found none. Make one (make "
            "notebook), or download yours from JupyterLab and name it: NOTEBOOK=file.ipynb"
        )
    if run is None:
        yield (
            f"the result of a run: expected run.json in {files.address}, found none. Name yours: "
            "OUTPUT=s3a://bucket/result"
        )
    else:
        parts = [part for part in RESULT if not any(files.list(part))]
        yield from (f"{part}: not in {files.address}. Run the job again" for part in parts)


def _unfinished(notebook: Path) -> Iterator[str]:
    cells = nbformat.read(notebook, as_version=4).cells  # type: ignore[no-untyped-call]
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, 1):
        if cell.execution_count is None:
            yield f"outputs of code cell {number} of {notebook}: run all its cells, then save it"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"a good end of code cell {number} of {notebook}: it failed"


def check_matrix(result: Path, run: Run) -> None:
    """Make sure that both forms of the matrix have as many rows and components as the run says."""
    expected = run.counts.features, run.pca.k + 2
    tables = {
        "matrix.parquet": pq.read_table(result / "matrix.parquet"),
        "matrix.csv": pyarrow.csv.read_csv(result / "matrix.csv"),
    }
    for name, table in tables.items():
        if (table.num_rows, table.num_columns) != expected:
            raise DeliverableError(
                f"expected {expected[0]} rows and {expected[1]} columns in {name}, found "
                f"{table.num_rows} and {table.num_columns}. Run the job again with --force."
            )


def _manifest(result: Path, run: Run) -> dict[str, Any]:
    files = sorted(file for file in result.rglob("*") if file.is_file())
    return {
        "run": run.run_id,
        "images": run.images,
        "matrix": f"{run.output}/matrix.parquet",
        "counts": asdict(run.counts),
        "components": run.pca.k,
        "files": {
            str(file.relative_to(result)): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in files
        },
    }


def _addresses(run: Run) -> str:
    return (
        "Les images et la matrice sur S3\n\n"
        f"images  {run.images}  ({run.counts.listed} listées)\n"
        f"matrice {run.output}/matrix.parquet\n"
        f"        {run.output}/matrix.csv\n\n"
        "Ce dossier : result/ est la copie du résultat, manifest.json en donne les comptes et les "
        "sommes sha256.\n"
    )


def _weaknesses(run: Run) -> Iterator[str]:
    if run.cluster.master.startswith("spark://127.0.0.1"):
        yield (
            "the run was on this machine's own S3, which is gone: for images and matrix in the "
            "cloud run the notebook on the cluster and give OUTPUT=s3a://your-bucket/notebook"
        )
    if run.counts.quarantined:
        yield f"{run.counts.quarantined} images are in quarantine; say why (quarantine.csv)"
