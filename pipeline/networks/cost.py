"""What decoding a file takes, told by its header, before it is paid.

Memory is counted above an idle process, the file's own bytes among it. Measured on Pillow 13 with
photos of 48 million pixels; tests/unit/test_decode.py measures it again.
"""

from __future__ import annotations

from PIL import Image, JpegImagePlugin

from pipeline.quarantine import BadImageError, Reason

MAX_MEMORY = 400_000_000  # bytes, for one image
MAX_BYTES = 150_000_000  # of a file: 48 million pixels take 144 MB where nothing is compressed
MAX_PIXELS = 200_000_000  # time, too: a JPEG is decoded at an eighth of its size, in 0.3 s
WHOLE_PIXELS = 12_000_000  # an image of more is made smaller before its colours are looked at
MAX_SCAN_PIXELS = 2_000_000_000  # a progressive JPEG's pixels times its scans: 1.2 s

# Bytes a pixel takes on its way, by how Pillow keeps it: as it is decoded, and a copy where
# colours are converted or made smaller.
_OF_MODE = {"1": 2, "L": 1, "P": 5, "RGB": 4, "YCbCr": 8, "I;16": 7, "I;16B": 7, "I": 9, "F": 4}
_OTHER_MODE = 8  # RGBA, LA, CMYK and others
_OF_WEBP, _OF_LARGE_WEBP = 27, 16  # Pillow keeps both canvases of an animation
_OF_PLAIN_WEBP = 5  # decoded by itself, in the form that Pillow takes as it is
_OF_AVIF, _OF_HEIF = 10, 8
_COEFFICIENT = 2


def check_cost(image: Image.Image, content: bytes, size: int) -> None:
    """Refuse an image that would take more memory or time than one may.

    Raises
    ------
    BadImageError
        With what it would take.
    """
    pixels, kind = image.width * image.height, str(image.format)
    told = f"{kind}, {image.width} x {image.height} pixels"
    if pixels > MAX_PIXELS:
        raise BadImageError(Reason.TOO_LARGE, f"{told} are more than {MAX_PIXELS:,}")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.info.get("progressive"):
        scans = content.count(b"\xff\xda")
        if scans * pixels > MAX_SCAN_PIXELS:
            raise BadImageError(Reason.TOO_SLOW, f"{told} in {scans:,} scans take too long")
    memory = len(content) + _memory(image, size)
    if memory > MAX_MEMORY:
        raise BadImageError(
            Reason.TOO_MUCH_MEMORY,
            f"{told} would take {memory / 1e6:,.0f} MB, more than {MAX_MEMORY / 1e6:,.0f}",
        )


def is_large_webp(image: Image.Image) -> bool:
    """Tell whether an image is decoded by another decoder than Pillow's, which takes less."""
    is_one = not getattr(image, "is_animated", False)
    return image.format == "WEBP" and is_one and image.width * image.height > WHOLE_PIXELS


def _memory(image: Image.Image, size: int) -> int:
    pixels = image.width * image.height
    of_pixel = _OF_MODE.get(image.mode, _OTHER_MODE)
    if image.format == "WEBP":
        if is_large_webp(image):
            return pixels * _OF_PLAIN_WEBP
        return pixels * (_OF_WEBP if pixels <= WHOLE_PIXELS else _OF_LARGE_WEBP)
    if image.format == "HEIF":
        return pixels * _OF_HEIF
    if image.format == "AVIF":
        return pixels * _OF_AVIF
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        shrink = min(8, max(1, min(image.width, image.height) // (2 * size)))
        scaled = pixels // (1 << (shrink.bit_length() - 1)) ** 2
        return scaled * of_pixel + _coefficients(image)
    if image.format == "TIFF":
        # libtiff decodes a strip or a tile at a time, which may be the whole picture.
        return pixels * (of_pixel + len(image.getbands()))
    return pixels * of_pixel


def _coefficients(image: JpegImagePlugin.JpegImageFile) -> int:
    """Return what a progressive JPEG keeps of all of its pixels until its last scan."""
    if not image.info.get("progressive"):
        return 0
    layers = [(h, v) for _, h, v, _ in image.layer]
    most = max(h for h, _ in layers) * max(v for _, v in layers)
    share = sum(h * v for h, v in layers) / most
    return int(image.width * image.height * share * _COEFFICIENT)
