"""Whose fault it is that an image cannot be read: its own, the run's, or the network's."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import StorageError, UnreadableError
from pipeline.failures import MOST, ReadFailures
from pipeline.listing.inventory import _archive_of
from pipeline.quarantine import READ, Again, BadImageError, Reason, left_alone, word_of
from pipeline.reading import ImageReader
from pipeline.s3.access import S3Settings
from pipeline.s3.codes import REMEDIES, answer_in, reason_of
from pipeline.s3.pages import parse_page
from pipeline.storage import Address
from pipeline.table.feature_table import WRITTEN
from pipeline.task import Reads
from tests.conftest import PROJECT

KMS = "User: arn:aws:sts::1:assumed-role/x is not authorized to perform: kms:Decrypt"
SSE_C = "The object was stored using a form of Server Side Encryption. The correct parameters must"


class Answers(BaseHTTPRequestHandler):
    """An S3 that answers as the key says: status, code and message, in S3's words."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        status, code, message = self.server.answer  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read_from(server: ThreadingHTTPServer, status: int, code: str, message: str = "why") -> object:
    server.answer = status, code, message  # type: ignore[attr-defined]
    s3 = S3Settings(f"http://127.0.0.1:{server.server_port}", "eu-west-3", "key", "secret")
    return ImageReader(Address("fruits", "images"), s3).open()("a.jpg")


@pytest.mark.parametrize(
    ("status", "code", "message", "told"),
    [
        (404, "NoSuchKey", "gone", "vanished: deleted since it was listed"),
        (404, "", "", "refused: S3 answered 404"),
        (405, "MethodNotAllowed", "a marker", "refused: S3 answered MethodNotAllowed"),
        (403, "InvalidObjectState", "Cold &amp; far", "archived: S3 answered InvalidObjectState"),
        (403, "AccessDenied", "Access Denied", "denied: S3 answered AccessDenied (Access Denied)"),
        (403, "", "", "denied: S3 answered 403"),
        (403, "AccessDenied", KMS, "encrypted: S3 answered AccessDenied"),
        (400, "KMS.DisabledException", "disabled", "encrypted: S3 answered KMS.DisabledException"),
        (400, "InvalidRequest", SSE_C, "encrypted: S3 answered InvalidRequest"),
        (400, "KeyTooLongError", "too long", "bad name: S3 answered KeyTooLongError"),
        (451, "LegalHold", "court", "refused: S3 answered LegalHold (court)"),
    ],
)
def test_what_is_wrong_with_one_object_is_told_in_s3s_own_words(
    server: ThreadingHTTPServer, status: int, code: str, message: str, told: str
) -> None:
    with pytest.raises(BadImageError) as refused:
        read_from(server, status, code, message)
    assert str(refused.value).startswith(told)
    assert refused.value.reason.stage == READ
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (404, "NoSuchBucket", "the bucket does not exist"),
        (403, "InvalidAccessKeyId", "check the credentials"),
        (403, "SignatureDoesNotMatch", "the secret key is wrong"),
        (403, "RequestTimeTooSkewed", "the clock of this machine, or of a worker, is wrong"),
        (400, "ExpiredToken", "the credentials have expired"),
        (400, "InvalidToken", "the session token is wrong"),
        (400, "AuthorizationHeaderMalformed", "in another region"),
        (301, "PermanentRedirect", "in another region"),
        (401, "", "the credentials are wrong"),
    ],
)
def test_what_is_wrong_with_the_run_blames_no_image(
    server: ThreadingHTTPServer, status: int, code: str, remedy: str
) -> None:
    with pytest.raises(StorageError, match=rf"S3 answered {code or status}: .*{remedy}"):
        read_from(server, status, code)


@pytest.mark.parametrize(
    ("status", "code"), [(400, "RequestTimeout"), (409, ""), (400, "ThrottlingException")]
)
def test_an_s3_that_is_busy_blames_no_image(
    server: ThreadingHTTPServer, status: int, code: str
) -> None:
    with pytest.raises(OSError, match=f"fruits/images/a.jpg: .*{status}"):
        read_from(server, status, code)


