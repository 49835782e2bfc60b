"""A checkout to which others may write, as on WSL: Ansible leaves its configuration unread."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT


def test_an_admin_is_told_why_the_inventory_is_not_found(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "ansible", tmp_path / "ansible")
    shutil.copy(PROJECT / "ansible.cfg", tmp_path)
    tmp_path.chmod(0o777)
    play = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "ansible/configure.yml"],
        cwd=tmp_path,
        env={"PATH": str(Path(sys.executable).parent), "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
    )
    assert play.returncode != 0
    said = re.sub(r"\s+", " ", play.stdout)
    assert "ansible.cfg, which names the inventory, was not read" in said
    assert 'export ANSIBLE_CONFIG="$PWD/ansible.cfg"' in said
