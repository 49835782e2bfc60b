"""Whose an OUTPUT is, and how a result takes its place there as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import OutputTakenError
from pipeline.networks.model import Model
from pipeline.output import check_output, check_run
from pipeline.storage import Address, FolderStore
from tests.records import run_of

IMAGES = Address("fruits", "images")
MODEL = Model("net-32-abc", "net", 32, 3, "as it is", "weights.h5", "0" * 64)


@pytest.fixture
def output(tmp_path: Path) -> FolderStore:
    """Features of two models, and no run."""
    store = FolderStore(Address.parse(str(tmp_path)))
    for name in (MODEL.id, "other-32-def"):
        store.write(f"features/{name}/model.json", b"{}")
    return store


def hold(output: FolderStore, images: str, model: str) -> None:
    run = run_of(images=images, model=replace(MODEL, id=model))
    output.write("run.json", run.to_bytes())


def test_either_model_may_be_fitted_while_a_run_wants_an_output_of_its_own(
    output: FolderStore,
) -> None:
    assert check_run(IMAGES, MODEL, output) is None
    with pytest.raises(OutputTakenError, match="features of the model other-32-def, not of"):
        check_output(IMAGES, MODEL, output)
    assert check_output(IMAGES, MODEL, output, force=True) is None


@pytest.mark.parametrize("check", [check_run, check_output])
def test_the_run_that_is_there_is_gone_on_with_or_refused(
    output: FolderStore, check: Callable[..., Any]
) -> None:
    hold(output, str(IMAGES), MODEL.id)
    assert check(IMAGES, MODEL, output).images == str(IMAGES)
    for images, model in (("s3a://fruits/other", MODEL.id), (str(IMAGES), "other-32-def")):
        hold(output, images, model)
        with pytest.raises(OutputTakenError, match=r", not of .* --force"):
            check(IMAGES, MODEL, output)
        assert check(IMAGES, MODEL, output, force=True) is None
