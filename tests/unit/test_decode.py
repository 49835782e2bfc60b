"""Every kind of picture gives the pixels a person sees; everything else gives a reason."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipeline.networks.cost import MAX_MEMORY
from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError
from tests.corpus import encoded, picture, slow_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes decode's own filter

SIZE = 32
TURNS = {  # EXIF's orientation: how the camera turned the picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATION = 0x0112


def upright(image: Image.Image | None = None) -> np.ndarray:
    """Return the pixels that a picture must give."""
    image = image or picture()
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def assert_shows(content: bytes, expected: np.ndarray, within: float = 0) -> None:
    """Compare pixels: the mean difference of a lossy format stays below `within`."""
    pixels = decode(content, SIZE)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (SIZE, SIZE, 3))
    assert np.abs(pixels.astype(int) - expected).mean() <= within


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    """Return a PNG of any depth and colour type, as its specification lays it out."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width: int, height: int) -> bytes:
    """Return the beginning of a BMP: what its header promises never comes."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + header + bytes(100)


# --- good images -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "within"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 3),
        ("JPEG", {"quality": 90}, 3),
        ("JPEG", {"quality": 90, "progressive": True}, 3),
        ("GIF", {}, 6),
    ],
)
def test_every_format_shows_the_same_picture(
    kind: str, options: dict[str, object], within: float
) -> None:
    assert_shows(encoded(picture(), kind, **options), upright(), within)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO", "PNG"])
def test_of_many_frames_the_first_is_taken(kind: str) -> None:
    others = [Image.new("RGB", (60, 40), colour) for colour in ("black", "red")]
    content = encoded(picture(), kind, save_all=True, append_images=others)
    assert_shows(content, upright(), within=6)


@pytest.mark.parametrize(
    ("mode", "kind", "within"),
    [("CMYK", "JPEG", 6), ("CMYK", "TIFF", 1), ("L", "JPEG", 3), ("L", "PNG", 0), ("1", "PNG", 0)],
)
def test_other_colours_become_rgb(mode: str, kind: str, within: float) -> None:
    image = picture().convert(mode)
    expected = upright(image.convert("RGB"))
    assert_shows(encoded(image, kind), expected, within)


@pytest.mark.parametrize(
    ("value", "byte"), [(0, 0), (255, 0), (32768, 127), (65535, 255), (30000, 116)]
)
def test_grey_of_16_bits_keeps_its_brightness(value: int, byte: int) -> None:
    grey = np.full((40, 60), value, np.uint16)
    for kind, numbers in (("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("TIFF", "<i4")):
        content = encoded(Image.fromarray(grey.astype(numbers)), kind)
        assert (decode(content, SIZE) == byte).all(), (kind, numbers)


def test_colours_of_16_bits_keep_their_brightness() -> None:
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 3
    assert (decode(png(3, 2, 16, 2, row * 2), SIZE) == [255, 128, 0]).all()


@pytest.mark.parametrize(
    ("pixel", "seen"),
    [
        ((200, 0, 50, 255), (200, 0, 50)),
        ((200, 0, 50, 0), (255, 255, 255)),
        ((0, 0, 0, 128), (127, 127, 127)),
        ((200, 0, 50, 51), (244, 204, 214)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_what_is_transparent_lies_over_white(
    kind: str, pixel: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encoded(Image.new("RGBA", (7, 5), pixel), kind, **options)
    assert_shows(content, np.broadcast_to(seen, (SIZE, SIZE, 3)), within=1)


def test_grey_with_transparency_lies_over_white() -> None:
    assert (decode(encoded(Image.new("LA", (7, 5), (0, 0)), "PNG"), SIZE) == 255).all()
    assert (decode(encoded(Image.new("LA", (7, 5), (90, 255)), "PNG"), SIZE) == 90).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(kind: str) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (20, 0, 40, 40))
    pixels = decode(encoded(image, kind, transparency=0), SIZE)
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, 20:] == [200, 100, 50]).all()


def test_a_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    assert (decode(encoded(image, "PNG", transparency=(1, 2, 3)), SIZE) == 255).all()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("kind", "options", "within"),
    [("PNG", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {}, 4)],
)
def test_a_picture_stands_upright_however_the_camera_was_held(
    kind: str, options: dict[str, object], within: float, orientation: int
) -> None:
    turn = TURNS[orientation]
    turned = picture() if turn is None else picture().transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert_shows(encoded(turned, kind, exif=exif, **options), upright(), within)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"]
)
def test_damaged_exif_does_not_cost_the_picture(exif: bytes) -> None:
    assert_shows(encoded(picture(), "JPEG", quality=90, exif=exif), upright(), within=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_one_pixel_is_a_picture(kind: str) -> None:
    content = encoded(Image.new("RGB", (1, 1), (255, 255, 255)), kind)
    assert (decode(content, SIZE) == 255).all()


def test_a_picture_of_any_proportion_fills_the_square() -> None:
    for shape in ((1, 3000), (3000, 1)):
        content = encoded(Image.new("RGB", shape, (9, 8, 7)), "PNG")
        assert (decode(content, SIZE) == [9, 8, 7]).all()


def test_a_long_thin_photo_is_decoded() -> None:
    assert_shows(encoded(picture(20_000, 700), "JPEG", quality=90), upright(), within=3)


@pytest.mark.parametrize(
    ("kind", "mode", "options", "within"),
    [
        ("MPO", "RGB", {"quality": 90}, 3),
        ("PNG", "RGB", {"compress_level": 1}, 1),
        ("PNG", "RGBA", {"compress_level": 1}, 1),
        ("PNG", "P", {"compress_level": 1}, 6),
        ("PNG", "I;16", {"compress_level": 1}, 2),
        ("PNG", "1", {}, 4),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}, 1),
        ("WEBP", "RGB", {"quality": 90, "method": 0}, 3),
        ("WEBP", "RGBA", {"quality": 90, "method": 0}, 3),
        ("HEIF", "RGB", {"quality": 90}, 4),
        ("BMP", "RGB", {}, 1),
    ],
)
def test_a_phones_photo_of_any_format_looks_the_same(
    kind: str, mode: str, options: dict[str, object], within: float
) -> None:
    photo = picture(4080, 3060)
    if mode == "I;16":
        grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
        assert_shows(encoded(Image.fromarray(grey), kind), upright(photo.convert("L")), within)
        return
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    turned = photo.transpose(Image.Transpose.ROTATE_180).convert(mode)
    tells = kind not in ("BMP", "HEIF")  # which way is up
    more = {**options, "exif": exif} if tells else options
    expected = photo if tells else photo.transpose(Image.Transpose.ROTATE_180)
    expected = expected.convert("L") if mode == "1" else expected
    assert_shows(encoded(turned, kind, **more), upright(expected), within)


def test_avif_is_an_image() -> None:
    assert_shows(encoded(picture(), "AVIF", quality=95), upright(), within=4)


# Display P3 with the curve of sRGB, as iPhones have it (ICC.1:2010: version 2, matrix and curve).
PRIMARIES = {
    "Display P3": [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)],
    "sRGB": [(0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)],
}


def profile_of(space: str) -> bytes:
    """Write an ICC profile of a colour space."""
    fixed = lambda *values: b"".join(struct.pack(">i", round(65536 * value)) for value in values)  # noqa: E731
    codes = np.linspace(0, 1, 256)
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + bytes(4) + struct.pack(">I256H", 256, *np.rint(65535 * linear).astype(int))
    name = space.encode() + b"\0"
    told = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)
    tags = {b"desc": told, b"wtpt": white, b"cprt": b"text" + bytes(4) + b"none\0"}
    for letter, values in zip(b"rgb", PRIMARIES[space], strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*values)
        tags[bytes([letter]) + b"TRC"] = curve
    place, table, bodies = 128 + 4 + 12 * len(tags), b"", b""
    for tag, body in tags.items():
        padded = body + bytes(-len(body) % 4)
        table += tag + struct.pack(">II", place + len(bodies), len(body))
        bodies += padded
    header = struct.pack(
        ">I4sI4s4s4s", place + len(bodies), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + bodies


def in_display_p3(image: Image.Image) -> Image.Image:
    """Write an image's colours as Display P3 has them (the same curve, wider primaries)."""
    to_d50 = {space: np.array(rows).T for space, rows in PRIMARIES.items()}
    codes = np.asarray(image) / 255
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    wide = np.clip(linear @ (np.linalg.inv(to_d50["Display P3"]) @ to_d50["sRGB"]).T, 0, 1)
    curved = np.where(wide <= 0.0031308, 12.92 * wide, 1.055 * wide ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.rint(255 * curved).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("HEIF", {"quality": 95, "chroma": 444}),
    ],
)
def test_colours_of_a_wider_profile_are_those_that_were_seen(
    kind: str, options: dict[str, object]
) -> None:
    photo = picture(2 * SIZE, 2 * SIZE)
    wide = in_display_p3(photo)
    told = encoded(wide, kind, icc_profile=profile_of("Display P3"), **options)
    assert np.abs(decode(told, SIZE).astype(int) - upright(photo)).mean() < 1.5
    untold = encoded(wide, kind, **options)
    assert np.abs(decode(untold, SIZE).astype(int) - upright(photo)).mean() > 3
    of_screens = encoded(photo, kind, icc_profile=profile_of("sRGB"), **options)
    np.testing.assert_array_equal(
        decode(of_screens, SIZE), decode(encoded(photo, kind, **options), SIZE)
    )


