"""Configured clusters, kept to be cloned in seconds: one for each content of what makes it.

    python -m tests.hosts.snapshots    remove them, the packed environments and the base images

What is kept lies in the user's cache: the upper layers of the disks of hosts that were shut down in
good order, which a clone has as lower ones, and what the admin's machine knows of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.hosts.commands import say
from tests.hosts.image import CACHE, IMAGES, remove_images

SNAPSHOTS = CACHE / "clusters"
PACKS = CACHE / "packs"  # of environments: cluster_packs in roles/cluster/defaults
REPOSITORY = Path(__file__).parents[2]
_SOURCES = ("ansible", "pipeline", "notebooks/fruits.ipynb", "ansible.cfg", "pyproject.toml")


def place(tag: str, image: Path, settings: Mapping[str, object]) -> Path:
    """Return where the snapshot of these inputs is, or would be.

    Parameters
    ----------
    tag
        Of the hosts: a snapshot has their addresses in it.
    image
        What their disks begin with.
    settings
        All that the playbooks are told, but for the keys that are made up anew.
    """
    digest = hashlib.sha256(json.dumps([image.name, settings], sort_keys=True).encode())
    for file in _sources():
        digest.update(f"{file.relative_to(REPOSITORY)}\0".encode() + file.read_bytes())
    return SNAPSHOTS / f"{tag}-{digest.hexdigest()[:12]}"


def _sources() -> Iterable[Path]:
    found = [*REPOSITORY.glob("*.lock")]
    for name in _SOURCES:
        path = REPOSITORY / name
        found += [path] if path.is_file() else path.rglob("*")
    return sorted(file for file in found if file.is_file() and "__pycache__" not in file.parts)


@contextmanager
def new(snapshot: Path) -> Iterator[Path]:
    """Yield a folder that becomes the snapshot, in place of others of its tag, if all went well."""
    SNAPSHOTS.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = Path(tempfile.mkdtemp(dir=SNAPSHOTS, prefix=".part-"))
    try:
        yield part
        part.rename(snapshot)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    tag = snapshot.name.rpartition("-")[0]
    _remove(older for older in SNAPSHOTS.glob(f"{tag}-*") if older != snapshot)


def _remove(snapshots: Iterable[Path]) -> None:
    """Remove snapshots, but for those that running hosts stand on."""
    used = _lower_layers()
    for snapshot in snapshots:
        if not any(layer.startswith(f"{snapshot}/") for layer in used):
            shutil.rmtree(snapshot)


def _lower_layers() -> set[str]:
    """Return the lower layers of every overlay that any process sees."""
    found = set[str]()
    for file in Path("/proc").glob("[0-9]*/mountinfo"):
        with suppress(OSError):
            for layers in re.findall(r"lowerdir=([^,\s]+)", file.read_text()):
                found |= set(layers.split(":"))
    return found


def clean() -> None:
    """Remove all that is kept between runs and that no running host stands on."""
    if SNAPSHOTS.is_dir():
        _remove(SNAPSHOTS.iterdir())
    shutil.rmtree(PACKS, ignore_errors=True)
    used = _lower_layers()
    if IMAGES.is_dir() and not any(layer.startswith(f"{IMAGES}/") for layer in used):
        remove_images(IMAGES)
    say(f"what was kept of hosts in {CACHE} is removed, but for what running ones stand on")


if __name__ == "__main__":
    clean()
