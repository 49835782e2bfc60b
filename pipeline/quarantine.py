"""Why an image has no features: a closed set of reasons, and when each is tried again.

A reason is kept as `word: detail`. README.md lists the words.
"""

from __future__ import annotations

from datetime import timedelta
from enum import Enum

READ, DECODE = "read", "decode"  # the stages at which an image can end in quarantine
DAILY = timedelta(days=1)


class Again(Enum):
    """When an image is tried again, other than after a change of its own or by `--retry-...`."""

    EACH_RUN = "each run"
    DAILY = "once a day"
    NEVER = "never"


class Reason(Enum):
    """A reason: the stage, the word that begins it, and when the image is tried again."""

    VANISHED = READ, "vanished", Again.EACH_RUN
    REPLACED = READ, "replaced", Again.EACH_RUN
    ARCHIVED = READ, "archived", Again.DAILY
    DENIED = READ, "denied", Again.DAILY
    ENCRYPTED = READ, "encrypted", Again.DAILY
    REFUSED = READ, "refused", Again.DAILY
    UNREADABLE = READ, "unreadable", Again.DAILY
    BAD_NAME = READ, "bad name", Again.NEVER

    EMPTY = DECODE, "empty", Again.NEVER
    NOT_AN_IMAGE = DECODE, "not an image", Again.NEVER
    TOO_LARGE = DECODE, "too large", Again.NEVER
    UNSUPPORTED = DECODE, "unsupported", Again.NEVER
    DAMAGED = DECODE, "damaged", Again.NEVER
    TOO_MUCH_MEMORY = DECODE, "too much memory", Again.NEVER
    TOO_SLOW = DECODE, "too slow", Again.NEVER
    CRASHES = DECODE, "crashes the decoder", Again.NEVER

    def __init__(self, stage: str, word: str, again: Again) -> None:
        self.stage = stage
        self.word = word
        self.again = again

    @property
    def is_refusal(self) -> bool:
        """Tell whether it may as well be the fault of credentials, bucket or disk."""
        return self in (Reason.DENIED, Reason.ENCRYPTED, Reason.REFUSED, Reason.UNREADABLE)


class BadImageError(ValueError):
    """An image that gives no features for a reason of its own; the message is kept with it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.word}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImageError], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


def left_alone(*, is_daily_due: bool) -> list[str]:
    """Return the words of the reasons at reading for which an image is not tried again now."""
    tried = {Again.EACH_RUN, Again.DAILY} if is_daily_due else {Again.EACH_RUN}
    return [r.word for r in Reason if r.stage == READ and r.again not in tried]


def words(again: Again) -> list[str]:
    """Return the words of the reasons at reading that are tried again at a time."""
    return [r.word for r in Reason if r.stage == READ and r.again is again]


def word_of(reason: str) -> str:
    """Return the word with which a kept reason begins."""
    return reason.partition(":")[0]
