"""Gives this user's credentials for AWS to the processes of a run on this machine, ever fresh.

Credentials that end come from logins and from commands that only boto3 knows. The protocol is that
of containers on AWS (`AWS_CONTAINER_CREDENTIALS_FULL_URI`), which each S3 client speaks and asks
again before the end: "Container credential provider" in the AWS SDKs and Tools Reference Guide.
It listens on loopback, and answers to whoever has read a file that only this user may read.
"""

from __future__ import annotations

import hmac
import json
import secrets
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from pipeline.s3.access import Desk, scratch
from pipeline.s3.codes import DESK

ENOUGH = timedelta(seconds=60)  # left of their time, in which no request waits for new ones
AGAIN = timedelta(seconds=30)  # until a renewal that has failed is tried again
UNTOLD = timedelta(minutes=15)  # credentials that tell no end are looked up again after it


class CredentialsError(Exception):
    """The user's credentials cannot be had, in the words of whoever was asked."""


class Credentials:
    """What boto3's chain finds, found anew once two thirds of its time are over.

    Its own credentials would be renewed with each request in their last quarter of an hour: for
    those that a command gives, that is a login each time. Here it is done beside the requests, and
    what fails is tried again as long as the old ones hold.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._told: dict[str, str] = {}
        self._next = self._end = datetime.fromtimestamp(0, UTC)

    def fresh(self) -> dict[str, str]:
        """Return credentials as containers on AWS are told them.

        Raises
        ------
        NoCredentialsError
            When there are none.
        CredentialsError
            When they cannot be had, or not any more.
        """
        now = datetime.now(UTC)
        if now < self._next:
            return dict(self._told)
        if now < self._end - ENOUGH:
            if self._lock.acquire(blocking=False):
                Thread(target=self._renew_beside, name="login", daemon=True).start()
            return dict(self._told)
        with self._lock:
            if datetime.now(UTC) >= self._next:
                self._renew()
        return dict(self._told)

    def _renew_beside(self) -> None:
        try:
            self._renew()
        finally:
            self._lock.release()

    def _renew(self) -> None:
        now = datetime.now(UTC)
        try:
            keys, end = _find(now, is_first=not self._told)
        except CredentialsError:
            if now >= self._end:
                raise
            self._next = min(self._end, now + AGAIN)
            return
        self._told = {
            "AccessKeyId": keys.access_key,
            "SecretAccessKey": keys.secret_key,
            "Token": keys.token or "",
            "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self._end, self._next = end, now + (end - now) * 2 / 3


def _find(now: datetime, *, is_first: bool) -> tuple[Any, datetime]:
    """Go through boto3's chain; return keys and their end."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from botocore.session import get_session

    session = get_session()
    try:
        if not is_first:  # nobody waits at the terminal for a question then
            roles = session.get_component("credential_provider").get_provider("assume-role")
            roles._prompter = _ask_nobody
        found = session.get_credentials()
        keys = found.get_frozen_credentials() if found is not None else None
    except (BotoCoreError, ClientError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise CredentialsError(str(error) or type(error).__name__) from error
    if keys is None:
        raise NoCredentialsError
    end: datetime = getattr(found, "_expiry_time", None) or now + UNTOLD
    return keys, end.astimezone(UTC)


def _ask_nobody(question: str) -> str:
    raise EOFError(f"they have ended, and to renew them needs an answer ({question.strip(': ')})")


@cache
def credentials() -> Credentials:
    """Return the credentials of this process's user."""
    return Credentials()


def provider() -> Any:
    """Return what gives boto3 the same credentials as the others get."""
    from botocore.credentials import CredentialProvider, RefreshableCredentials

    def metadata() -> dict[str, str]:
        told = credentials().fresh()
        return {
            "access_key": told["AccessKeyId"],
            "secret_key": told["SecretAccessKey"],
            "token": told["Token"],
            "expiry_time": told["Expiration"],
        }

    class Provider(CredentialProvider):  # type: ignore[misc]
        METHOD = "fruits"

        def load(self) -> Any:
            return RefreshableCredentials.create_from_metadata(
                metadata(), metadata, self.METHOD, advisory_timeout=60, mandatory_timeout=10
            )

    return Provider()


@cache
def open_desk() -> Desk:
    """Open the desk of this process, which closes when it ends."""
    word = secrets.token_urlsafe(32)
    token_file = scratch() / "word"
    token_file.touch(mode=0o600)
    token_file.write_text(word)

    class Answer(BaseHTTPRequestHandler):
        timeout = 10  # seconds, for who connects and asks nothing

        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, word.encode()):
                self._say(403, {"message": "expected the word of this run"})
                return
            try:
                self._say(200, credentials().fresh())
            except Exception as error:  # whatever it is, the run is to end with it
                self._say(400, {"code": "CredentialsGone", "message": str(error)})

        def _say(self, status: int, content: dict[str, str]) -> None:
            body = json.dumps(content).encode()
            with suppress(ConnectionError):  # who asked has gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the terminal for the run."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    Thread(target=server.serve_forever, name="credentials", daemon=True).start()
    return Desk(f"http://127.0.0.1:{server.server_port}{DESK}", str(token_file))