@pytest.mark.parametrize(
    "profile",
    [b"x", bytes(200), profile_of("Display P3")[:300], profile_of("Display P3") + bytes(2_000_000)],
    ids=["none", "zeros", "cut", "large"],
)
def test_a_profile_that_is_none_does_not_cost_the_picture(profile: bytes) -> None:
    photo = picture()
    told = encoded(photo, "JPEG", quality=95, icc_profile=profile)
    np.testing.assert_array_equal(
        decode(told, SIZE), decode(encoded(photo, "JPEG", quality=95), SIZE)
    )


def test_a_heic_that_is_cut_off_is_told_as_such() -> None:
    whole = encoded(picture(), "HEIF", quality=90)
    assert_shows(whole, upright(), within=4)
    assert reason(whole[:-1]).startswith(f"damaged: HEIF: cut off: {len(whole) - 1:,} of ")


def test_a_chunk_that_is_damaged_does_not_cost_the_picture() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    whole = encoded(picture(), "PNG")
    for kind, body in {b"pHYs": b"1", b"gAMA": b"", b"iCCP": b"x\0\x09y", b"acTL": b"1"}.items():
        told = whole[:33] + chunk(kind, body) + whole[33:]
        np.testing.assert_array_equal(decode(told, SIZE), decode(whole, SIZE))
    behind = whole[:-12] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))) + whole[-12:]
    np.testing.assert_array_equal(decode(behind, SIZE), decode(whole, SIZE))
    photo = encoded(picture(), "JPEG")
    for segment in (b"\xff\xe2\0\x0eICC_PROFILE\0", b"\xff\xe0\0\6JFIF", b"\xff\xee\0\7Adobe"):
        told = photo[:2] + segment + photo[2:]
        np.testing.assert_array_equal(decode(told, SIZE), decode(photo, SIZE))


