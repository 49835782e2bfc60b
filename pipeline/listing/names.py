"""Which names may be images: what is inside decides later; what is something else is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

# What photos are called, by cameras, phones, browsers and archives. Their content decides.
ENDINGS = {
    *("jpg", "jpeg", "jpe", "jif", "jfif", "jfi", "pjpeg", "pjp", "mpo", "png", "apng", "webp"),
    *("bmp", "dib", "gif", "tif", "tiff", "avif", "avifs", "heic", "heics", "heif", "hif", "jxl"),
    *("jp2", "jpx", "j2k"),
}
# `photo.jpg_large`, `photo.jpg~`, `photo.jpg?w=640`, `photo.jpg!d`
_MORE_THAN_AN_ENDING = re.compile(rf"\.({'|'.join(sorted(ENDINGS))})([^a-z0-9./][^/]*|\.\d+)$")
_KNOWN = {"license", "licence", "readme", "makefile", "copying", "notice", "authors"}
MOST_KINDS = 50


def kind_of(key: str) -> str | None:
    """Name the kind of a file that is no image by its name; None where it may be one."""
    name = key.rpartition("/")[2]
    if name.startswith("._") or "__MACOSX/" in key:
        return "a Mac's own"
    if name.endswith(":Zone.Identifier"):
        return "Windows' own"
    plain = name.strip().rstrip(".").lower()
    if _MORE_THAN_AN_ENDING.search(plain):
        return None
    _, dot, ending = plain.lstrip(".").rpartition(".")
    if dot:
        return None if ending in ENDINGS else f".{ending}"[:12]
    is_known = plain in _KNOWN or plain.startswith((".", "_"))
    return "without an ending" if is_known else None


def told_of(kinds: Mapping[str, int], most: int = 5) -> str:
    """Say what was left out: `12 .txt, 3 .db`."""
    told = [f"{number:,} {kind}" for kind, number in list(kinds.items())[:most]]
    more = sum(list(kinds.values())[most:])
    return ", ".join([*told, f"{more:,} others"] if more else told)


class LeftOut:
    """What lies beside the images, by kind and number."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def add(self, kind: str) -> None:
        """Count a file; of very many kinds the later ones are not told apart."""
        is_told = kind in self.kinds or len(self.kinds) < MOST_KINDS
        self.kinds[kind if is_told else "of other kinds"] += 1

    def told(self) -> dict[str, int]:
        """Return the kinds, the most frequent first."""
        return dict(self.kinds.most_common())
