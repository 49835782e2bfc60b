"""Takes from a photo what tells of people and places, and leaves its pixels as they are.

Places (GPS), times, cameras, names, comments, previews and a second picture behind the first go;
how to turn it and its colour profile stay. Nothing is decoded: the picture's own bytes are copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from PIL import Image

ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = range(1, 9)
# JPEG (ITU-T T.81, annex B): markers without content, and those that begin and end a picture.
_BARE = {0x01, *range(0xD0, 0xD9)}
_SOI, _SOS, _EOI, _COMMENT = 0xD8, 0xDA, 0xD9, 0xFE
_next_marker = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])").search
_PROFILE = b"ICC_PROFILE\0"
# PNG 3rd edition, 11.3: texts, EXIF, the time of the last change.
_PNG_TELLS = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"}
# WebP container: the flags of VP8X that say which of these chunks follow.
_WEBP_TELLS = {b"EXIF": 0x08, b"XMP ": 0x04}


def without_metadata(content: bytes) -> bytes | None:
    """Return a file's bytes without its metadata.

    Returns
    -------
    bytes or None
        None for a file that this cannot be done to: another format than JPEG, PNG, WebP, GIF and
        BMP, or one that is damaged.
    """
    for beginning, strip in _FORMATS.items():
        if re.match(beginning, content, re.DOTALL):
            try:
                return strip(content)
            except (ValueError, IndexError, SyntaxError):
                return None
    return None


def _exif(orientation: int) -> bytes:
    """Return EXIF that tells how to turn a photo, and no more; empty for one that is upright."""
    if orientation not in UPRIGHT or orientation == 1:
        return b""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def _orientation_in(exif: bytes) -> int:
    found = Image.Exif()
    try:
        found.load(exif)
        return int(found.get(ORIENTATION, 1))
    except Exception:  # Pillow has many for EXIF that is none, which turns nothing
        return 1


def _jpeg(content: bytes) -> bytes:
    orientation, kept = 1, bytearray()
    for marker, segment in _segments(content):
        body = segment[4:]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation_in(body)
        if _stays(marker, body):
            kept += segment
    exif = _exif(orientation)
    told = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif if exif else b""
    return b"\xff\xd8" + told + bytes(kept)


def _stays(marker: int, body: bytes) -> bool:
    if marker == 0xE2:
        return body.startswith(_PROFILE)
    is_of_the_picture = marker in (0xE0, 0xEE)  # JFIF; Adobe, which tells how colours are kept
    return is_of_the_picture or not (0xE0 <= marker <= 0xEF or marker == _COMMENT)


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield markers and their bytes up to the first picture's end; a scan goes with its marker."""
    place = 2
    while place < len(content):
        if content[place] != 0xFF:
            raise ValueError("expected a marker")
        while content[place] == 0xFF:
            place += 1
        marker = content[place]
        start, place = place - 1, place + 1
        if marker == _EOI:
            yield marker, b"\xff\xd9"
            return
        if marker in _BARE:
            yield marker, content[start:place]
            continue
        place += int.from_bytes(content[place : place + 2], "big")
        if marker == _SOS:
            found = _next_marker(content, place)
            place = found.start() if found else len(content)
        yield marker, content[start:place]


def _png(content: bytes) -> bytes:
    place, orientation = 8, 1
    head, rest = content[:8], bytearray()
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if kind == b"IHDR":
            head += content[place:end]
        elif kind not in _PNG_TELLS:
            rest += content[place:end]
        elif kind == b"eXIf":
            orientation = _orientation_in(b"Exif\0\0" + content[place + 8 : end - 4])
        place = end
        if kind == b"IEND":
            break
    exif = _exif(orientation).removeprefix(b"Exif\0\0")
    return head + (_png_chunk(b"eXIf", exif) if exif else b"") + bytes(rest)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    from zlib import crc32

    return len(body).to_bytes(4, "big") + kind + body + crc32(kind + body).to_bytes(4, "big")


def _webp(content: bytes) -> bytes:
    place, orientation, chunks = 12, 1, list[tuple[bytes, bytes]]()
    end = min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while place + 8 <= end:
        kind, length = content[place : place + 4], content[place + 4 : place + 8]
        body = content[place + 8 : place + 8 + int.from_bytes(length, "little")]
        if kind == b"EXIF":
            orientation = _orientation_in(body)
        if kind not in _WEBP_TELLS:
            chunks.append((kind, body))
        place += 8 + len(body) + len(body) % 2
    exif = _exif(orientation)
    if exif:
        chunks.append((b"EXIF", exif.removeprefix(b"Exif\0\0")))
    if chunks and chunks[0][0] == b"VP8X":
        flags = chunks[0][1][0] & ~sum(_WEBP_TELLS.values()) | (_WEBP_TELLS[b"EXIF"] if exif else 0)
        chunks[0] = (b"VP8X", bytes([flags]) + chunks[0][1][1:])
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
        is_comment = kind == b"!\xfe" or (
            kind == b"!\xff" and b"XMP" in content[start : start + 14]
        )
        if not is_comment:
            kept += content[start:place]
    return bytes(kept) + b";"


_FORMATS: dict[bytes, Callable[[bytes], bytes]] = {
    rb"\xff\xd8\xff": _jpeg,
    rb"\x89PNG\r\n\x1a\n": _png,
    rb"RIFF....WEBP": _webp,
    rb"GIF8[79]a": _gif,
    rb"BM": lambda content: content,  # has nowhere to tell anything
}
