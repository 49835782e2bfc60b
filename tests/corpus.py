"""Images of every kind that a photo folder ends up with, good and bad, made by hand."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Return an RGB picture with a gradient, so that turning or clipping it shows."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.dstack([across, down, 255 - across]).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the image as the bytes of a file."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def bomb() -> bytes:
    """Return a PNG whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def slow_image(scans: int = 150) -> bytes:
    """Return a small progressive JPEG that refines its 12 million pixels again and again.

    A hundred scans take some 0.7 s. Many more are refused before they are decoded.
    """
    content = encoded(Image.new("L", (4000, 3000), 128), "JPEG", progressive=True)
    *first, last = content.removesuffix(b"\xff\xd9").split(b"\xff\xda")
    return b"\xff\xda".join([*first, *[last] * scans]) + b"\xff\xd9"


def rotated_by_exif() -> bytes:
    """Return a JPEG whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def good_images() -> dict[str, bytes]:
    """Return images that must give features, by the name they are kept under."""
    rgb = picture()
    grey16 = Image.fromarray(np.full((40, 60), 32768, np.uint16))
    palette = rgb.quantize(16)
    palette.info["transparency"] = 0
    jpeg = encoded(rgb, "JPEG")
    names = [
        "with space.jpg", "accents éàü ñ.jpg", "100%.jpg", "%41.jpg", "no#1.jpg", "a+b.jpg",
        "10:30.jpg", "_hidden.jpg", ".hidden.jpg", "quote'\"s.jpg", "comma, semi;.jpg",
        "UPPER.JPG", "日本.jpg", "a=b&c?.jpg", "folder.jpg/inside.jpg",
    ]  # fmt: skip
    return {
        "kinds/jpeg.jpg": jpeg,
        "kinds/png.png": encoded(rgb, "PNG"),
        "kinds/webp.webp": encoded(rgb, "WEBP"),
        "kinds/bmp.bmp": encoded(rgb, "BMP"),
        "kinds/gif.gif": encoded(rgb, "GIF"),
        "kinds/tiff.tiff": encoded(rgb, "TIFF"),
        "kinds/cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "kinds/grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "kinds/grey16.png": encoded(grey16, "PNG"),
        "kinds/palette.png": encoded(palette, "PNG", transparency=0),
        "kinds/exif.jpg": rotated_by_exif(),
        "kinds/one pixel.png": encoded(picture(1, 1), "PNG"),
        **{f"names/{name}": jpeg for name in names},
        "one/same.jpg": jpeg,
        "two/same.jpg": encoded(rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG"),
        "no label.jpg": jpeg,
    }


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Return images that must end in quarantine, each with a word of its reason."""
    jpeg = encoded(picture(), "JPEG")
    return {
        "bad/truncated.jpg": (jpeg[: len(jpeg) // 2], "runcated"),
        "bad/empty.jpg": (b"", "empty"),
        "bad/text.jpg": (b"This is a shopping list.\n", "not an image"),
        "bad/bomb.png": (bomb(), "pixels"),
    }
