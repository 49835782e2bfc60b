"""Files written bit by bit, in kinds that cameras, scanners and old programs write: the right
colours come out, or a reason. What is right is known here without any decoder."""

from __future__ import annotations

import struct
import zlib
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError

SIDE = 16
Codes = npt.NDArray[np.int64]
NEAR = 6  # of 255: what few bits can say


def colours(of: int) -> Codes:
    """Return codes from 0 to 255: a slope for each of so many colours."""
    slope = np.linspace(0, 255, SIDE).round().astype(int)
    planes = [
        np.broadcast_to(slope, (SIDE, SIDE)),
        np.broadcast_to(slope[::-1], (SIDE, SIDE)),
        np.broadcast_to(slope[:, None], (SIDE, SIDE)),
    ]
    return np.stack(planes[:of], axis=2)


def packed(values: Codes, bits: int, order: str = ">") -> bytes:
    """Write rows of values with so many bits each, every row from a new byte on."""
    rows = values.reshape(SIDE, -1)
    if bits == 16:
        return rows.astype(f"{order}u2").tobytes()
    shifts = np.arange(bits)[::-1]
    return np.packbits((rows[:, :, None] >> shifts & 1).reshape(SIDE, -1), axis=1).tobytes()


def scaled(codes: Codes, bits: int) -> Codes:
    return (codes * (2**bits - 1) / 255).round().astype(int)


def shades(bits: int) -> Codes:
    """Return a palette in which no colour stands where a grey of its number would."""
    number = np.arange(2**bits)
    return np.stack(
        [(number * 37 + 11) % 256, (number * 101 + 3) % 256, (number * 59) % 256], axis=1
    )


def numbers(bits: int) -> Codes:
    return np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 2**bits


def shown(content: bytes) -> Codes:
    return decode(content, SIDE).astype(int)


def rgb(codes: Codes) -> Codes:
    return np.broadcast_to(codes, (SIDE, SIDE, 3)) if codes.shape[2] == 1 else codes[:, :, :3]


# --- PNG -------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body)) + name + body + check


def png(kind: int, bits: int, rows: bytes, palette: Codes | None = None) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, bits, kind, 0, 0, 0))
    table = b"" if palette is None else chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + table + body


def png_rows(values: Codes, bits: int) -> bytes:
    line = len(packed(values, bits)) // SIDE
    whole = packed(values, bits)
    return b"".join(b"\0" + whole[row * line : (row + 1) * line] for row in range(SIDE))


GREY, RGB, PALETTE, GREY_A, RGBA = 0, 2, 3, 4, 6


@pytest.mark.parametrize(
    ("kind", "bits"),
    [*product([GREY], [1, 2, 4, 8, 16]), *product([RGB, GREY_A, RGBA], [8, 16])],
)
def test_png_of_any_depth(kind: int, bits: int) -> None:
    codes = colours(1 if kind in (GREY, GREY_A) else 3)
    values = scaled(codes, bits)
    seen = (values * 255 / (2**bits - 1)).round().astype(int)
    if kind in (GREY_A, RGBA):
        alpha = scaled(colours(3)[:, :, 2:], bits)
        share = alpha / (2**bits - 1)
        values = np.concatenate([values, alpha], axis=2)
        seen = (seen * share + 255 * (1 - share)).round().astype(int)
    assert np.abs(shown(png(kind, bits, png_rows(values, bits))) - rgb(seen)).max() <= NEAR


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_with_a_palette(bits: int) -> None:
    content = png(PALETTE, bits, png_rows(numbers(bits), bits), palette=shades(bits))
    assert (shown(content) == shades(bits)[numbers(bits)]).all()


# --- TIFF ------------------------------------------------------------------------------------

WHITE_IS_0, BLACK_IS_0, TIFF_RGB, TIFF_PALETTE, CMYK = 0, 1, 2, 3, 5


def tiff(
    photometric: int, bits: int, values: Codes, *, order: str = "<", planar: bool = False,
    palette: Codes | None = None,
) -> bytes:  # fmt: skip
    bands = values.shape[2]
    planes = [values[:, :, band] for band in range(bands)] if planar else [values]
    strips = [packed(plane, bits, order) for plane in planes]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [SIDE]), 257: (4, [SIDE]), 258: (3, [bits] * bands), 259: (3, [1]),
        262: (3, [photometric]), 273: (4, [0] * len(strips)), 277: (3, [bands]),
        278: (4, [SIDE]), 279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if planar else 1]),
    }  # fmt: skip
    if palette is not None:
        tags[320] = (3, list((palette * 257).T.ravel()))
    place = 8 + 2 + 12 * len(tags) + 4
    sizes = {3: ("H", 2), 4: ("I", 4)}
    outside = sum(len(v) * sizes[k][1] for k, v in tags.values() if len(v) * sizes[k][1] > 4)
    starts = place + outside
    tags[273] = (4, [starts + sum(map(len, strips[:number])) for number in range(len(strips))])
    entries, extra = b"", b""
    for tag, (kind, content) in sorted(tags.items()):
        letter, _ = sizes[kind]
        body = struct.pack(f"{order}{len(content)}{letter}", *content)
        entries += struct.pack(f"{order}HHI", tag, kind, len(content))
        if len(body) <= 4:
            entries += body + bytes(4 - len(body))
        else:
            entries += struct.pack(f"{order}I", place + len(extra))
            extra += body
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + extra + b"".join(strips)


