"""Pages of an S3 listing: parsed fast, and asked for several prefixes at a time.

botocore signs, retries and renews credentials as it does for all else; only its parser, which takes
some 100 ms of processor time for the 1,000 keys of a page, is replaced for this one answer. Keys
come as S3 has them, whatever their slashes and dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from html import unescape
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

import boto3
from botocore.credentials import CredentialResolver
from botocore.handlers import _handle_200_error
from botocore.parsers import (
    PROTOCOL_PARSERS,
    ResponseParserError,
    ResponseParserFactory,
    RestXMLParser,
)
from botocore.session import get_session

from pipeline.s3.codes import ARCHIVES

PREFIXES_AT_ONCE = 16
LEVELS = 3  # of folders that are looked through for prefixes to list side by side

END = "</ListBucketResult>"
is_odd = re.compile("[%+&]").search  # a key that is not written as it is


class Page(NamedTuple):
    """Up to 1,000 objects, a column for each of their properties.

    Attributes
    ----------
    keys, lengths, modified, versions
        The key, bytes, time as S3 writes it (`2026-01-31T12:00:00.000Z`) and ETag of each object.
    archives
        The storage class of each object that has to be restored before it is given, else None.
    prefixes
        What lies one level below, where a delimiter was given.
    token
        What to ask for the next page with; None after the last.
    """

    keys: list[str]
    lengths: list[int]
    modified: list[str]
    versions: list[str]
    archives: list[str | None]
    prefixes: list[str]
    token: str | None

    def objects(self) -> Iterator[tuple[str, int, str, str, str | None]]:
        """Yield key, length, time, ETag and archive of each object."""
        columns = (self.keys, self.lengths, self.modified, self.versions, self.archives)
        return zip(*columns, strict=True)


def parse_page(body: bytes) -> Page:
    """Read the XML of a ListObjectsV2 answer, which S3 writes as flat as it can be.

    By patterns: with a parser that makes a tree, most of a page's cost is the tree.

    Raises
    ------
    ResponseParserError
        When it is none, as botocore's own parser does.
    """
    text = body.decode()
    if not text.rstrip().endswith(END):
        raise ResponseParserError(f"expected a page of an S3 listing, found {text[-80:]!r}")
    is_encoded = "<EncodingType>url</EncodingType>" in text  # what XML cannot hold comes as %0D
    read = unquote_plus if is_encoded else unescape

    def column(name: str, before: str = "") -> list[str]:
        return re.findall(f"{before}<{name}>([^<]*)</{name}>", text)

    page = Page(
        [read(key) if is_odd(key) else key for key in column("Key")],
        [int(size) for size in column("Size")],
        column("LastModified"),
        [tag.replace("&quot;", "").replace("&#34;", "").strip('"') for tag in column("ETag")],
        _archives_in(text),
        [read(name) for name in column("Prefix", before=r"<CommonPrefixes>\s*")],
        next(map(unescape, column("NextContinuationToken")), None),
    )
    expected = text.count("<Contents>")
    if any(len(column) != expected for column in page[:5]):
        raise ResponseParserError("expected size, time and ETag of each object of an S3 listing")
    return page


def _archives_in(text: str) -> list[str | None]:
    """Return the storage class of each object that is archived, else None; most pages have none."""
    if not any(f"<StorageClass>{name}<" in text for name in ARCHIVES):
        return [None] * text.count("<Contents>")
    classes = (
        re.search("<StorageClass>([^<]*)<", one.partition("</Contents>")[0])
        for one in text.split("<Contents>")[1:]
    )
    return [found[1] if found and found[1] in ARCHIVES else None for found in classes]


class _Parser(RestXMLParser):  # type: ignore[misc]
    """botocore's parser, but for pages of a listing."""

    def _do_parse(self, response: dict[str, Any], shape: Any) -> Any:
        if shape is not None and shape.name == "ListObjectsV2Output":
            return {"Page": parse_page(response["body"])}
        return super()._do_parse(response, shape)


class _ParserFactory(ResponseParserFactory):  # type: ignore[misc]
    def create_parser(self, protocol_name: str) -> Any:
        parser = _Parser if protocol_name == "rest-xml" else PROTOCOL_PARSERS[protocol_name]
        return parser(**self._defaults)


def client(provider: Any = None, **options: Any) -> Any:
    """Return boto3's S3 client whose `list_objects_v2` answers with a `Page`, under that name.

    Parameters
    ----------
    provider
        Of botocore's kind; None goes through all of boto3's chain.
    """
    session = get_session()
    if provider is not None:
        session.register_component("credential_provider", CredentialResolver([provider]))
    session.register_component("response_parser_factory", _ParserFactory())
    s3 = boto3.Session(botocore_session=session).client("s3", **options)
    # botocore parses each answer of 200 once before, as it may be an error all the same.
    s3.meta.events.unregister("before-parse.s3.*", _handle_200_error)
    s3.meta.events.register("before-parse.s3.*", _look_for_an_error)
    return s3


def _look_for_an_error(operation_model: Any, response_dict: dict[str, Any], **event: Any) -> None:
    """Let botocore ask again for a page that is an error, or has not come whole."""
    if operation_model.name != "ListObjectsV2":
        _handle_200_error(operation_model, response_dict, **event)
    elif response_dict["status_code"] == 200 and not response_dict["body"].rstrip().endswith(
        END.encode()
    ):
        response_dict["status_code"] = 500


class _Part(NamedTuple):
    """Something to ask for: all below a prefix, or the one level there."""

    prefix: str
    is_level: bool
    depth: int
    token: str | None = None


def pages_of(
    s3: Any, bucket: str, prefix: str, *, at_once: int = PREFIXES_AT_ONCE, size: int = 1000
) -> Iterator[Page]:
    """Yield the pages of all keys below a prefix, in no order; each key is in one of them.

    The folders below are listed side by side, which needs no order of keys: some servers have one
    of their own. A level of more than a page is listed as a whole, one page after the other.
    Memory holds a page for each of the `at_once` requests, and a page's worth of prefixes a level.

    Parameters
    ----------
    s3
        What `client` returns.
    size
        Keys of a page; S3 gives 1,000 at the most.
    """

    def ask(part: _Part) -> Page:
        more = {"Delimiter": "/"} if part.is_level else {}
        if part.token is not None:
            more["ContinuationToken"] = part.token
        page: Page = s3.list_objects_v2(Bucket=bucket, Prefix=part.prefix, MaxKeys=size, **more)[
            "Page"
        ]
        return page

    first = ask(_Part(prefix, is_level=False, depth=0))
    if first.token is None:
        yield first
        return
    todo = [_Part(prefix, is_level=True, depth=0)]
    running: dict[Future[Page], _Part] = {}
    pool = ThreadPoolExecutor(at_once)
    try:
        while todo or running:
            while todo and len(running) < at_once:
                part = todo.pop()
                running[pool.submit(ask, part)] = part
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for answer in done:
                part, page = running.pop(answer), answer.result()
                if part.is_level and page.token is not None:
                    todo.append(part._replace(is_level=False))
                    continue
                yield page
                if page.token is not None:
                    todo.append(part._replace(token=page.token))
                below = len(todo) + len(running) + len(page.prefixes)
                is_level = below < at_once and part.depth + 1 < LEVELS
                todo += [_Part(name, is_level, part.depth + 1) for name in page.prefixes]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
