"""Takes from a photo what tells of people and places, and leaves its pixels as they are.

Of each format, what the picture is made of stays, with its colour profile and how to turn it; all
else goes, known or not: places (GPS), times, cameras, names, comments, previews, a second picture
behind the first. Nothing is decoded: the picture's own bytes are copied.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Container
from io import BytesIO
from zlib import crc32

from PIL import Image

from pipeline.networks.formats import jpeg_segments

ORIENTATION = 0x0112  # EXIF's tag
# JPEG (ITU-T T.81, annex B): frames, tables, restarts; no application's own segments but these.
_OF_JPEG = {*range(0xC0, 0xE0), 0x01}
_PROFILE, _ADOBE = b"ICC_PROFILE\0", b"Adobe"
# PNG, third edition, clauses 5.6 and 11: what tells of pixels, colours and frames.
_OF_PNG = {
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB"),
    *(b"cICP", b"mDCV", b"cLLI", b"bKGD", b"hIST", b"pHYs", b"acTL", b"fcTL", b"fdAT"),
}
_OF_PIXELS = {b"PLTE", b"IDAT", b"IEND", b"tRNS"}
# WebP container specification; the flags of VP8X that say that EXIF and XMP follow.
_OF_WEBP = {b"VP8X", b"ICCP", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"}
_TOLD_BY_FLAGS, _EXIF_FLAG = 0x08 | 0x04, 0x08
# GIF89a: how long a frame is shown, how often all of them are.
_OF_GIF = (b"NETSCAPE2.0", b"ANIMEXTS1.0")


def without_metadata(content: bytes) -> bytes | None:
    """Return a file's bytes without its metadata.

    Returns
    -------
    bytes or None
        None for a file that this cannot be done to: another format than JPEG, PNG, WebP and GIF,
        or one that is damaged.
    """
    for beginning, strip in _FORMATS.items():
        if re.match(beginning, content, re.DOTALL):
            try:
                return strip(content)
            except (ValueError, IndexError, SyntaxError):
                return None
    return None


def _orientation_of(content: bytes) -> int:
    """Return how a photo is turned, wherever that is told: as who decodes it reads it."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content)) as image:
            told = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow has many for EXIF that is none, which turns nothing
        return 1
    return told if told in range(1, 9) else 1


def _exif_of(content: bytes) -> bytes:
    """Return EXIF that tells how to turn a photo, and no more; empty for one that is upright."""
    orientation = _orientation_of(content)
    if orientation == 1:
        return b""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def _jpeg(content: bytes) -> bytes:
    kept = b"".join(_kept(marker, segment) for marker, segment in jpeg_segments(content))
    exif = _exif_of(content)
    told = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif if exif else b""
    return b"\xff\xd8" + told + kept


def _kept(marker: int, segment: bytes) -> bytes:
    body = segment[4:]
    if len(body) < 12 and 0xE0 <= marker <= 0xEF:
        return b""
    if marker == 0xE0 and body.startswith(b"JFIF\0"):  # without its preview
        return b"\xff\xe0\0\x10" + body[:12] + b"\0\0"
    if marker == 0xE2 and body.startswith(_PROFILE) and len(body) > len(_PROFILE) + 2:
        return segment
    if marker == 0xEE and body.startswith(_ADOBE):  # how its colours are kept
        return b"\xff\xee\0\x0e" + body[:12]
    return segment if marker in _OF_JPEG else b""


def bare(content: bytes) -> bytes | None:
    """Return a JPEG or a PNG with nothing in it but what makes its pixels; None for others."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(content, _OF_PIXELS)
    return without_metadata(content) if content.startswith(b"\xff\xd8\xff") else None


def _png(content: bytes, kinds: Container[bytes] = _OF_PNG) -> bytes:
    place, head, rest = 8, content[:8], bytearray()
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if kind == b"IHDR":
            head += content[place:end]
        elif kind in kinds:
            rest += content[place:end]
        place = end
        if kind == b"IEND":
            break
    exif = _exif_of(content).removeprefix(b"Exif\0\0")
    return head + (_png_chunk(b"eXIf", exif) if exif else b"") + bytes(rest)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + crc32(kind + body).to_bytes(4, "big")


def _webp(content: bytes) -> bytes:
    place, chunks = 12, list[tuple[bytes, bytes]]()
    end = min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while place + 8 <= end:
        kind, length = content[place : place + 4], content[place + 4 : place + 8]
        body = content[place + 8 : place + 8 + int.from_bytes(length, "little")]
        if kind in _OF_WEBP:
            chunks.append((kind, body))
        place += 8 + len(body) + len(body) % 2
    if not any(kind in (b"VP8 ", b"VP8L", b"ANMF") for kind, _ in chunks):
        raise ValueError("expected a picture")
    exif = _exif_of(content)
    if chunks[0][0] == b"VP8X":
        flags = chunks[0][1][0] & ~_TOLD_BY_FLAGS | (_EXIF_FLAG if exif else 0)
        chunks[0] = (b"VP8X", bytes([flags]) + chunks[0][1][1:])
        if exif:
            chunks.append((b"EXIF", exif.removeprefix(b"Exif\0\0")))
    told = b"".join(
        kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)
        for kind, body in chunks
    )
    return b"RIFF" + (4 + len(told)).to_bytes(4, "little") + b"WEBP" + told


def _gif(content: bytes) -> bytes:
    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    place = 13 + table(content[10])
    kept = bytearray(content[:place])
    while content[place] != 0x3B:  # the trailer
        start, kind = place, content[place : place + 2]
        if kind[:1] == b",":  # a picture
            place += 10 + table(content[place + 9]) + 1
        elif kind[:1] == b"!":  # an extension
            place += 2
        else:
            raise ValueError("expected a block of a GIF")
        while content[place]:
            place += 1 + content[place]
        place += 1
        is_of_frames = kind == b"!\xff" and content[start + 3 : start + 14] in _OF_GIF
        if kind[:1] == b"," or kind == b"!\xf9" or is_of_frames:
            kept += content[start:place]
    return bytes(kept) + b";"


_FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\xff\xd8\xff": _jpeg,
    rb"\x89PNG\r\n\x1a\n": _png,
    rb"RIFF....WEBP": _webp,
    rb"GIF8[79]a": _gif,
}