def test_a_host_without_credentials_blames_no_image() -> None:
    place = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
    told = f"Generic S3 error: Error performing GET {place} in 1ms - status code: 404 Not Found"
    assert answer_in(told) == ("NoCredentials", "")
    assert reason_of("NoCredentials", "") is None


@pytest.mark.parametrize("key", ["/lead.jpg", "a/b.jpg/"])
def test_a_key_that_would_be_another_ones_is_not_asked_for(key: str) -> None:
    with pytest.raises(BadImageError, match="bad name"):
        ImageReader(Address("fruits", "images"), S3Settings("http://127.0.0.1:1")).open()(key)


@pytest.mark.parametrize(
    ("kind", "tier", "archive"),
    [
        ("STANDARD", None, None),
        ("GLACIER_IR", None, None),
        ("GLACIER", None, "GLACIER"),
        ("INTELLIGENT_TIERING", "ARCHIVE_INSTANT_ACCESS", None),
        ("INTELLIGENT_TIERING", "DEEP_ARCHIVE", "INTELLIGENT_TIERING, DEEP_ARCHIVE"),
    ],
)
def test_an_inventory_tells_what_has_to_be_restored(
    kind: str, tier: str | None, archive: str | None
) -> None:
    row = {"storage_class": kind, "intelligent_tiering_access_tier": tier}
    assert _archive_of(row) == archive
    assert _archive_of({}) is None


def test_a_disk_that_is_gone_is_not_a_thousand_deleted_images(tmp_path: Path) -> None:
    read = ImageReader(Address.parse(str(tmp_path / "usb")), S3Settings()).open()
    with pytest.raises(StorageError, match="is a disk gone"):
        read("a.jpg")


def test_codes_of_the_run_and_of_objects_are_no_image_reasons_twice() -> None:
    assert not REMEDIES.keys() & {"NoSuchKey", "AccessDenied", "InvalidObjectState"}


def test_an_archived_object_is_told_by_its_listing() -> None:
    def contents(key: str, kind: str) -> str:
        more = f"<StorageClass>{kind}</StorageClass>" if kind else ""
        time = "2026-01-01T00:00:00.000Z"
        return (
            f"<Contents><Key>{key}</Key><LastModified>{time}</LastModified><ETag>1</ETag>"
            f"<Size>1</Size>{more}</Contents>"
        )

    kinds = {"a": "STANDARD", "b": "GLACIER", "c": "", "d": "GLACIER_IR", "e": "DEEP_ARCHIVE"}
    body = "".join(contents(key, kind) for key, kind in kinds.items())
    page = parse_page(f"<ListBucketResult>{body}</ListBucketResult>".encode())
    assert page.keys == list(kinds)
    assert page.archives == [None, "GLACIER", None, None, "DEEP_ARCHIVE"]


# --- when an image is tried again ------------------------------------------------------------


def test_reasons_are_tried_again_as_often_as_they_may_pass() -> None:
    assert left_alone(is_daily_due=True) == ["bad name"]
    assert {"denied", "archived", "encrypted", "bad name"} <= set(left_alone(is_daily_due=False))
    assert not {"vanished", "replaced"} & set(left_alone(is_daily_due=False))


def test_words_tell_reasons_apart() -> None:
    assert len({reason.word for reason in Reason}) == len(Reason)
    for reason in Reason:
        assert word_of(str(BadImageError(reason, "detail: more"))) == reason.word


