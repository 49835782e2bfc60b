"""The command `fruits`: reads options, calls the pipeline, tells errors in one line."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__, versions
from pipeline.console import err, explain, observing, out, summary, versions_told
from pipeline.engine.session import read_settings
from pipeline.errors import FruitsError, NoImagesError, PCAError, StateError, StorageError
from pipeline.failures import MOST_SHARE
from pipeline.job import Choices
from pipeline.listing.names import told_of
from pipeline.local.demo import show
from pipeline.local.lab import open_lab
from pipeline.local.place import make_job, make_job_of_table, model_in, open_place
from pipeline.local.sample import render_sample
from pipeline.networks.catalogue import DEFAULT, NETWORKS
from pipeline.record import PCAOptions
from pipeline.s3.access import S3Settings, settings_here
from pipeline.storage import Address, open_store
from pipeline.table.feature_table import FeatureTable
from pipeline.upkeep import vacuum as vacuum_table
from pipeline.upload import upload as upload_folder
from pipeline.versions import KEPT

app = typer.Typer(
    help="From fruit photos on S3 to a PCA matrix, on a Spark cluster of your own.",
    epilog="An address is s3a://bucket/prefix or a folder. A first look: fruits demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _known(backbone: str | None) -> str | None:
    if backbone is not None and backbone not in NETWORKS:
        raise typer.BadParameter(f"expected one of {', '.join(NETWORKS)}, found {backbone!r}.")
    return backbone


Images = Annotated[str, typer.Argument(help="Where the images lie; a folder's name is the label.")]
Output = Annotated[str, typer.Argument(help="Where features and result go.")]
BackboneName = Annotated[str, typer.Option(help=f"{' or '.join(NETWORKS)}.", callback=_known)]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A Keras file, an s3a:// address, or 'imagenet' (the default): what Keras downloads "
        "for the network, or what is installed for efficientnet_lite0."
    ),
]
InputSize = Annotated[
    int,
    typer.Option(help="Side in pixels of what the network sees; 160, 128 and 96 are faster."),
]
Components = Annotated[
    int | None, typer.Option(min=1, help="Keep this many components (instead of --variance).")
]
Variance = Annotated[
    float, typer.Option(help="Keep as few components as keep this share of the variance.")
]
Standardize = Annotated[
    bool, typer.Option("--standardize", help="Give every feature unit variance before the PCA.")
]
MasterUrl = Annotated[
    str | None,
    typer.Option(
        "--master",
        help="spark://host:port; default: the cluster that SPARK_CONF_DIR describes, else one "
        "that is started on this machine for the time of the run.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Put the result in the place of another run's.")
]
AllowRemovals = Annotated[
    bool,
    typer.Option(
        "--allow-removals",
        help="Go on where more than 100 images, and a tenth of those known, are gone.",
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        help="Compute again what another version of the decoder or the runtime has made.",
    ),
]
InventoryAddress = Annotated[
    str | None,
    typer.Option(
        "--inventory",
        help="An S3 Inventory's manifest.json (Parquet), read in the place of a listing.",
    ),
]
SingleWriter = Annotated[
    bool,
    typer.Option(
        "--single-writer", help="For an S3 without conditional writes: one run at a time, by you."
    ),
]
RetryQuarantine = Annotated[
    bool, typer.Option("--retry-quarantine", help="Try again all images that have no features.")
]
MaxUnreadable = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="End where more than 100 images, and than this share of those read for the first "
        "time, cannot be read.",
    ),
]
KeepVersions = Annotated[
    int, typer.Option(min=1, help="Keep so many of the newest versions of the result.")
]
KeepDays = Annotated[
    float, typer.Option(min=0, help="Keep what was current within so many days, too.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]
ImagesHere = Annotated[
    Path | None,
    typer.Option(help="A folder or .tar of images; default: FRUITS_IMAGES, else a sample."),
]
WeightsHere = Annotated[
    str | None,
    typer.Option(help="A Keras file of MobileNetV2; default: FRUITS_WEIGHTS, else Keras's."),
]
Result = Annotated[str, typer.Option(help="The OUTPUT of a run: a folder or s3a://...")]
Credit = Annotated[str | None, typer.Option(help="Whose the photos are [default: Fruits-360].")]
NOTEBOOK_OUTPUT = Path("notebook-output")


@app.command()
def run(
    images: Images,
    output: Output,
    backbone: BackboneName = DEFAULT,
    weights: Weights = None,
    input_size: InputSize = 224,
    components: Components = None,
    variance: Variance = 0.95,
    standardize: Standardize = False,
    master: MasterUrl = None,
    force: Force = False,
    inventory: InventoryAddress = None,
    allow_removals: AllowRemovals = False,
    recompute: Recompute = False,
    retry_quarantine: RetryQuarantine = False,
    max_unreadable: MaxUnreadable = MOST_SHARE,
    single_writer: SingleWriter = False,
    keep_versions: KeepVersions = KEPT,
    keep_days: KeepDays = 1,
    debug: Debug = False,
) -> None:
    """Do the whole job: list, features, PCA, matrix. A rerun computes only what is new."""
    manifest = Address.parse(inventory) if inventory else None
    choices = Choices(
        inventory=manifest,
        force=force,
        allow_removals=allow_removals,
        recompute=recompute,
        single_writer=single_writer,
        retry_quarantine=retry_quarantine,
        max_unreadable=max_unreadable,
        keep_versions=keep_versions,
        keep_days=keep_days,
    )
    with open_place(master) as place, observing() as observer:
        job = make_job(place, observer, images, output, backbone, weights, input_size, choices)
        job.pca = _pca_options(components, variance, standardize)
        result = job.run()
    out.print(summary(result, output))


@app.command()
def features(
    images: Images,
    output: Output,
    backbone: BackboneName = DEFAULT,
    weights: Weights = None,
    input_size: InputSize = 224,
    master: MasterUrl = None,
    force: Force = False,
    inventory: InventoryAddress = None,
    allow_removals: AllowRemovals = False,
    recompute: Recompute = False,
    retry_quarantine: RetryQuarantine = False,
    max_unreadable: MaxUnreadable = MOST_SHARE,
    single_writer: SingleWriter = False,
    debug: Debug = False,
) -> None:
    """Bring the feature table below OUTPUT up to date with IMAGES, and stop there."""
    manifest = Address.parse(inventory) if inventory else None
    choices = Choices(
        inventory=manifest,
        force=force,
        allow_removals=allow_removals,
        recompute=recompute,
        single_writer=single_writer,
        retry_quarantine=retry_quarantine,
        max_unreadable=max_unreadable,
    )
    with open_place(master) as place, observing() as observer:
        job = make_job(place, observer, images, output, backbone, weights, input_size, choices)
        counts = job.features()
    out.print(
        f"{counts.features:,} features and {counts.quarantined:,} quarantined of "
        f"{counts.listed:,} images; {counts.computed:,} computed now.\n"
        f"Next: fruits pca {output}"
    )


@app.command()
def pca(
    output: Output,
    backbone: Annotated[
        str | None,
        typer.Option(help="Whose features, where OUTPUT holds several.", callback=_known),
    ] = None,
    components: Components = None,
    variance: Variance = 0.95,
    standardize: Standardize = False,
    master: MasterUrl = None,
    force: Force = False,
    single_writer: SingleWriter = False,
    keep_versions: KeepVersions = KEPT,
    keep_days: KeepDays = 1,
    debug: Debug = False,
) -> None:
    """Fit the PCA and write the matrix from the features that OUTPUT holds."""
    with open_place(master) as place, observing() as observer:
        choices = Choices(
            force=force,
            single_writer=single_writer,
            keep_versions=keep_versions,
            keep_days=keep_days,
        )
        job = make_job_of_table(place, observer, output, backbone, choices)
        job.pca = _pca_options(components, variance, standardize)
        result = job.fit()
    out.print(summary(result, output))


@app.command()
def forget(
    output: Output,
    paths: Annotated[list[str], typer.Argument(help="As quarantine.csv and the matrix name them.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Whose features, where OUTPUT holds several.", callback=_known),
    ] = None,
    master: MasterUrl = None,
    single_writer: SingleWriter = False,
    debug: Debug = False,
) -> None:
    """Remove deleted images from features and result, and every older file that held them."""
    with open_place(master) as place, observing() as observer:
        choices = Choices(single_writer=single_writer)
        job = make_job_of_table(place, observer, output, backbone, choices)
        receipt = job.forget(paths)
        out.print(
            f"{receipt.images:,} images forgotten, {receipt.had_rows:,} of them had a row; "
            f"{receipt.files_deleted:,} files and {receipt.states_deleted:,} states deleted.\n"
            + (f"The bucket still keeps {receipt.remains}.\n" if receipt.remains else "")
            + f"The receipt is in {output}/features; this key, shown once, proves whose it is:\n"
            f"{receipt.key}"
        )
        try:
            out.print(summary(job.fit(), output))
        except (NoImagesError, PCAError) as error:
            out.print(f"There is no result any more: {error}")


@app.command()
def results(
    output: Output,
    at: Annotated[int | None, typer.Option(min=1, help="Look at this version.")] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Publish the version of --at again, as the newest.")
    ] = False,
    single_writer: SingleWriter = False,
    debug: Debug = False,
) -> None:
    """List the versions of a result, look at one, or go back to one."""
    store = open_store(Address.parse(output), _s3(output))
    if restore:
        if at is None:
            raise typer.BadParameter("expected --at N with --restore.", param_hint="--restore")
        again = versions.restore(store, at, single_writer=single_writer)
        out.print(f"Version {at} is the newest again, as version {again.version}.")
    elif at is None:
        found = versions.all_versions(store)
        if not found:
            raise StateError(
                f"expected versions of a result in {output}, found none. Make one: fruits run "
                f"IMAGES {output}"
            )
        out.print(versions_told(found))
    else:
        run = versions.at(store, at)
        out.print(summary(run, str(store.address / versions.folder_of(run))))


@app.command()
def vacuum(
    output: Output,
    days: Annotated[int, typer.Option(min=2, help="Keep what is younger.")] = 7,
    backbone: Annotated[
        str | None,
        typer.Option(help="Whose features, where OUTPUT holds several.", callback=_known),
    ] = None,
    debug: Debug = False,
) -> None:
    """Delete files of the feature table that no version of the last days names."""
    s3 = _s3(output)
    store = open_store(Address.parse(output), s3)
    swept = vacuum_table(FeatureTable(store, model_in(store, backbone), s3), timedelta(days=days))
    out.print(
        f"{swept.files:,} files and {swept.states:,} states deleted ({swept.bytes / 1e6:,.1f} MB)."
    )


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A folder on this machine.")],
    target: Annotated[str, typer.Argument(help="s3a://bucket/prefix")],
    strip_metadata: Annotated[
        bool,
        typer.Option(
            "--strip-metadata",
            help="Send photos without places (GPS), times and names; files from which these cannot "
            "be taken stay here.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Copy a folder to S3: many files at once, only those that are missing or newer."""
    s3 = _s3(target)
    source = open_store(Address.parse(str(folder)), s3, follows_links=True)
    with observing() as observer:
        observer.stage("Uploading")
        done = upload_folder(
            source,
            open_store(Address.parse(target), s3),
            observer.files,
            strip_metadata=strip_metadata,
        )
    how = " without their metadata" if strip_metadata else ""
    out.print(
        f"{done.sent:,} files sent{how} to {target} ({done.bytes / 1e6:,.1f} MB), "
        f"{done.skipped:,} were there."
    )
    if done.kept_back:
        out.print(
            f"Not sent, as their metadata cannot be taken from them: {told_of(done.kept_back)}. "
            "Save photos among them as JPEG, PNG or WebP."
        )
    out.print(f"Next: fruits run {target} OUTPUT")


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    per_variety: Annotated[int, typer.Option(min=1, help="Pictures of each variety.")] = 20,
    seed: Annotated[int, typer.Option(help="Another seed renders other fruit.")] = 360,
    debug: Debug = False,
) -> None:
    """Render a small set of fruit-like pictures, for a machine that has no images."""
    try:
        files = render_sample(folder, per_variety=per_variety, seed=seed)
    except OSError as error:
        raise StorageError(str(error)) from error
    out.print(f"{len(files)} pictures in {folder}.\nNext: fruits run {folder} OUTPUT")


