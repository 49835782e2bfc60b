"""What S3's error codes tell: whose fault it is, an object's own or the run's, and what to do.

The codes and their meaning: "Error responses" in the API reference of Amazon S3.
"""

from __future__ import annotations

import re
from html import unescape

from pipeline.quarantine import Reason

_REGION = "the bucket is in another region; name it (AWS_REGION, or fs.s3a.endpoint.region)"
_CLOCK = "the clock of this machine, or of a worker, is wrong; set it"
_EXPIRED = "the credentials have expired; get new ones"
_TOKEN = "the session token is wrong, or of other keys; check the credentials"  # noqa: S105
_CLOSED = "the account, or its access to S3, is closed; ask AWS"
_POLICY = "these credentials may not do this; check the role's and the bucket's policy"

# What is wrong with the run, whatever object it asks for.
REMEDIES = {
    "NoSuchBucket": "the bucket does not exist; check its name or create it",
    "InvalidAccessKeyId": "the access key is not known there; check the credentials",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials",
    "AuthFailure": "the credentials are wrong; check them",
    "401": "the credentials are wrong; check them",
    "NoCredentials": "no credentials were found; give this host a role, or name keys",
    "CredentialsGone": "your own credentials have ended; log in anew",
    "InvalidTokenId": _TOKEN,
    "IncorrectEndpoint": _REGION,
    "NoSuchAccessPoint": "there is no such access point; check its name",
    "InvalidPayer": _CLOSED,
    "UserProjectMissing": "whoever asks has to pay there; name a project",
    "MissingSecurityHeader": "the request was not signed; check the credentials",
    "MissingAuthenticationToken": "the request was not signed; check the credentials",
    "InvalidSecurity": "the credentials are wrong; check them",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _TOKEN,
    "InvalidClientTokenId": _TOKEN,
    "UnrecognizedClientException": _TOKEN,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "Redirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AccountProblem": _CLOSED,
    "AllAccessDisabled": _CLOSED,
    "NotSignedUp": _CLOSED,
    "UserSuspended": _CLOSED,
    "InvalidBucketName": "S3 takes no bucket of this name; check it",
    "NotImplemented": "this S3 cannot do it; ask its maker, or take another",
}
# What such a code means where no image is asked for.
_ELSEWHERE = {
    "AccessDenied": _POLICY,
    "403": _POLICY,
    "404": "there is no such bucket or object; check the address",
}
_OF_THE_OBJECT = {
    "NoSuchKey": Reason.VANISHED,
    "NoSuchVersion": Reason.VANISHED,
    "InvalidObjectState": Reason.ARCHIVED,
    "AccessDenied": Reason.DENIED,
    "403": Reason.DENIED,
    "KeyTooLongError": Reason.BAD_NAME,
    "InvalidURI": Reason.BAD_NAME,
}
_BUSY = re.compile("RequestTimeout|OperationAborted|SlowDown|Throttl|TooManyRequest|LimitExceeded")
_BUSY_STATUS = {"407", "408", "409", "425", "429"}
# Where hosts and containers ask for credentials, before they ask S3.
_CREDENTIALS = re.compile(r"//169\.254\.|//\[fd00:ec2|/latest/meta-data|/v2/credentials")
DESK = "/credentials-of-this-user"  # where pipeline.s3.desk gives them
ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")  # storage classes that give nothing without a restore


def explained(code: str, message: str = "") -> str:
    """Say what a code means and what to do, in a part of a sentence."""
    return {**_ELSEWHERE, **REMEDIES}.get(code, message or "no more is known").rstrip(".")


def reason_of(code: str, message: str) -> Reason | None:
    """Return why an image that was asked for was not given; None where the run is to blame."""
    if code in REMEDIES:
        return None
    if code.startswith("KMS.") or "kms:" in message or "erver Side Encryption" in message:
        return Reason.ENCRYPTED
    return _OF_THE_OBJECT.get(code, Reason.REFUSED)


def answer_in(text: str) -> tuple[str, str] | None:
    """Return code and message of S3's answer to a GET from the text of obstore's error.

    None where S3 has given no answer that says anything of the request: it is down, far away or
    busy.
    """
    told, _, _ = text.partition("\nDebug source")
    if "redirect without LOCATION" in told:
        return "PermanentRedirect", "a redirect without an address"
    if DESK in told:
        return "CredentialsGone", ""
    if _CREDENTIALS.search(told):
        return "NoCredentials", ""
    status = re.search(r"performing GET .* status code: (4\d\d)", told)
    if status is None:
        return None
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", told) for tag in ("Code", "Message"))
    found = " ".join(unescape(message[1]).split()) if message else ""
    told_code = code[1] if code else status[1]
    if _BUSY.search(told_code) or status[1] in _BUSY_STATUS:
        return None
    return told_code, found
