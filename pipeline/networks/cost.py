"""What decoding a file takes, told by its header, before it is paid.

Memory is counted above an idle process, the file's own bytes among it. Measured on Pillow 13 with
photos of 48 million pixels; tests/unit/test_decode.py measures it again.
"""

from __future__ import annotations

from contextlib import suppress

from PIL import Image, JpegImagePlugin

from pipeline.networks.formats import jpeg_segments
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
_OF_PLAIN_WEBP, _OF_LOSSLESS_WEBP = 8, 12  # decoded by itself, and a copy that is made smaller
_OF_AVIF, _OF_HEIF, _OF_DEEP_HEIF, _OF_DEEP_HEIF_444 = 10, 8, 14, 16  # deep: more than 8 bits
_OF_TRANSPARENCY = 8  # one colour that is transparent: converted, and that made smaller
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
    scans = _scans(image, content)
    if scans * pixels > MAX_SCAN_PIXELS:
        raise BadImageError(Reason.TOO_SLOW, f"{told} in {scans:,} scans take too long")
    memory = len(content) + _memory(image, content, size, has_scans=scans > 1)
    if memory > MAX_MEMORY:
        raise BadImageError(
            Reason.TOO_MUCH_MEMORY,
            f"{told} would take {memory / 1e6:,.0f} MB, more than {MAX_MEMORY / 1e6:,.0f}",
        )


def is_large_webp(image: Image.Image) -> bool:
    """Tell whether an image is decoded by another decoder than Pillow's, which takes less."""
    is_one = not getattr(image, "is_animated", False)
    return image.format == "WEBP" and is_one and image.width * image.height > WHOLE_PIXELS


def _scans(image: Image.Image, content: bytes) -> int:
    """Count a JPEG's scans, 1 for other formats; the first of several tells that there are more."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    if not image.info.get("progressive") and _has_all_colours(image, content):
        return 1
    with suppress(ValueError, IndexError):  # a damaged one has those before the damage
        return sum(marker == 0xDA for marker, _ in jpeg_segments(content))
    return content.count(b"\xff\xda")


def _has_all_colours(image: JpegImagePlugin.JpegImageFile, content: bytes) -> bool:
    with suppress(ValueError, IndexError):
        for marker, segment in jpeg_segments(content):
            if marker == 0xDA:
                return int(segment[4]) == len(image.layer)
    return True


def _memory(image: Image.Image, content: bytes, size: int, *, has_scans: bool) -> int:
    pixels = image.width * image.height
    of_pixel = _OF_MODE.get(image.mode, _OTHER_MODE)
    if "transparency" in image.info and pixels > WHOLE_PIXELS:
        of_pixel += _OF_TRANSPARENCY
    if image.format == "WEBP":
        if is_large_webp(image):
            is_lossless = content.find(b"VP8L", 0, 1 << 20) > 0
            return pixels * (_OF_LOSSLESS_WEBP if is_lossless else _OF_PLAIN_WEBP)
        return pixels * (_OF_WEBP if pixels <= WHOLE_PIXELS else _OF_LARGE_WEBP)
    if image.format == "HEIF":
        if image.info.get("bit_depth", 8) <= 8:
            return pixels * _OF_HEIF
        return pixels * (_OF_DEEP_HEIF_444 if image.info.get("chroma") == 444 else _OF_DEEP_HEIF)
    if image.format == "AVIF":
        return pixels * _of_avif(image, content)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        shrink = min(8, max(1, min(image.width, image.height) // (2 * size)))
        scaled = pixels // (1 << (shrink.bit_length() - 1)) ** 2
        return scaled * of_pixel + (_coefficients(image) if has_scans else 0)
    if image.format == "TIFF":
        return pixels * of_pixel + _at_once(image)
    return pixels * of_pixel


def _of_avif(image: Image.Image, content: bytes) -> int:
    """Return bytes a pixel, by depth and colours (AV1 in ISO BMFF, av1C)."""
    place = content.find(b"av1C", 0, 1 << 16)
    told = content[place + 6] if 0 < place < len(content) - 6 else 0
    is_deep, is_444 = bool(told & 0x40), not told & 0x0C
    if image.mode == "RGBA":
        return 18 if is_deep else 13
    return (14 if is_444 else 11) if is_deep else _OF_AVIF


def _at_once(image: Image.Image) -> int:
    """Return the bytes of what libtiff decodes at once: a tile, or a strip, often the whole."""
    tags = getattr(image, "tag_v2", {})
    bits = int(max(tags.get(258, (8,))))
    if 322 in tags and 323 in tags:
        pixels = int(tags[322]) * int(tags[323])
    else:
        pixels = image.width * min(image.height, int(tags.get(278, image.height)))
    return pixels * len(image.getbands()) * max(8, bits) // 8


def _coefficients(image: JpegImagePlugin.JpegImageFile) -> int:
    """Return what a JPEG of several scans keeps of all of its pixels until the last."""
    layers = [(h, v) for _, h, v, _ in image.layer]
    most = max(h for h, _ in layers) * max(v for _, v in layers)
    share = sum(h * v for h, v in layers) / most
    return int(image.width * image.height * share * _COEFFICIENT)
