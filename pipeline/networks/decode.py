"""Turns the bytes of an image into the pixels that a network reads, or says why it cannot.

Pillow decodes and resizes, always with the same explicit filter: another filter gives other
features. `PREPROCESSING` names all of it and is part of a model's id. What an image will take is
known from its header (cost.py) before it is decoded; above 12 million pixels it is made smaller on
the way, so that a photo of 48 million costs little more than one of 12. Colours of another profile
than sRGB, such as the Display P3 of phones, become sRGB once the image is small.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.networks.cost import MAX_PIXELS, WHOLE_PIXELS, check_cost, is_large_webp
from pipeline.networks.formats import (
    FORMATS,
    LARGE_PROFILE,
    cut_off,
    jpeg_segments,
    recognised,
    without_large_texts,
)
from pipeline.networks.metadata import bare
from pipeline.quarantine import BadImageError, Reason

MOST_PAGES = 16  # of a TIFF, looked through for the first that is no preview
NEW_SUBFILE_TYPE = 254  # TIFF 6.0
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 262, 284, 339
_SRGB = ImageCms.createProfile("sRGB")
NEARLY = 2  # of 255: a profile that moves no colour by more is taken for sRGB
_SOME_COLOURS = Image.fromarray(
    np.stack(np.meshgrid(*[np.array([0, 64, 128, 192, 255], np.uint8)] * 3), axis=-1).reshape(
        5, 25, 3
    )
)

PREPROCESSING = "pillow, exif-transposed, rgb over white, bilinear"

# Pillow refuses files of twice as many pixels: what they take is looked at here, before they are
# decoded.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a task has one slot
pillow_heif.options.DECODE_THREADS = 1
pillow_heif.register_heif_opener(thumbnails=False)

# Pillow warns of bombs, which are looked at here, and of odd metadata. Filtered once and for all:
# `catch_warnings` in `decode` would lose the caller's own filters where threads decode at once.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(content: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Decode an image and resize it to a square.

    Parameters
    ----------
    content
        The bytes of a JPEG (also with several pictures, MPO), PNG, WebP, BMP, GIF (its first
        frame), TIFF, AVIF or HEIC file.
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
    missing = cut_off(content) if kind in ("HEIF", "AVIF") else None
    if missing:  # of a picture in tiles, those that are there would be taken
        raise BadImageError(Reason.DAMAGED, f"{kind}: {missing}")
    try:
        return _decoded(content, size, kind)
    except BadImageError as error:
        picture = bare(content) if error.reason is Reason.DAMAGED else None
        if picture is None or picture == content:
            raise
    return _decoded(picture, size, kind)  # metadata never costs the picture


def _decoded(content: bytes, size: int, kind: str | None) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(without_large_texts(content)), formats=FORMATS) as image:
            kind = str(image.format)
            _leave_previews(image)
            check_cost(image, content, size)
            _check_tiff(image)
            _check_light(image)
            return _pixels(_large_webp(image, content) if is_large_webp(image) else image, size)
    except (BadImageError, MemoryError):
        raise  # who takes the memory is not known here
    except UnidentifiedImageError:
        raise _unidentified(content, kind) from None
    except Image.DecompressionBombError as error:
        raise BadImageError(Reason.TOO_LARGE, f"{kind}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many kinds; none may end a job
        told = str(error).strip() or type(error).__name__
        rare = _rare_jpeg(content) if kind == "JPEG" else None
        if rare:
            raise _unidentified(content, kind) from None
        if "nsupported" in told:
            raise BadImageError(Reason.UNSUPPORTED, f"{kind or 'image'}: {told}") from None
        raise BadImageError(Reason.DAMAGED, f"{kind or 'image'}: {told}") from None


def _unidentified(content: bytes, kind: str | None) -> BadImageError:
    """Say what is wrong with bytes that no decoder takes, as far as their beginning tells."""
    if kind is None:
        return BadImageError(Reason.NOT_AN_IMAGE, f"begins with {content[:8]!r}")
    told = _rare_jpeg(content) if kind == "JPEG" else None
    if told:
        return BadImageError(Reason.UNSUPPORTED, f"JPEG, {told}; save it with 8 bits a colour")
    if kind in FORMATS:
        rare = ", or it is of a rare kind" if kind == "TIFF" else ""
        return BadImageError(Reason.DAMAGED, f"{kind}: its header cannot be read{rare}")
    return BadImageError(Reason.UNSUPPORTED, f"{kind}; convert it, to JPEG for one")


def _rare_jpeg(content: bytes) -> str | None:
    """Say of which kind a JPEG is that is not decoded (ITU-T T.81: frames and their precision)."""
    with suppress(ValueError, IndexError):
        for marker, segment in jpeg_segments(content):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if marker in (0xC3, 0xC7, 0xCB, 0xCF):
                    return f"lossless, of {segment[4]} bits"
                return f"of {segment[4]} bits" if segment[4] != 8 else None
            if marker == 0xF7:
                return "of the kind JPEG-LS"
    return None


def _check_light(image: Image.Image) -> None:
    """Refuse pixels whose white is not that of paper: HDR, by its transfer (ITU-T H.273)."""
    told = image.info.get("nclx_profile")
    if isinstance(told, dict) and told.get("transfer_characteristics") in (16, 18):
        raise BadImageError(Reason.UNSUPPORTED, f"{image.format} in HDR; save it without")


def _leave_previews(image: Image.Image) -> None:
    """Go to the first page of a TIFF that is no preview of another."""
    for page in range(1, MOST_PAGES):
        if not getattr(image, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0) & 1:
            return
        with suppress(EOFError):
            image.seek(page)


def _check_tiff(image: Image.Image) -> None:
    """Refuse a TIFF of which Pillow makes other colours than it has, and says nothing."""
    if image.format != "TIFF":
        return
    tags = getattr(image, "tag_v2", {})
    bits = max(tags.get(BITS_PER_SAMPLE, (1,)))
    if bits not in (1, 2, 4, 8, 16, 32):
        raise BadImageError(Reason.UNSUPPORTED, f"TIFF of {bits} bits; save it with 8")
    if 2 in tags.get(SAMPLE_FORMAT, (1,)) and bits <= 16:
        raise BadImageError(Reason.UNSUPPORTED, "TIFF of signed values; save it with 8 bits")
    if bits <= 8:
        return
    if tags.get(PLANAR_CONFIGURATION, 1) == 2:
        told = f"TIFF with its colours in planes of {bits} bits; save it with 8"
        raise BadImageError(Reason.UNSUPPORTED, told)
    if tags.get(PHOTOMETRIC, 1) == 0:
        told = f"TIFF of {bits} bits in which 0 is white; save it with 8"
        raise BadImageError(Reason.UNSUPPORTED, told)


def _large_webp(image: Image.Image, content: bytes) -> Image.Image:
    """Decode a WebP without the two canvases that Pillow keeps for an animation."""
    import imagecodecs

    pixels = imagecodecs.webp_decode(content, hasalpha=True)
    # In Pillow's own form: it takes the pixels as they lie there.
    whole = Image.frombuffer("RGBA", image.size, pixels, "raw", "RGBA", 0, 1)
    whole.info = image.info
    return whole


def _pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    # A JPEG is decoded at a half, a quarter or an eighth, never below twice the size wanted.
    image.draft(None, (2 * size, 2 * size))
    image.load()
    if image.format == "BMP" and _is_all_transparent(image):
        image = image.convert("RGB")  # its fourth byte, which nobody has set
    small = _reduced(image, size) if image.width * image.height > WHOLE_PIXELS else image
    with suppress(Exception):  # EXIF that is none does not cost the picture
        ImageOps.exif_transpose(small, in_place=True)
    profile = small.info.get("icc_profile") if _has_colours(small) else None
    resized = _to_rgb(small).resize((size, size), Image.Resampling.BILINEAR)
    transform = _to_srgb(profile) if isinstance(profile, bytes) else None
    if transform is not None:
        ImageCms.applyTransform(resized, transform, inPlace=True)
    return np.asarray(resized)


def _is_all_transparent(image: Image.Image) -> bool:
    return image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _has_colours(image: Image.Image) -> bool:
    """Tell whether a profile of red, green and blue is about this image's pixels."""
    return image.mode in ("RGB", "RGBA", "RGBX", "P", "PA")


@lru_cache(maxsize=32)  # cameras write the same few profiles into all of their photos
def _to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """Return what makes sRGB of a profile's colours; None for sRGB, and for a profile that is none.

    Measured on 300 photos of Fruits-360: taken for sRGB, a photo in Display P3 has features at a
    cosine distance of 0.011 from its own (median; 0.031 for one in 20), where the nearest other
    photo is at 0.069; its nearest neighbour is of its variety in 98.7 of 100 cases, else in 99.3.
    """
    if len(profile) > LARGE_PROFILE or profile[16:20] != b"RGB ":
        return None
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(found, _SRGB, "RGB", "RGB")
        seen = ImageCms.applyTransform(_SOME_COLOURS, transform)
        moves = np.abs(np.asarray(seen).astype(int) - np.asarray(_SOME_COLOURS)).max()
        return transform if moves > NEARLY else None
    except Exception:  # a profile that is none does not cost the picture
        return None


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
    if image.mode == "La":
        image = image.convert("LA")
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
