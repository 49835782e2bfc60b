"""What lies in an OUTPUT, and whose it is.

    features/    the feature tables, one for each model (table/)
    versions/    results, the newest and some older ones (versions.py)
    matrix.csv, matrix.parquet/, report.html ...    copies of the newest result
    run.json     its record; it comes last
    _work/       what a run at work keeps for itself

An OUTPUT is free, of this job's earlier runs, or of something else that must stay.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from pipeline.errors import OutputTakenError, StorageError
from pipeline.networks.model import Model
from pipeline.record import Run
from pipeline.storage import TEMPORARY, Address, BucketStore, Store
from pipeline.versions import OLD_PLACE, RECORD, RESULT, VERSIONS, current

WORK = "_work"


def check_output(
    images: Address, model: Model, output: Store, *, force: bool = False
) -> Run | None:
    """Return the run that OUTPUT holds, if it is one that a job may continue.

    Parameters
    ----------
    images, model
        What the job reads, and what makes its features.
    force
        Take an OUTPUT that holds anything else.

    Raises
    ------
    OutputTakenError
        When OUTPUT holds another run, features of another model, or something else.
    """
    if images.holds(output.address) or output.address.holds(images):
        raise OutputTakenError(
            f"expected IMAGES and OUTPUT apart, found one inside the other ({images}, "
            f"{output.address}). Choose another OUTPUT."
        )
    odd = sorted(set("*?[]{}#%") & set(output.address.path))
    if odd:
        raise StorageError(
            f"expected an OUTPUT whose name Spark and Delta read as it stands, found "
            f"{' '.join(odd)} in {output.address}, which they take for something else. Choose "
            "another name."
        )
    previous = check_run(images, model, output, force=force)
    if previous is None and not force:
        _refuse(output, _foreign_content(output, model.id))
    return previous


def check_run(images: Address, model: Model, output: Store, *, force: bool = False) -> Run | None:
    """Return the run that OUTPUT holds, if there is one; refuse that of other images or models.

    Parameters are those of `check_output`, which also looks at what else is there.
    """
    previous = current(output)
    different = _difference(previous, images, model) if previous else None
    if not force:
        _refuse(output, different)
    return None if different else previous


def check_exclusive_writes(output: BucketStore, key: str) -> None:
    """Prove that of two writes of one new object the second is refused: commits rest on it.

    Raises
    ------
    StorageError
        When this S3 takes both.
    """
    try:
        first, second = (output.write_new(key, secrets.token_bytes(16)) for _ in range(2))
    finally:
        output.delete(key)
    if not first or second:
        raise StorageError(
            f"expected the S3 of {output.address} to refuse a second PUT with If-None-Match: *, "
            "found that it does not: two runs at once would mix. Use one that does (AWS, MinIO, "
            "SeaweedFS and others do), or run with --single-writer and one run at a time."
        )


def _refuse(output: Store, taken: str | None) -> None:
    if taken:
        raise OutputTakenError(
            f"{output.address} holds {taken}. Choose another OUTPUT; fruits run --force puts this "
            "run's result in its place."
        )


def _difference(previous: Run, images: Address, model: Model) -> str | None:
    if previous.images != str(images):
        return f"the run of {previous.images}, not of {images}"
    if previous.model.id != model.id:
        return f"features of the model {previous.model.id}, not of {model.id}"
    return None


def _foreign_content(output: Store, model_id: str) -> str | None:
    if output.address.bucket is None and not Path(output.address.path).exists():
        return None
    for entry in output.list():
        top, _, rest = entry.key.partition("/")
        if top == "features":
            found = rest.partition("/")[0]
            if found != model_id:
                return f"features of the model {found}, not of {model_id}"
        elif top not in {*RESULT, VERSIONS, OLD_PLACE, WORK, RECORD} and not top.startswith(
            TEMPORARY
        ):
            return f"something else ({entry.key})"
    return None