@app.command()
def demo(
    images: ImagesHere = None,
    weights: WeightsHere = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(NETWORKS)}; default: {DEFAULT}, if its weights can be had.",
            callback=_known,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the result is copied.")] = Path("demo-output"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the cluster up until Ctrl-C, with its pages.")
    ] = False,
    debug: Debug = False,
) -> None:
    """See the whole job on this machine: a Spark cluster and an S3 server on loopback."""
    show(images, weights, backbone, output, keep=keep)


@app.command()
def lab(
    images: ImagesHere = None,
    debug: Debug = False,
) -> None:
    """Open the notebooks in JupyterLab on this machine, with Spark and S3 on loopback."""
    open_lab(images)


@app.command()
def notebook(
    images: ImagesHere = None,
    weights: WeightsHere = None,
    output: Annotated[Path, typer.Option(help="Where it is kept, executed.")] = NOTEBOOK_OUTPUT,
    debug: Debug = False,
) -> None:
    """Run the notebook on this machine, and keep it executed, as HTML, and with its result."""
    from pipeline.present.deliverables import execute_notebook

    execute_notebook(images, str(Path(weights).absolute()) if weights else None, output)


@app.command()
def presentation(
    result: Result = "demo-output",
    output: Annotated[Path, typer.Option(help="The files, without .html and .pdf.")] = Path(
        "presentation"
    ),
    author: Annotated[str, typer.Option(help="The name on the first slide.")] = "",
    credit: Credit = None,
    debug: Debug = False,
) -> None:
    """Make the slides (in French) of a run: HTML to show, PDF to hand out."""
    from pipeline.present.slides import build_presentation

    s3 = _s3(result)
    for file in build_presentation(Address.parse(result), s3, output, author, credit):
        out.print(f"Look at {file}.")


