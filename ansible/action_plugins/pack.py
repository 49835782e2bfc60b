"""Brings what the module of this name is to unpack from the controller, once and to one place.

`ansible.builtin.copy` would read the file four more times for sums that are not needed here.
"""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    """Runs the module, with `file` in place of `src`."""

    TRANSFERS_FILES = True

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Bring the file into the task's own folder on the host, which is removed at the end."""
        super().run(tmp, task_vars)
        shell = self._connection._shell
        options = dict(self._task.args)
        try:
            if source := options.pop("src", None):
                options["file"] = shell.join_path(shell.tmpdir, "packed")
                if not self._task.check_mode:
                    self._transfer_file(source, options["file"])
            return self._execute_module(module_args=options, task_vars=task_vars)
        finally:
            self._remove_tmp_path(shell.tmpdir)
