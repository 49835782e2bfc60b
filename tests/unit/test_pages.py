"""Pages of a listing are read as botocore reads them, and hold every key once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
from botocore.parsers import ResponseParserError, RestXMLParser
from botocore.session import get_session
from hypothesis import given
from hypothesis import strategies as st

from pipeline.s3.pages import Page, pages_of, parse_page

HEAD = '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
LISTING = get_session().get_service_model("s3").operation_model("ListObjectsV2").output_shape

# Any text but surrogates, which are none in UTF-8, and more of what makes keys odd.
KEYS = st.text(
    st.one_of(st.sampled_from("a/.+ %&<\r\n\0é"), st.characters(exclude_categories=["Cs"])),
    min_size=1,
    max_size=8,
)


def answer(keys: list[str], prefixes: Iterable[str] = (), token: str | None = None) -> bytes:
    """Write an answer as S3 does when it is asked for encoded keys."""
    objects = "".join(
        f"<Contents><Key>{quote_plus(key)}</Key><LastModified>2026-01-31T12:00:00.000Z"
        f"</LastModified><ETag>&quot;{number:032x}&quot;</ETag><Size>{number}</Size>"
        "<Owner><ID>1</ID><DisplayName>x</DisplayName></Owner></Contents>"
        for number, key in enumerate(keys)
    )
    below = "".join(
        f"<CommonPrefixes><Prefix>{quote_plus(name)}</Prefix></CommonPrefixes>" for name in prefixes
    )
    next_ = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    head = f"{HEAD}<Name>b</Name><Prefix></Prefix><EncodingType>url</EncodingType>{next_}"
    return f"{head}{objects}{below}</ListBucketResult>".encode()


@given(
    st.lists(KEYS, unique=True), st.lists(KEYS, unique=True), st.none() | st.text("a<&", min_size=1)
)
def test_a_page_says_what_botocores_parser_reads(
    keys: list[str], prefixes: list[str], token: str | None
) -> None:
    body = answer(keys, prefixes, token)
    page = parse_page(body)
    assert (page.keys, page.prefixes) == (keys, prefixes)
    theirs: dict[str, Any] = RestXMLParser().parse(
        {"body": body, "headers": {}, "status_code": 200}, LISTING
    )
    objects = theirs.get("Contents", [])
    assert page.lengths == [one["Size"] for one in objects]
    assert page.versions == [one["ETag"].strip('"') for one in objects]
    assert len(page.modified) == len(objects)
    assert page.token == theirs.get("NextContinuationToken")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Welcome to our hotel",
        answer(["a"])[:-20],
        answer(["a"]).replace(b"Size>", b"X>"),
    ],
    ids=["nothing", "another page", "cut off", "no size"],
)
def test_what_is_no_page_is_refused(body: bytes) -> None:
    with pytest.raises(ResponseParserError):
        parse_page(body)


class Bucket:
    """Answers `list_objects_v2` as S3's documentation has it."""

    def __init__(self, keys: list[str]) -> None:
        self.keys, self.asked = sorted(keys), 0

    def list_objects_v2(
        self,
        *,
        Prefix: str,
        MaxKeys: int,
        Delimiter: str = "",
        ContinuationToken: str = "",
        **_: str,
    ) -> dict[str, Page]:
        self.asked += 1
        found = {}
        for key in self.keys:
            if key.startswith(Prefix):
                below = key[len(Prefix) :].partition(Delimiter) if Delimiter else (key, "", "")
                name = f"{Prefix}{below[0]}{below[1]}" if below[1] else key
                found[name] = bool(below[1])
        names = sorted(name for name in found if name > ContinuationToken)
        some = names[:MaxKeys]
        keys = [name for name in some if not found[name]]
        prefixes = [name for name in some if found[name]]
        token = some[-1] if len(names) > MaxKeys else None
        columns = ([0] * len(keys), [""] * len(keys), [""] * len(keys), [None] * len(keys))
        return {"Page": Page(keys, *columns, prefixes, token)}


@given(
    st.lists(st.text("ab/", min_size=1, max_size=6), unique=True, max_size=60),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_each_key_below_the_prefix_is_in_one_page(keys: list[str], size: int, at_once: int) -> None:
    for prefix in ("", "a/"):
        pages = pages_of(Bucket(keys), "b", prefix, at_once=at_once, size=size)
        found = Counter(key for page in pages for key in page.keys)
        assert found == Counter(key for key in keys if key.startswith(prefix))


def test_what_fits_a_page_is_asked_for_once() -> None:
    bucket = Bucket([f"{folder}/{number}" for folder in "abc" for number in range(300)])
    assert len(list(pages_of(bucket, "b", ""))) == bucket.asked == 1
