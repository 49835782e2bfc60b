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
  src: {description: "Unpacks this file of the controller, in place of O(file).", type: path}
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
import shutil
import subprocess
from pathlib import Path
from typing import BinaryIO

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

CHUNK = 1 << 20  # bytes


def copy(source: BinaryIO, target: BinaryIO) -> str:
    """Copy a stream to another, and return the sha256 of what went by."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def pack(module: AnsibleModule, folder: Path, file: Path) -> str:
    """Pack a folder; return the file's sha256."""
    part = file.with_name(f"{file.name}.part")
    tar = ["tar", "--create", "--owner=0", "--group=0", "--numeric-owner", "--sort=name", "."]
    zstd = ["zstd", "-3", "-T0", "--quiet"]
    with (
        subprocess.Popen(tar, cwd=folder, stdout=subprocess.PIPE) as reads,
        subprocess.Popen(zstd, stdin=reads.stdout, stdout=subprocess.PIPE) as packs,
        part.open("wb") as made,
    ):
        digest = copy(packs.stdout, made)
    if reads.returncode or packs.returncode:
        part.unlink()
        module.fail_json(msg=f"expected to pack {folder} into {file}, tar or zstd failed")
    part.replace(file)
    return digest


def unpack(module: AnsibleModule, source: BinaryIO, folder: Path, expected: str) -> None:
    """Make a folder of a packed stream that has the expected sha256."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    command = ["tar", "--extract", "--zstd", "--preserve-permissions"]
    with subprocess.Popen(command, cwd=part, stdin=subprocess.PIPE) as tar:
        try:
            found = copy(source, tar.stdin)
        except BrokenPipeError:  # tar has said why
            found = "of something that is not packed"
    if tar.returncode or found != expected:
        shutil.rmtree(part)
        module.fail_json(
            msg=f"expected a packed folder with sha256 {expected}, found {found}. Remove it from "
            "the cache of packs (cluster_packs) and run again: another is made."
        )
    part.replace(folder)


def main() -> None:
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
    folder, sha256 = Path(module.params["folder"]), module.params["sha256"]
    file, url = module.params["file"], module.params["url"]
    if sha256 and folder.is_dir():
        module.exit_json(changed=False, sha256=sha256)
    if module.check_mode:
        module.exit_json(changed=True, sha256=sha256)
    if not sha256:
        module.exit_json(changed=True, sha256=pack(module, folder, Path(file)))
    with Path(file).open("rb") if file else open_url(url, timeout=60) as source:
        unpack(module, source, folder, sha256)
    module.exit_json(changed=True, sha256=sha256)


if __name__ == "__main__":
    main()
