#!/usr/bin/python
"""Writes several files of a host in one step: `template` and `copy` take a few for each file."""

from __future__ import annotations

DOCUMENTATION = """
module: write_files
short_description: Writes several text files in one step
description:
  - All contents are validated before the first file is written, and each is replaced at once.
  - A folder that is missing is made, for everyone to read.
  - Contents are never shown, as some are secrets.
options:
  files:
    description: The files, in the order in which they are written.
    type: list
    elements: dict
    required: true
    suboptions:
      dest: {description: Where it is., type: path, required: true}
      content: {description: What it holds., type: str, required: true}
      owner: {description: Whose it is., type: str, default: root}
      group: {description: The group that it belongs to., type: str, default: root}
      mode: {description: Its permissions., type: str, default: "0644"}
      validate:
        description: A command that ends well for good content, with C(%s) for the file to look at.
        type: str
"""

EXAMPLES = """
- name: Write the firewall and its unit
  write_files:
    files:
      - dest: /etc/fruits/firewall.nft
        content: "{{ lookup('ansible.builtin.template', 'firewall.nft.j2') }}"
        validate: /usr/sbin/nft --check --file %s
"""

RETURN = """
written:
  description: The files whose content, owner or permissions were changed.
  type: list
  elements: str
  returned: always
"""

import os
import shlex
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

FILE = {
    "dest": {"type": "path", "required": True},
    "content": {"type": "str", "required": True, "no_log": True},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "mode": {"type": "str", "default": "0644"},
    "validate": {"type": "str"},
}


class Module(AnsibleModule):
    """A module that keeps what it was called with out of the journal."""

    def _log_invocation(self) -> None:
        """Write nothing: contents in a list are not hidden there."""


def differs(file: Path, content: str) -> bool:
    """Tell whether a file holds anything else than a text."""
    try:
        return file.read_bytes() != content.encode()
    except FileNotFoundError:
        return True


def new_file(module: AnsibleModule, one: dict) -> str:
    """Write a content where only root may read it, and have it validated; return its path."""
    number, name = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(number, "w") as new:
        new.write(one["content"])
    if one["validate"]:
        command = [word.replace("%s", name) for word in shlex.split(one["validate"])]
        status, _, errors = module.run_command(command)
        if status != 0:
            module.fail_json(msg=f"the new content of {one['dest']} is not valid: {errors.strip()}")
    return name


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that everyone may read whatever the umask is."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir()
        folder.chmod(0o755)


def attributes(one: dict) -> dict:
    """Return the owner and permissions of a file as Ansible's own modules hand them on."""
    none = dict.fromkeys(("seuser", "serole", "setype", "selevel", "secontext", "attributes"))
    kept = {name: one[name] for name in ("owner", "group", "mode")}
    return {"path": one["dest"], **kept, **none}


def main() -> None:
    """Write what differs, and give each file its owner and permissions."""
    module = Module(
        {"files": {"type": "list", "elements": "dict", "required": True, "options": FILE}},
        supports_check_mode=True,
    )
    files = module.params["files"]
    new = {
        one["dest"]: new_file(module, one)
        for one in files
        if differs(Path(one["dest"]), one["content"])
    }
    written = []
    for one in files:
        dest, is_new = Path(one["dest"]), one["dest"] in new
        if is_new and not module.check_mode:
            make_folder(dest.parent)
            module.atomic_move(new[one["dest"]], one["dest"])
        is_missing = not dest.exists()  # in a check
        if is_missing or module.set_fs_attributes_if_different(attributes(one), is_new):
            written.append(one["dest"])
    module.exit_json(changed=bool(written), written=written)


if __name__ == "__main__":
    main()
