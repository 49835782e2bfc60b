"""Turns the bytes of an image into the pixels that a network reads, or says why it cannot.

Pillow decodes and resizes, always with the same explicit filter: another filter gives other
features. `PREPROCESSING` names all of it and is part of a model's id.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.quarantine import BadImageError, Reason

PREPROCESSING = "pillow, exif-transposed, rgb over white, bilinear"

# A pixel costs up to 27 bytes on its way (RGBA WebP, measured), so one image 320 MB at most.
MAX_PIXELS = 12_000_000
# A JPEG is decoded at an eighth of its size where that is enough, so more pixels cost only time.
MAX_JPEG_PIXELS = 200_000_000
# The file itself is in memory, too: 12 million pixels take 96 MB where nothing is compressed.
MAX_BYTES = 128_000_000

# Pillow warns of bombs, which MAX_PIXELS refuses, and of odd metadata. Filtered once and for all:
# `catch_warnings` in `decode` would lose the caller's own filters where threads decode at once.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(content: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode an image and resize it to a square.

    Parameters
    ----------
    content
        The bytes of a JPEG, PNG, WebP, BMP, GIF (its first frame) or TIFF file.
    size
        The side of the square, in pixels.

    Returns
    -------
    array of uint8, shape (size, size, 3)
        RGB; what is transparent is white, like the background of Fruits-360.

    Raises
    ------
    BadImageError
        When the bytes are no image, are truncated, or hold more than 12 million pixels (200
        million in a JPEG, of which no more than 12 million are left at the scale it is decoded at).
    MemoryError
        When there is not enough memory, which may be taken by others.
    """
    if not content:
        raise BadImageError(Reason.EMPTY, "the file has 0 bytes")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return _pixels(image, size)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(Reason.NOT_AN_IMAGE, f"begins with {content[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImageError(Reason.TOO_LARGE, str(error)) from None
    except MemoryError:
        raise  # who takes the memory is not known here
    except Exception as error:  # Pillow's decoders raise many kinds; none may end a job
        raise BadImageError(Reason.DAMAGED, str(error) or type(error).__name__) from None


_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def _pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    width, height = image.size
    # A large JPEG is decoded at a half, a quarter or an eighth, never below twice the size wanted.
    image.draft(None, (2 * size, 2 * size))
    most = MAX_JPEG_PIXELS if image.format == "JPEG" else MAX_PIXELS
    if width * height > most:
        raise BadImageError(
            Reason.TOO_LARGE,
            f"{width} x {height} pixels are more than the {most:,} that are decoded",
        )
    if image.width * image.height > MAX_PIXELS:  # long and thin, or wanted large
        raise BadImageError(
            Reason.TOO_LARGE,
            f"{width} x {height} pixels leave {image.width} x {image.height} for a square of "
            f"{size}, more than the {MAX_PIXELS:,} that are decoded",
        )
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    resized = _to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise BadImageError(
            Reason.UNSUPPORTED, "32-bit float pixels: which value is white is not known"
        )
    if image.has_transparency_data:
        over_white = Image.new("RGBA", image.size, "white")
        over_white.alpha_composite(image.convert("RGBA"))
        return over_white.convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion would clip all above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(
            Reason.UNSUPPORTED, "32-bit integer pixels: which value is white is not known"
        )
    return Image.fromarray((values // 257).astype(np.uint8), mode="L")
