"""The command `fruits`: reads options, calls the pipeline, tells errors in one line."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import __version__
from pipeline.console import ConsoleObserver, err, explain, observing, out, summary
from pipeline.errors import FruitsError, StateError, StorageError
from pipeline.storage import Address, BucketStore, S3Settings, open_store

CLUSTERS = Path(".fruits")  # the folders of loopback clusters, below the current one

app = typer.Typer(
    help="From fruit photos on S3 to a PCA matrix, on a Spark cluster of your own.",
    epilog="An address is s3a://bucket/prefix or a folder. A first look: fruits demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Images = Annotated[str, typer.Argument(help="Where the images lie; a folder's name is the label.")]
Output = Annotated[str, typer.Argument(help="Where features and result go.")]
BackboneName = Annotated[
    str, typer.Option("--backbone", help="mobilenet_v2 or efficientnet_lite0.", show_default=True)
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A Keras file, an s3a:// address, or 'imagenet' (the default): Keras's own download "
        "for mobilenet_v2, the installed ones for efficientnet_lite0."
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
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]


@app.command()
def run(
    images: Images,
    output: Output,
    backbone: BackboneName = "mobilenet_v2",
    weights: Weights = None,
    input_size: InputSize = 224,
    components: Components = None,
    variance: Variance = 0.95,
    standardize: Standardize = False,
    master: MasterUrl = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Do the whole job: list, features, PCA, matrix. A rerun computes only what is new."""
    with _place(master) as place, observing() as observer:
        job = _job(place, observer, images, output, backbone, weights, input_size, force)
        job.pca = _pca_options(components, variance, standardize)
        result = job.run()
    out.print(summary(result, output))


@app.command()
def features(
    images: Images,
    output: Output,
    backbone: BackboneName = "mobilenet_v2",
    weights: Weights = None,
    input_size: InputSize = 224,
    master: MasterUrl = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Bring the feature table below OUTPUT up to date with IMAGES, and stop there."""
    with _place(master) as place, observing() as observer:
        job = _job(place, observer, images, output, backbone, weights, input_size, force)
        counts = job.features()["counts"]
    out.print(
        f"{counts['features']:,} features and {counts['quarantined']:,} quarantined of "
        f"{counts['listed']:,} images; {counts['computed']:,} computed now.\n"
        f"Next: fruits pca {output}"
    )


@app.command()
def pca(
    output: Output,
    backbone: Annotated[
        str | None, typer.Option(help="Whose features, where OUTPUT holds several.")
    ] = None,
    components: Components = None,
    variance: Variance = 0.95,
    standardize: Standardize = False,
    master: MasterUrl = None,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Fit the PCA and write the matrix from the features that OUTPUT holds."""
    with _place(master) as place, observing() as observer:
        job = _job_of_table(place, observer, output, backbone, force)
        job.pca = _pca_options(components, variance, standardize)
        result = job.fit()
    out.print(summary(result, output))


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A folder on this machine.")],
    target: Annotated[str, typer.Argument(help="s3a://bucket/prefix")],
    debug: Debug = False,
) -> None:
    """Copy a folder to S3: many files at once, only those that are missing or newer."""
    from pipeline.session import read_settings
    from pipeline.upload import upload as upload_folder

    s3 = S3Settings.from_spark(read_settings())
    source = open_store(Address.parse(str(folder)), s3)
    with observing() as observer:
        observer.stage("Uploading")
        done = upload_folder(source, open_store(Address.parse(target), s3), observer.files)
    out.print(
        f"{done.sent:,} files sent ({done.bytes / 1e6:,.1f} MB), {done.skipped:,} were there.\n"
        f"Next: fruits run {target} OUTPUT"
    )


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    per_variety: Annotated[int, typer.Option(min=1, help="Pictures of each variety.")] = 20,
    seed: Annotated[int, typer.Option(help="Another seed renders other fruit.")] = 360,
    debug: Debug = False,
) -> None:
    """Render a small set of fruit-like pictures, for a machine that has no images."""
    from pipeline.sample import render_sample

    try:
        files = render_sample(folder, per_variety=per_variety, seed=seed)
    except OSError as error:
        raise StorageError(str(error)) from error
    out.print(f"{len(files)} pictures in {folder}.\nNext: fruits run {folder} OUTPUT")