def test_metadata_never_costs_the_picture() -> None:
    profile = struct.pack(">I", 1_500_000) + b"lcms" + np.random.default_rng(1).bytes(1_499_992)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 3_000_000, zip=True)
    text.add_itxt("XML:note", "y" * 3_000_000, zip=True)
    text.add_text("Long", "z" * 2_000_000)
    for options in ({"icc_profile": profile}, {"pnginfo": text}):
        assert_shows(encoded(picture(), "PNG", **options), upright())


def test_a_large_photo_is_decoded_small_and_looks_the_same() -> None:
    photo = picture(4000, 3000)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert_shows(encoded(photo, "JPEG", quality=90), upright(), within=3)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    assert_shows(encoded(turned, "JPEG", quality=90, exif=exif), upright(), within=3)


@pytest.mark.parametrize("size", [32, 96, 224])
def test_the_same_bytes_give_the_same_pixels(size: int) -> None:
    content = encoded(picture(300, 200), "JPEG")
    first = decode(content, size)
    assert first.shape == (size, size, 3)
    np.testing.assert_array_equal(decode(content, size), first)


def test_threads_that_decode_at_once_leave_pythons_warnings_as_they_are() -> None:
    before = list(warnings.filters)
    with ThreadPoolExecutor(16) as pool:
        pixels = list(pool.map(decode, [encoded(picture(), "JPEG")] * 500, [SIZE] * 500))
    assert list(warnings.filters) == before
    assert all((one == pixels[0]).all() for one in pixels)


