"""Turns the bytes of an image into the pixels that a network reads, or says why it cannot.

Pillow decodes and resizes, always with the same explicit filter: another filter gives other
features. `PREPROCESSING` names all of it and is part of a model's id. What an image will take is
known from its header (cost.py) before it is decoded; above 12 million pixels it is made smaller on
the way, so that a photo of 48 million costs little more than one of 12.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, Image, ImageOps, UnidentifiedImageError

from pipeline.networks.cost import MAX_PIXELS, WHOLE_PIXELS, check_cost
from pipeline.networks.formats import FORMATS, recognised, without_metadata
from pipeline.quarantine import BadImageError, Reason

PREPROCESSING = "pillow, exif-transposed, rgb over white, bilinear"

# Pillow refuses files of twice as many pixels: what they take is looked at here, before they are
# decoded.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a task has one slot

# Pillow warns of bombs, which are looked at here, and of odd metadata. Filtered once and for all:
# `catch_warnings` in `decode` would lose the caller's own filters where threads decode at once.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(content: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode an image and resize it to a square.

    Parameters
    ----------
    content
        The bytes of a JPEG (also with several pictures, MPO), PNG, WebP, BMP, GIF (its first
        frame), TIFF or AVIF file.
    size
        The side of the square, in pixels.

    Returns
    -------
    array of uint8, shape (size, size, 3)
        RGB; what is transparent is white, like the background of Fruits-360.

    Raises
    ------
    BadImageError
        When the bytes are no image, are damaged, or would take more memory or time than one image
        may (cost.py).
    MemoryError
        When there is not enough memory, which may be taken by others.
    """
    if not content:
        raise BadImageError(Reason.EMPTY, "the file has 0 bytes")
    kind = recognised(content)
    try:
        with Image.open(io.BytesIO(without_metadata(content)), formats=FORMATS) as image:
            kind = str(image.format)
            check_cost(image, content, size)
            return _pixels(image, size)
    except (BadImageError, MemoryError):
        raise  # who takes the memory is not known here
    except UnidentifiedImageError:
        raise _unidentified(content, kind) from None
    except Image.DecompressionBombError as error:
        raise BadImageError(Reason.TOO_LARGE, f"{kind}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many kinds; none may end a job
        told = str(error) or type(error).__name__
        raise BadImageError(Reason.DAMAGED, f"{kind or 'image'}: {told}") from None


def _unidentified(content: bytes, kind: str | None) -> BadImageError:
    """Say what is wrong with bytes that no decoder takes, as far as their beginning tells."""
    if kind is None:
        return BadImageError(Reason.NOT_AN_IMAGE, f"begins with {content[:8]!r}")
    if kind in FORMATS:
        return BadImageError(Reason.DAMAGED, f"{kind}: its header cannot be read")
    return BadImageError(Reason.UNSUPPORTED, f"{kind}; convert it, to JPEG for one")


def _pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    # A JPEG is decoded at a half, a quarter or an eighth, never below twice the size wanted.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    small = _reduced(image, size) if image.width * image.height > WHOLE_PIXELS else image
    with suppress(Exception):  # EXIF that is none does not cost the picture
        ImageOps.exif_transpose(small, in_place=True)
    resized = _to_rgb(small).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Make an image smaller by whole factors, not below twice the size wanted."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    factors = (max(1, image.width // (2 * size)), max(1, image.height // (2 * size)))
    reduced = image.reduce(factors)
    reduced.info = image.info
    return reduced


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