@app.command()
def deliverables(
    name: Annotated[str, typer.Argument(help="nom_prenom")],
    result: Result = str(NOTEBOOK_OUTPUT / "result"),
    notebook: Annotated[Path, typer.Option(help="The executed notebook.")] = NOTEBOOK_OUTPUT
    / "fruits.ipynb",
    folder: Annotated[Path, typer.Option(help="Where P8_nom_prenom is made.")] = Path(),
    credit: Credit = None,
    debug: Debug = False,
) -> None:
    """Put together what is handed to the jury, and check it."""
    from pipeline.present.deliverables import build_deliverables

    s3 = _s3(result)
    missed = build_deliverables(name, notebook, Address.parse(result), s3, folder, credit)
    out.print(f"{folder / f'P8_{name}'} is complete: notebook, images and matrix, presentation.")
    for one in missed:
        out.print(f"[yellow]What a jury may miss: {one}.")


def _s3(address: str) -> S3Settings:
    """Return how S3 is reached for an address; who uses a folder needs no credentials."""
    return settings_here(read_settings()) if Address.parse(address).bucket else S3Settings()


def _pca_options(components: int | None, variance: float, standardize: bool) -> PCAOptions:
    if not 0 < variance <= 1:
        raise typer.BadParameter(
            f"expected a share above 0 and up to 1, found {variance}.", param_hint="--variance"
        )
    return PCAOptions(components, None if components else variance, standardize)


INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main() -> None:
    """Run the command; exit with 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    debug = "--debug" in sys.argv
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
            _fail("interrupted. What was committed is kept: run again to continue.", INTERRUPTED)
        raise
    except FruitsError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        _fail(explain(error), 1)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(text: str, status: int) -> None:
    err.print("[bold red]fruits:[/] ", end="")
    err.print(text, markup=False)
    sys.exit(status)


def version(show: bool) -> None:
    """Print the version and stop."""
    if show:
        out.print(f"fruits {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From fruit photos on S3 to a PCA matrix, on a Spark cluster of your own."""
