"""What a file is, told by its first bytes; and a PNG without what is not its picture."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# As Pillow names them; HEIF is what iPhones' HEIC is one of.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")

_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"PK\x03\x04": "a zip archive",
    b"\0\0\1\0": "an icon",
    b"icns": "an icon",
    b"II\xbc\1": "JPEG XR",
    b"DDS ": "DDS",
    b"v/1\1": "OpenEXR",
    b"FUJIFILMCCD-RAW": "a camera's raw file",
    b"IIU\0": "a camera's raw file",
    b"IIRO": "a camera's raw file",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"%!PS": "PostScript",
    **dict.fromkeys((b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n"), "PNM"),
    b"\x1f\x8b": "a gzip archive",
}
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"isom", b"mp41", b"mp42", b"qt  ", b"M4V "), "a video"),
    b"crx ": "a camera's raw file",
}
# JPEG (ITU-T T.81, annex B): markers without content, and those that begin a scan and end it all.
_BARE = {0x01, *range(0xD0, 0xD9)}
_SOS, _EOI = 0xDA, 0xD9
_next_marker = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])").search
LARGE_CHUNK = 64 << 10  # bytes of text
LARGE_PROFILE = 1 << 20  # bytes of colours' profile, unpacked: Pillow refuses a PNG with more


def recognised(content: bytes) -> str | None:
    """Name the format that the first bytes are those of, None if none is known."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        return _BRANDS.get(content[8:12], "a video")
    for beginning, name in _BEGINNINGS.items():
        if content.startswith(beginning):
            return name
    start = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if (
        start.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype"))
        and b"<svg" in content[:1024].lower()
    ):
        return "SVG"
    return None


def without_large_texts(content: bytes) -> bytes:
    """Leave large profiles and texts out of a PNG, which Pillow refuses a picture for."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    place, kept, start = 8, [], 0
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        kind, end = content[place + 4 : place + 8], place + 12 + length
        if kind == b"IDAT":
            break
        if _is_left_out(kind, content[place + 8 : min(end, place + 8 + LARGE_CHUNK)], length):
            kept.append(content[start:place])
            start = end
        place = end
    return b"".join([*kept, content[start:]]) if start else content


def _is_left_out(kind: bytes, beginning: bytes, length: int) -> bool:
    """Tell what may be larger than it looks, or is; small texts stay: XMP says what is up."""
    if kind == b"iCCP":
        return length > LARGE_CHUNK or _unpacks_to_much(beginning.partition(b"\0")[2][1:])
    if kind == b"iTXt":
        _, _, flags = beginning.partition(b"\0")
        return length > LARGE_CHUNK or flags[:1] == b"\1"
    return kind == b"zTXt" or (kind == b"tEXt" and length > LARGE_CHUNK)


def _unpacks_to_much(packed: bytes) -> bool:
    """Tell whether a stream is large once it is unpacked, or none."""
    try:
        return len(zlib.decompressobj().decompress(packed, LARGE_PROFILE)) >= LARGE_PROFILE
    except zlib.error:
        return True


def jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
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


def cut_off(content: bytes) -> str | None:
    """Say what is missing of a HEIC or an AVIF: boxes tell their lengths (ISO/IEC 14496-12)."""
    place = 0
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if length == 1:
            length = int.from_bytes(content[place + 8 : place + 16], "big")
        if length < 8:
            return None  # to the end of the file, or no box
        place += length
    return f"cut off: {len(content):,} of {place:,} bytes" if place > len(content) else None