@app.command()
def demo(
    images: Annotated[
        Path | None,
        typer.Option(help="A folder or .tar of images; default: FRUITS_IMAGES, else a sample."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A Keras file of MobileNetV2; default: FRUITS_WEIGHTS, else Keras's."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="The network to use.")] = None,
    output: Annotated[Path, typer.Option(help="Where the result is copied.")] = Path("demo-output"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the cluster up until Ctrl-C, with its pages.")
    ] = False,
    debug: Debug = False,
) -> None:
    """See the whole job on this machine: a Spark cluster and an S3 server on loopback."""
    from pipeline.demo import check_target, copy_result, demo_images, demo_weights
    from pipeline.upload import upload as upload_folder

    check_target(output)
    images = images or (Path(found) if (found := os.environ.get("FRUITS_IMAGES")) else None)
    with ExitStack() as stack:
        folder, told = stack.enter_context(demo_images(images))
        out.print(f"Images from {told}.")
        network, weights_file, note = demo_weights(weights, backbone)
        if note:
            out.print(f"[yellow]{note}.")
        observer = stack.enter_context(observing())
        observer.stage("Starting Spark and S3 on loopback")
        place = stack.enter_context(_place(None, with_s3=True))
        source, target = Address("fruits", "images"), Address("fruits", "result")
        bucket = BucketStore(source, place.s3)
        bucket.create_bucket()
        observer.stage("Uploading the images")
        upload_folder(open_store(Address.parse(str(folder)), place.s3), bucket, observer.files)
        addresses = (str(source), str(target))
        job = _job(place, observer, *addresses, network, str(weights_file), 224, False)
        result = job.run()
        copy_result(job.store, output)
        observer.finish()
        observer.bars.stop()
        out.print(summary(result, str(output)))
        out.print(f"\nLook at {output}/report.html.")
        if keep:
            _wait_with_pages(place, str(source))
        else:
            out.print(
                "Next: your own images, make demo IMAGES=folder; the Spark pages while it is up, "
                ".venv/bin/fruits demo --keep; all commands, .venv/bin/fruits --help"
            )


class _Place:
    """Where a job runs: its S3, and the session once it is needed."""

    def __init__(self, stack: ExitStack, master: str | None, with_s3: bool) -> None:
        from pipeline.session import read_settings

        self.stack = stack
        self.master = master
        self.pages: dict[str, str] = {}
        self.conf: Path | None = None
        self.log: Path | None = None
        self.session: Any = None
        if with_s3:
            self._start_cluster(with_s3=True)
        self.s3 = S3Settings.from_spark(read_settings())

    def spark(self) -> Any:
        """Return the session; start it, and a loopback cluster if no other is known."""
        from pipeline.session import make_session, read_settings

        if self.session is None:
            if self.master is None and "spark.master" not in read_settings():
                self._start_cluster(with_s3=False)
            self.session = make_session("fruits", self.master, log=self.log)
            self.stack.callback(self.session.stop)
            self.pages["application"] = self.session.sparkContext.uiWebUrl
        return self.session

    def _start_cluster(self, *, with_s3: bool) -> None:
        from pipeline.laptop import loopback_cluster

        cluster = self.stack.enter_context(loopback_cluster(CLUSTERS, with_s3=with_s3))
        self.pages = dict(cluster.pages)
        self.conf = cluster.conf
        self.log = cluster.conf.parent / "driver.log"


@contextmanager
def _place(master: str | None, *, with_s3: bool = False) -> Iterator[_Place]:
    with ExitStack() as stack:
        yield _Place(stack, master, with_s3)


def _job(
    place: _Place,
    observer: ConsoleObserver,
    images: str,
    output: str,
    backbone: str,
    weights: str | None,
    input_size: int,
    force: bool,
) -> Any:
    from pipeline.backbones import BACKBONES, find_weights, flatbuffer, identify
    from pipeline.job import Job

    if backbone not in BACKBONES:
        raise typer.BadParameter(
            f"expected one of {', '.join(BACKBONES)}, found {backbone!r}.",
            param_hint="--backbone",
        )
    file = find_weights(backbone, _fetched(weights, place))
    model = identify(BACKBONES[backbone], file, input_size)
    return Job(
        images=Address.parse(images),
        output=Address.parse(output),
        model=model,
        flatbuffer=lambda: flatbuffer(model, file),
        spark=place.spark,
        s3=place.s3,
        observer=observer,
        force=force,
    )


def _fetched(weights: str | None, place: _Place) -> str | None:
    """Return a local name for weights; those on S3 are fetched for the time of the run."""
    if weights is None or "://" not in weights:
        return weights
    address = Address.parse(weights)
    folder, _, name = address.path.rpartition("/")
    content = open_store(Address(address.bucket, folder), place.s3).read(name)
    if content is None:
        raise StorageError(f"expected weights at {weights}, found none; check --weights.")
    scratch = place.stack.enter_context(tempfile.TemporaryDirectory(prefix="fruits-"))
    file = Path(scratch) / name
    file.write_bytes(content)
    return str(file)


def _job_of_table(
    place: _Place, observer: ConsoleObserver, output: str, backbone: str | None, force: bool
) -> Any:
    from pipeline.features import FeatureTable, models_in
    from pipeline.job import Job

    store = open_store(Address.parse(output), place.s3)
    models = models_in(store)
    chosen = [model for model in models if backbone in (None, model.network)]
    if len(chosen) != 1:
        held = ", ".join(model.id for model in models) or "none"
        raise StateError(
            f"expected the features of one model in {output}"
            f"{f' and of {backbone}' if backbone else ''}, found: {held}. "
            + ("Choose with --backbone." if chosen else "Compute them: fruits features --help")
        )
    (model,) = chosen
    return Job(
        images=FeatureTable(store, model).images(),
        output=Address.parse(output),
        model=model,
        flatbuffer=lambda: b"",
        spark=place.spark,
        s3=place.s3,
        observer=observer,
        force=force,
    )


def _pca_options(components: int | None, variance: float, standardize: bool) -> Any:
    from pipeline.job import PCAOptions

    if not 0 < variance <= 1:
        raise typer.BadParameter(
            f"expected a share above 0 and up to 1, found {variance}.", param_hint="--variance"
        )
    return PCAOptions(components, None if components else variance, standardize)


def _wait_with_pages(place: _Place, images: str) -> None:
    out.print("\nThe cluster stays up until Ctrl-C:")
    for name, page in place.pages.items():
        out.print(f"  {name:<12} {page}")
    out.print(
        f"In another terminal:\n  export SPARK_CONF_DIR={place.conf}\n"
        f"  .venv/bin/fruits upload FOLDER {images}   # add images\n"
        f"  .venv/bin/fruits run {images} s3a://fruits/other --components 20"
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        out.print("Stopping.")


def main() -> None:
    """Run the command; exit with 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    debug = "--debug" in sys.argv
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted. What was committed is kept: run again to continue.", 130)
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
