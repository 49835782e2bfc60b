"""Notebooks under JupyterLab: read while they are saved, saved by two at once, saved in vain."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from tornado.web import HTTPError

from pipeline.cluster.notebook_files import WholeFiles

NAME = "fruits.ipynb"


@pytest.fixture
def files(tmp_path: Path) -> WholeFiles:
    return WholeFiles(root_dir=str(tmp_path))


def notebook(number: int) -> dict[str, Any]:
    """A notebook that takes a moment to be written, as one with plots does."""
    plot = new_output("display_data", data={"text/plain": "." * 300_000})
    cell = new_code_cell("plot()", id="plot", execution_count=number, outputs=[plot])
    return {"type": "notebook", "format": "json", "content": new_notebook(cells=[cell])}


async def number_of(files: WholeFiles) -> int:
    model = await files.get(NAME)
    return int(model["content"]["cells"][0]["execution_count"])


def test_read_while_it_is_saved_it_is_whole_and_no_save_is_lost(files: WholeFiles) -> None:
    async def save_and_read() -> list[int]:
        await files.save(notebook(0), NAME)
        found = []

        async def read() -> None:
            while not found or found[-1] < 20:
                found.append(await number_of(files))

        reading = asyncio.create_task(read())
        for number in range(1, 21):
            await files.save(notebook(number), NAME)
            assert await number_of(files) == number
        await reading
        return found

    found = asyncio.run(asyncio.wait_for(save_and_read(), timeout=600))
    assert found == sorted(found)
    assert len(set(found)) > 1


def test_of_two_who_save_at_once_one_is_kept_whole(files: WholeFiles, tmp_path: Path) -> None:
    async def save_twice() -> int:
        await asyncio.gather(*(files.save(notebook(number), NAME) for number in (1, 2)))
        return await number_of(files)

    assert asyncio.run(save_twice()) in (1, 2)
    assert {file.name for file in tmp_path.iterdir()} == {NAME, ".ipynb_checkpoints"}


def test_a_save_that_fails_leaves_what_was_there(files: WholeFiles, tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    target.write_text("kept")
    with pytest.raises(OSError, match="no space left"), files.atomic_writing(str(target)) as file:
        file.write("half of it")
        raise OSError("no space left")
    assert target.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [target]


def test_mode_and_link_stay(files: WholeFiles, tmp_path: Path) -> None:
    target, link = tmp_path / "script.sh", tmp_path / "link.sh"
    target.touch(mode=0o750)
    link.symlink_to(target)
    with files.atomic_writing(str(link), text=False) as file:
        file.write(b"true\r\n")
    assert link.is_symlink()
    assert target.read_bytes() == b"true\r\n"
    assert target.stat().st_mode & 0o777 == 0o750


def test_what_may_not_be_written_is_refused(
    files: WholeFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "data.csv"
    target.write_text("kept")
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != target)  # root may write
    with (
        pytest.raises(HTTPError, match=r"Permission denied: data\.csv"),
        files.atomic_writing(str(target)),
    ):
        pass
    assert target.read_text() == "kept"
