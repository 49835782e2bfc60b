#!/usr/bin/python
"""Packs a folder into one file, or makes a folder of such a file: whole, or not at all."""

from __future__ import annotations

DOCUMENTATION = """
module: pack
short_description: Packs a folder, or unpacks it under the same path on another host
description:
  - Packing tells the sha256 of the file that it makes.
  - Unpacking reads the file once, from a path or an address, and gives the folder its name only
    when the whole file has arrived with the expected sha256. A folder that is there is left alone.
options:
  folder: {description: The folder that is packed or made., type: path, required: true}
  file: {description: The packed file on this host., type: path}
  url: {description: Where to read the packed file from, in place of O(file)., type: str}
  sha256: {description: Unpacks; what the packed file must have., type: str}
"""

EXAMPLES = """
- name: Pack the environment
  pack:
    folder: /opt/fruits/environments/1234
    file: /opt/fruits/packs/1234.tar.zst
"""

RETURN = """
sha256: {description: Of the packed file., type: str, returned: always}
"""

import hashlib
import os
import shutil
import subprocess

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

CHUNK = 1 << 20  # bytes


def copy(source, target):
    """Copy a stream to another, and return the sha256 of what went by."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def pack(module, folder, file):
    """Pack a folder; return the file's sha256."""
    part = f"{file}.part"
    # Numbers of root for all: names and times of a build do not make another file of the same.
    command = ["tar", "--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "."]
    with subprocess.Popen([*command], cwd=folder, stdout=subprocess.PIPE) as tar:
        with open(part, "wb") as made, subprocess.Popen(
            ["zstd", "-3", "-T0", "--quiet"], stdin=tar.stdout, stdout=subprocess.PIPE
        ) as zstd:
            digest = copy(zstd.stdout, made)
    if tar.returncode or zstd.returncode:
        os.unlink(part)
        module.fail_json(msg=f"expected to pack {folder} into {file}, tar or zstd failed")
    os.replace(part, file)
    return digest


def unpack(module, source, folder, expected):
    """Make a folder of a packed stream that has the expected sha256."""
    part = f"{folder}.part"
    shutil.rmtree(part, ignore_errors=True)
    os.mkdir(part, 0o755)
    tar = subprocess.Popen(["tar", "--extract", "--zstd"], cwd=part, stdin=subprocess.PIPE)
    try:
        found = copy(source, tar.stdin)
        tar.stdin.close()
    except BrokenPipeError:  # tar has said why
        found = "another"
    if tar.wait() or found != expected:
        shutil.rmtree(part)
        module.fail_json(
            msg=f"expected a packed folder with sha256 {expected}, found {found}. Remove it from "
            "the cache of packs; the next run makes another."
        )
    os.replace(part, folder)


def main():
    """Pack or unpack, as the options say."""
    module = AnsibleModule(
        {
            "folder": {"type": "path", "required": True},
            "file": {"type": "path"},
            "url": {"type": "str", "no_log": True},
            "sha256": {"type": "str"},
        },
        mutually_exclusive=[("file", "url")],
        required_one_of=[("file", "url")],
        supports_check_mode=True,
    )
    folder, file, sha256 = (module.params[name] for name in ("folder", "file", "sha256"))
    if sha256 and os.path.isdir(folder):
        module.exit_json(changed=False, sha256=sha256)
    if module.check_mode:
        module.exit_json(changed=True, sha256=sha256)
    if not sha256:
        module.exit_json(changed=True, sha256=pack(module, folder, file))
    with open(file, "rb") if file else open_url(module.params["url"], timeout=60) as source:
        unpack(module, source, folder, sha256)
    module.exit_json(changed=True, sha256=sha256)


if __name__ == "__main__":
    main()