def test_what_pillow_warns_of_is_not_the_users_to_read() -> None:
    code = f"""
from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError
try:
    decode({png(13_000, 13_000, 8, 2, b"")!r}, 32)
except BadImageError as error:
    print(error)
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "13000 x 13000 pixels would take" in done.stdout
    assert done.stderr == ""


# --- bad images ------------------------------------------------------------------------------


def planar_tiff(bits: int) -> bytes:
    """Write 4 x 4 pixels whose colours lie in planes."""
    size = 16 * bits // 8
    tags = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 3, 170), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 3, 176), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 3, 188), (284, 3, 1, 2),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    head += bytes(170 - len(head)) + struct.pack("<3H", bits, bits, bits)
    head += struct.pack("<3I", *(200 + size * plane for plane in range(3)))
    head += struct.pack("<3I", size, size, size)
    planes = (np.full(16, value, f"<u{bits // 8}").tobytes() for value in (250, 100, 20))
    return head + b"".join(planes)


def reason(content: bytes) -> str:
    with pytest.raises(BadImageError) as refused:
        decode(content, SIZE)
    return str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty: the file has 0 bytes"),
        (b"This is a shopping list.\n", "not an image: begins with b'This is '"),
        (bytes(5000), "not an image: begins with b'\\x00"),
        (b"%PDF-1.7\n", "unsupported: PDF; convert it"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported: SVG; convert it"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
            "damaged: HEIF: its header cannot be read",
        ),
        (b"\0\0\0\x20ftypisom" + bytes(200), "unsupported: a video"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "damaged: PNG: its header cannot be read"),
        (b"RIFF\0\0\0\0WEBP" + bytes(200), "damaged: WEBP"),
        (encoded(picture(), "PPM"), "unsupported: PNM; convert it"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "32-bit float pixels"),
        (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "32-bit integer pixels"),
        (encoded(Image.new("I", (4, 4), -1), "TIFF"), "32-bit integer pixels"),
        (b"\xff\xd8\xff\xc3\0\x0b\x08\0\x10\0\x10\1\1\x11\0", "unsupported: JPEG, lossless, of 8"),
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\x10\0\x10\1\1\x11\0", "unsupported: JPEG, of 12 bits"),
        (planar_tiff(16), "unsupported: TIFF with its colours in planes of 16 bits"),
        (bmp(8000, 8000), "damaged: BMP: "),
        (bmp(12_000, 12_000), "BMP, 12000 x 12000 pixels would take 576 MB, more than 400"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(content: bytes, words: str) -> None:
    assert words in reason(content)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_a_truncated_jpeg_is_refused_at_any_length(part: float) -> None:
    content = encoded(picture(400, 300), "JPEG", quality=95)
    words = reason(content[: int(part * len(content))])
    assert "truncated" in words or "not an image" in words or "damaged" in words


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_half_a_picture_of_any_format_is_refused(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (80, 80, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    assert reason(content[: len(content) // 2])


def test_a_reason_is_short_and_the_same_each_time() -> None:
    whole = encoded(picture(), "PNG")
    for content in (whole[:60], whole[:90], b"\xff\xd8\xff" + b"x" * 9999, b"II*\0" + b"\xff" * 99):
        assert reason(content) == reason(content)
        assert len(reason(content)) < 200
        assert " at 0x" not in reason(content)


MEASURE = """
import re, resource, sys
from pathlib import Path
from pipeline.networks.decode import decode
from pipeline.quarantine import BadImageError
def peak():
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
    # There, ru_maxrss begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search("VmHWM:[^0-9]*([0-9]+) kB", status)[1]) // 2**10
content = sys.stdin.buffer.read()
before = peak()
try:
    decode(content, 224)
except BadImageError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.parametrize(
    "content",
    [
        png(30_000, 30_000, 8, 2, bytes(1000)),
        png(9_000, 9_000, 8, 6, bytes(1000)),
        png(65_000, 1_000_000, 1, 0, bytes(1000)),
        bmp(30_000, 30_000),
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
    ],
    ids=["png", "a smaller png", "a flat png", "bmp", "gif"],
)
def test_a_bomb_is_refused_at_once_and_takes_no_memory(content: bytes) -> None:
    began = time.thread_time()
    assert "pixels" in reason(content)
    assert time.thread_time() - began < 1
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=content, capture_output=True, check=True
    )
    words, megabytes = done.stdout.decode().splitlines()
    assert "pixels" in words
    assert int(megabytes) < 20


def animation(width: int, height: int) -> bytes:
    frames = [Image.new("RGB", (width, height), grey) for grey in (90, 180)]
    return encoded(frames[0], "WEBP", quality=1, method=0, save_all=True, append_images=frames[1:])