@pytest.mark.parametrize(
    ("photometric", "bits", "order", "planar"),
    [
        *product([WHITE_IS_0, BLACK_IS_0], [1, 2, 4, 8, 16], "<>", [False]),
        *product([TIFF_RGB], [8, 16], "<>", [False, True]),
        *product([CMYK], [8, 16], "<>", [False, True]),
    ],
)
def test_tiff_has_its_colours_or_a_reason(
    photometric: int, bits: int, order: str, planar: bool
) -> None:
    codes = colours(1 if photometric in (WHITE_IS_0, BLACK_IS_0) else 3)
    values = scaled(codes, bits)
    seen = (values * 255 / (2**bits - 1)).round().astype(int)
    if photometric == CMYK:  # without black
        values = np.concatenate([2**bits - 1 - values, np.zeros_like(values[:, :, :1])], axis=2)
    if photometric == WHITE_IS_0:
        values = 2**bits - 1 - values
    content = tiff(photometric, bits, values, order=order, planar=planar)
    try:
        found = shown(content)
    except BadImageError as refused:
        assert bits == 16, refused
        told = ("unsupported: TIFF", "damaged: TIFF: its header cannot be read, or it is of a rare")
        assert str(refused).startswith(told), refused
        return
    assert np.abs(found - rgb(seen)).max() <= NEAR


@pytest.mark.parametrize(("bits", "order"), product([1, 2, 4, 8], "<>"))
def test_tiff_with_a_palette_has_its_colours_or_a_reason(bits: int, order: str) -> None:
    values = numbers(bits)[:, :, None]
    content = tiff(TIFF_PALETTE, bits, values, order=order, palette=shades(bits))
    try:
        found = shown(content)
    except BadImageError as refused:
        assert bits < 8, refused
        return
    assert np.abs(found - shades(bits)[numbers(bits)]).max() <= 1


# --- BMP -------------------------------------------------------------------------------------


def bmp(bits: int, rows: bytes, *, palette: Codes | None = None, compression: int = 0,
        masks: tuple[int, ...] = (), top_down: bool = False) -> bytes:  # fmt: skip
    told = struct.pack(f"<{len(masks)}I", *masks)
    table = b"" if palette is None else bytes(
        byte for red, green, blue in palette for byte in (blue, green, red, 0)
    )  # fmt: skip
    start = 14 + 40 + len(told) + len(table)
    number = 0 if palette is None else len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, SIDE, -SIDE if top_down else SIDE, 1, bits, compression,
                       len(rows), 0, 0, number, 0)  # fmt: skip
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + told + table + rows


def bmp_rows(values: Codes, bits: int, *, top_down: bool = False) -> bytes:
    rows = values if top_down else values[::-1]
    whole = packed(rows, bits)
    line = len(whole) // SIDE
    return b"".join(whole[row * line : (row + 1) * line] + bytes(-line % 4) for row in range(SIDE))


@pytest.mark.parametrize(("bits", "top_down"), product([1, 4, 8], [False, True]))
def test_bmp_with_a_palette(bits: int, top_down: bool) -> None:
    rows = bmp_rows(numbers(bits), bits, top_down=top_down)
    content = bmp(bits, rows, palette=shades(bits), top_down=top_down)
    assert (shown(content) == shades(bits)[numbers(bits)]).all()


@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_of_24_bits(top_down: bool) -> None:
    codes = colours(3)
    content = bmp(24, bmp_rows(codes[:, :, ::-1], 8, top_down=top_down), top_down=top_down)
    assert (shown(content) == codes).all()


MASKS = {
    "555": (16, 0, (0x7C00, 0x3E0, 0x1F)),
    "565": (16, 3, (0xF800, 0x7E0, 0x1F)),
    "555 told": (16, 3, (0x7C00, 0x3E0, 0x1F)),
    "xRGB": (32, 0, (0xFF0000, 0xFF00, 0xFF)),
    "xRGB told": (32, 3, (0xFF0000, 0xFF00, 0xFF)),
    "xBGR told": (32, 3, (0xFF, 0xFF00, 0xFF0000)),
    "RGBx told": (32, 3, (0xFF000000, 0xFF0000, 0xFF00)),
    "10 bits": (32, 3, (0x3FF00000, 0xFFC00, 0x3FF)),
    "444": (16, 3, (0xF00, 0xF0, 0xF)),
}


@pytest.mark.parametrize("masks", MASKS)
def test_bmp_with_colours_in_fields_of_bits_has_them_or_a_reason(masks: str) -> None:
    bits, compression, fields = MASKS[masks]
    codes, pixels = colours(3), np.zeros((SIDE, SIDE), dtype=np.int64)
    for band, field in enumerate(fields):
        shift = (field & -field).bit_length() - 1
        pixels |= (codes[:, :, band] * (field >> shift) / 255).round().astype(int) << shift
    rows = pixels[::-1].astype(f"<u{bits // 8}").tobytes()
    content = bmp(bits, rows, compression=compression, masks=fields if compression else ())
    try:
        found = shown(content)
    except BadImageError as refused:
        assert masks in ("10 bits", "444", "xBGR told"), refused
        assert str(refused).startswith("unsupported: BMP"), refused
        return
    assert np.abs(found - codes).max() <= 9