def test_the_readme_lists_the_reasons() -> None:
    text = (PROJECT / "README.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| `([\w ]+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    again = {Again.EACH_RUN: "in each run", Again.DAILY: "once a day", Again.NEVER: "never"}
    assert [(stage, word, rule) for stage, word, _, rule in told] == [
        (reason.stage, reason.word, again[reason.again]) for reason in Reason
    ]


# --- before a commit -------------------------------------------------------------------------


def answers(*reads: Reads) -> pa.Table:
    return pa.Table.from_batches([one.told() for one in reads], WRITTEN)


def failures(folder: Path, before: Iterable[str] = (), share: float = 0.01) -> ReadFailures:
    reader = ImageReader(Address.parse(str(folder)), S3Settings())
    return ReadFailures(reader, share, lambda: before)


def test_reads_are_counted_once_for_images_that_are_new() -> None:
    reads = Reads()
    row = {"path": "a", "length": 1, "known_reason": None, "archive": None}
    denied = BadImageError(Reason.DENIED, "S3 answered AccessDenied")
    reads.count(row, b"content")
    reads.count(row | {"path": "b"}, denied)
    reads.count(row | {"path": "c"}, BadImageError(Reason.DAMAGED, "is told later"))
    reads.count(row | {"known_reason": "denied: S3"}, denied)
    reads.count(row | {"archive": "GLACIER"}, BadImageError(Reason.ARCHIVED, "by its listing"))
    reads.count(row | {"length": 1 << 40}, BadImageError(Reason.TOO_LARGE, "by its listing"))
    assert reads == Reads(3, 1, "b: " + str(denied), "b: " + str(denied), "a")


@pytest.mark.parametrize(
    ("tried", "failed", "share", "ends"),
    [
        (MOST, MOST, 0.01, False),
        (5_000, MOST + 1, 0.01, True),
        (20_000, 200, 0.01, False),
        (20_000, 201, 0.01, True),
        (5_000, 5_000, 1.0, False),
    ],
)
def test_too_many_that_cannot_be_read_end_the_run(
    tmp_path: Path, tried: int, failed: int, share: float, *, ends: bool
) -> None:
    check = failures(tmp_path, share=share).check
    first = Reads(tried // 2, failed // 2, "a.jpg: vanished: deleted")
    second = Reads(tried - tried // 2, failed - failed // 2, "b.jpg: vanished: deleted")
    if ends:
        with pytest.raises(UnreadableError, match=rf"{failed:,} of {tried:,}.*--max-unreadable"):
            check(answers(first, second))
    else:
        check(answers(first))
        check(answers(second))


def test_a_refusal_is_believed_while_another_image_can_still_be_read(tmp_path: Path) -> None:
    refused = "a.jpg: denied: S3 answered AccessDenied"
    (tmp_path / "here.jpg").write_bytes(b"content")
    one = Reads(1, 1, refused, refused)
    failures(tmp_path).check(answers(one, Reads(1, 0, good="here.jpg")))
    failures(tmp_path, before=["gone.jpg", "here.jpg"]).check(answers(one))
    for check in (failures(tmp_path).check, failures(tmp_path, before=["gone.jpg"]).check):
        with pytest.raises(UnreadableError, match=r"it gives none, as a\.jpg: denied: S3 answered"):
            check(answers(one))
    with pytest.raises(UnreadableError, match="policy"):  # readable a moment ago, and now not
        failures(tmp_path).check(answers(one, Reads(1, 0, good="gone.jpg")))


def test_a_task_that_is_refused_reads_again_what_it_was_given() -> None:
    row = {"path": "a", "length": 1, "known_reason": None, "archive": None}
    denied = BadImageError(Reason.DENIED, "S3 answered AccessDenied")
    for again, trouble in ((b"content", False), (denied, True)):
        reads = Reads()
        reads.count(row, b"content")
        reads.count(row | {"path": "b"}, denied)
        reads.verify(lambda _, again=again: again)
        assert bool(reads.trouble) is trouble


def test_an_image_that_is_tried_again_and_denied_now_is_verified_too() -> None:
    reads = Reads()
    row = {"path": "a", "length": 1, "known_reason": "vanished: deleted", "archive": None}
    reads.count(row, BadImageError(Reason.DENIED, "S3 answered AccessDenied"))
    assert (reads.tried, reads.failed, reads.refused) == (
        *(0, 0),
        "a: denied: S3 answered AccessDenied",
    )


def test_what_a_task_heard_of_the_run_ends_it_in_one_line(tmp_path: Path) -> None:
    heard = Reads(trouble="s3a://fruits: S3 answered ExpiredToken: get new ones.")
    with pytest.raises(StorageError, match=r"ExpiredToken: get new ones\. What was computed"):
        failures(tmp_path).check(answers(Reads(5), heard))