def camera_file(kind: str, mode: str, width: int, height: int, **options: object) -> bytes:
    return encoded(Image.new(mode, (width, height), 90), kind, **options)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {"compress_level": 1}),
        ("PNG", "RGBA", {"compress_level": 1}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("MPO", "RGB", {}),
        ("WEBP", "RGB", {"quality": 10, "method": 0}),
        ("WEBP", "RGBA", {"quality": 10, "method": 0}),
        ("HEIF", "RGB", {"quality": 10, "preset": "ultrafast"}),
    ],
)
def test_a_photo_of_48_million_pixels_takes_no_more_than_one_may(
    kind: str, mode: str, options: dict[str, object]
) -> None:
    content = camera_file(kind, mode, 8000, 6000, **options)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=content, capture_output=True, check=True
    )
    (megabytes,) = done.stdout.decode().splitlines()  # and no reason against it
    assert int(megabytes) << 20 <= MAX_MEMORY


def tile(side: int) -> bytes:
    """Write a TIFF of 16 x 16 pixels that lie in one tile of many more."""
    packed = zlib.compress(bytes(side * side * 3), 1)
    tags = [
        (256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 2),
        (277, 3, 1, 3), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 150),
        (325, 4, 1, len(packed)),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return head + bytes(150 - len(head)) + packed


COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "many coefficients": (
        lambda: camera_file(
            "JPEG", "RGB", 12_000, 9_000, progressive=True, subsampling=0, quality=20
        ),
        "too much memory: JPEG, 12000 x 9000 pixels would take ",
    ),
    "two canvases": (
        lambda: animation(8000, 6000),
        "too much memory: WEBP, 8000 x 6000 pixels would take ",
    ),
    "a transparent grey": (
        lambda: encoded(Image.new("L", (10_000, 10_000), 90), "PNG", transparency=3),
        "too much memory: PNG, 10000 x 10000 pixels would take ",
    ),
    "a tile larger than its picture": (
        lambda: tile(16_384),
        "too much memory: TIFF, 16 x 16 pixels would take ",
    ),
    "many scans": (
        lambda: slow_image(400),
        "too slow: JPEG, 4000 x 3000 pixels in 405 scans take too long",
    ),
}


@pytest.mark.parametrize("what", COSTLY)
def test_what_would_take_more_is_told_before_it_does(what: str) -> None:
    make, words = COSTLY[what]
    content = make()
    began = time.thread_time()
    assert reason(content).startswith(words)
    assert time.thread_time() - began < 0.5


@given(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"",
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"MM\0*",
            b"RIFF\x40\0\0\0WEBP",
        ]
    ),
)
def test_any_bytes_give_pixels_or_a_reason(content: bytes, beginning: bytes) -> None:
    try:
        pixels = decode(beginning + content, SIZE)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels.shape == (SIZE, SIZE, 3)


SMALL = [
    *(
        encoded(picture(9, 7), kind)
        for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "MPO")
    ),
    encoded(picture(32, 24), "HEIF", icc_profile=profile_of("Display P3")),
    encoded(picture(9, 7), "JPEG", icc_profile=profile_of("Display P3")),
    encoded(picture(40, 30), "JPEG", progressive=True, comment=b"a comment"),
    encoded(picture(9, 7).convert("P"), "PNG", transparency=3),
    encoded(picture(9, 7).convert("RGBA"), "WEBP", lossless=True, exif=Image.Exif().tobytes()),
    encoded(picture(9, 7), "TIFF", compression="tiff_lzw", icc_profile=profile_of("Display P3")),
    encoded(picture(9, 7).convert("CMYK"), "TIFF"),
]
ODD = st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF]) | st.integers(0, 255)


@settings(max_examples=10 * settings.default.max_examples)  # half a minute; `make soak` more
@given(st.sampled_from(SMALL), st.data())
def test_damage_anywhere_gives_pixels_or_a_reason(whole: bytes, data: st.DataObject) -> None:
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "number", "cut out", "again"])):
            case "byte":
                content[place] = data.draw(ODD)
            case "number":
                content[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
            case "cut out":
                del content[place : place + data.draw(st.integers(1, 64))]
            case "again":
                content[place:place] = content[place : place + data.draw(st.integers(1, 64))]
        if not content:
            return
    try:
        pixels = decode(bytes(content), SIZE)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels.shape == (SIZE, SIZE, 3)
