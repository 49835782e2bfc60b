"""Notebooks that JupyterLab saves whole: who reads one meanwhile finds it as it was before.

Jupyter Server (2.21) writes over the notebook itself, with a copy beside it. Whoever reads in that
moment, a second tab for one, finds half of it, takes it for broken and puts the copy in its place:
the save ends with an error and its content is lost.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class WholeFiles(AsyncLargeFileManager):
    """JupyterLab's own manager of files, with another way to write one."""

    @contextmanager
    def atomic_writing(
        self, os_path: str, text: bool = True, encoding: str | None = None
    ) -> Iterator[IO[Any]]:
        """Open a file to be written beside its target; rename it once its content is on the disk.

        Raises
        ------
        tornado.web.HTTPError
            403 when the file or its folder may not be written.
        """
        target = Path(os_path).resolve()
        with self.perm_to_403(os_path):
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, "not writable", os_path)
            temporary = target.with_name(f".~{secrets.token_hex(8)}")
            mode, newline = ("x", "\n") if text else ("xb", None)
            try:
                with temporary.open(mode, encoding=encoding, newline=newline) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if target.exists():
                    shutil.copymode(target, temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
