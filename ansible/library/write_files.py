#!/usr/bin/python
"""Writes several files of a host in one step: `template` and `copy` take a few for each file."""

from __future__ import annotations

DOCUMENTATION = """
module: write_files
short_description: Writes several text files in one step
description:
  - All contents are validated before the first file is written, and each file is replaced at once.
  - A folder that is missing is made, for everyone to read. Contents are never shown, as some are secrets.
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

from ansible.module_utils.basic import AnsibleModule

FILE = {
    "dest": {"type": "path", "required": True},
    "content": {"type": "str", "required": True, "no_log": True},
    "owner": {"type": "str", "default": "root"},
    "group": {"type": "str", "default": "root"},
    "mode": {"type": "str", "default": "0644"},
    "validate": {"type": "str"},
}


def differs(dest, content):
    """Tell whether a file holds anything else than a text."""
    try:
        with open(dest, "rb") as found:
            return found.read() != content.encode()
    except FileNotFoundError:
        return True


def new_file(module, one):
    """Write a content beside its place, readable by root only, and have it validated."""
    number, name = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(number, "w") as new:
        new.write(one["content"])
    if one["validate"]:
        command = [word.replace("%s", name) for word in shlex.split(one["validate"])]
        status, _, errors = module.run_command(command)
        if status != 0:
            module.fail_json(msg=f"the new content of {one['dest']} is not valid: {errors.strip()}")
    return name


def make_folder(folder):
    """Make a folder, and those above it, that everyone may read whatever the umask is."""
    if not os.path.isdir(folder):
        make_folder(os.path.dirname(folder))
        os.mkdir(folder)
        os.chmod(folder, 0o755)


def main():
    """Write what differs, and give each file its owner and permissions."""
    module = AnsibleModule(
        {"files": {"type": "list", "elements": "dict", "required": True, "options": FILE}},
        supports_check_mode=True,
    )
    files = module.params["files"]
    new = {one["dest"]: new_file(module, one) for one in files if differs(one["dest"], one["content"])}
    changed = []
    for one in files:
        is_new = one["dest"] in new
        if is_new and not module.check_mode:
            make_folder(os.path.dirname(one["dest"]))
            module.atomic_move(new[one["dest"]], one["dest"])
        attributes = {
            "path": one["dest"], "owner": one["owner"], "group": one["group"], "mode": one["mode"],
            "seuser": None, "serole": None, "setype": None, "selevel": None, "secontext": None,
            "attributes": None,
        }  # fmt: skip
        if module.check_mode and not os.path.exists(one["dest"]):
            changed.append(one["dest"])
        elif module.set_fs_attributes_if_different(attributes, is_new):
            changed.append(one["dest"])
    module.exit_json(changed=bool(changed), written=changed)


if __name__ == "__main__":
    main()
