"""A photo without its metadata: the same pixels, the same way up, and nobody is told of."""

from __future__ import annotations

import os
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from pipeline.networks.decode import decode
from pipeline.networks.metadata import without_metadata
from pipeline.storage import Address, FolderStore
from pipeline.upload import upload
from tests.corpus import picture

SECRETS = (b"ORCHARD-OWNER", b"ORCHARD-CAMERA", b"ORCHARD-NOTE", b"ORCHARD-XMP")
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>ORCHARD-XMP</x:xmpmeta>"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int) -> bytes:
    """What a phone writes: who, which camera, where, and how to turn it."""
    told = Image.Exif()
    told[0x0112] = orientation
    told[0x010F], told[0x8298] = "ORCHARD-CAMERA", "ORCHARD-OWNER"
    told.get_ifd(0x8825).update({1: "N", 2: (48.0, 51.0, 30.0), 3: "E", 4: (2.0, 21.0, 7.0)})
    return told.tobytes()


def photo(form: str, orientation: int = 6) -> bytes:
    image, content = picture().resize((64, 48)), BytesIO()
    if form == "PNG":
        texts = PngInfo()
        texts.add_text("Comment", "ORCHARD-NOTE")
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        image.save(content, form, exif=exif(orientation), pnginfo=texts, icc_profile=PROFILE)
    elif form == "GIF":
        image.save(content, form, comment=b"ORCHARD-NOTE")
    elif form == "JPEG":
        options = {"comment": b"ORCHARD-NOTE", "xmp": XMP, "icc_profile": PROFILE}
        image.save(content, form, exif=exif(orientation), progressive=True, **options)
    elif form == "MPO":
        image.save(content, form, exif=exif(orientation), save_all=True, append_images=[image])
    else:
        image.save(content, form, exif=exif(orientation), xmp=XMP, icc_profile=PROFILE)
    return content.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_pixels_stay_and_what_is_told_goes(form: str, orientation: int) -> None:
    whole = photo(form, orientation)
    assert any(secret in whole for secret in SECRETS)
    stripped = without_metadata(whole)
    assert stripped is not None
    assert not any(secret in stripped for secret in SECRETS)
    with Image.open(BytesIO(stripped)) as image:
        assert dict(image.getexif()) == (
            {} if orientation == 1 or form == "GIF" else {0x0112: orientation}
        )
        assert not image.getexif().get_ifd(0x8825)  # the place
        kept = image.info.get("icc_profile")
    assert kept == (PROFILE if form in ("JPEG", "PNG", "WEBP") else None)
    np.testing.assert_array_equal(decode(stripped, 64), decode(whole, 64))
    assert without_metadata(stripped) == stripped


def test_what_lies_behind_a_picture_goes_with_it() -> None:
    for form in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = photo(form)
        assert without_metadata(whole + b"\0ORCHARD-NOTE") == without_metadata(whole)


TURNED = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><r tiff:Orientation=\"6\"/></x:xmpmeta>"


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_a_photo_that_is_turned_by_xmp_alone_stays_turned(form: str) -> None:
    content = BytesIO()
    picture().resize((64, 48)).save(content, form, xmp=TURNED)
    stripped = without_metadata(content.getvalue())
    assert stripped is not None
    np.testing.assert_array_equal(decode(stripped, 64), decode(content.getvalue(), 64))


def test_what_nobody_knows_goes_too() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    whole = photo("PNG")
    told = whole[:33] + chunk(b"caBX", b"ORCHARD-NOTE") + whole[33:]
    assert without_metadata(told) == without_metadata(whole)
    whole = photo("JPEG")
    preview = b"JFXX\0\x10ORCHARD-NOTE"
    told = whole[:2] + b"\xff\xe0" + (len(preview) + 2).to_bytes(2, "big") + preview + whole[2:]
    told = told[:2] + b"\xff\xf3\0\x0eORCHARD-NOTE" + told[2:]
    assert without_metadata(told) == without_metadata(whole)
    whole = photo("WEBP")
    told = whole + b"C2PA\x0c\0\0\0ORCHARD-NOTE"
    told = told[:4] + (len(told) - 8).to_bytes(4, "little") + told[8:]
    assert without_metadata(told) == without_metadata(whole)
    whole = photo("GIF")
    note = b"\x0cORCHARD-NOTE\0"
    for unknown in (
        b"!\xff\x0bMGKIPTC0000" + note,
        b"!\x01\x0c" + bytes(12) + note,
        b"!\x77" + note,
    ):
        assert without_metadata(whole[:-1] + unknown + b";") == without_metadata(whole)
    assert without_metadata(b"BMI,name,gps\n1,ORCHARD-OWNER") is None
    assert without_metadata(b"RIFF\0\0\0\0WEBP") is None


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "BMP"])
def test_a_format_that_this_is_not_done_to_is_told(form: str) -> None:
    content = BytesIO()
    picture().save(content, form)
    assert without_metadata(content.getvalue()) is None


@given(st.data())
def test_a_damaged_file_is_told_or_tells_nothing(data: st.DataObject) -> None:
    whole = bytearray(photo(data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings(action="ignore"):
        stripped = without_metadata(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    assert stripped is None or len(stripped) <= len(whole) + 64


def test_an_upload_sends_photos_without_it_and_keeps_back_what_it_cannot_be_taken_from(
    tmp_path: Path,
) -> None:
    source, target = (
        FolderStore(Address.parse(str(tmp_path / name))) for name in ("mine", "theirs")
    )
    for form in ("JPEG", "PNG"):
        source.write(f"apple/1.{form.lower()}", photo(form))
    content = BytesIO()
    picture().save(content, "TIFF")
    source.write("apple/2.tif", content.getvalue())
    source.write("apple/notes.txt", b"ORCHARD-NOTE")
    target.folder.mkdir()
    done = upload(source, target, strip_metadata=True)
    assert (done.sent, done.skipped, done.kept_back) == (2, 0, {"TIFF": 1, ".txt": 1})
    found = {entry.key: target.read(entry.key) or b"" for entry in target.list()}
    assert found.keys() == {"apple/1.jpeg", "apple/1.png"}
    assert not any(secret in content for content in found.values() for secret in SECRETS)
    again = upload(source, target, strip_metadata=True)
    assert (again.sent, again.skipped) == (0, 2)
    source.write("apple/1.png", photo("PNG", orientation=8))
    os.utime(source.folder / "apple/1.png", (time.time() + 5,) * 2)
    assert upload(source, target, strip_metadata=True).sent == 1
