"""The master's page: tokens that it wants, and slots that it counts wrongly after a start."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline.cluster import master as the_master
from pipeline.cluster.master import await_recovery, miscounted, page_token
from tests.pages import Pages, serving

KEY = "A" * 64


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_a_token_is_signed_with_the_key() -> None:
    head, claims, signature = page_token(KEY).split(".")
    assert json.loads(decoded(head)) == {"alg": "HS384"}
    assert json.loads(decoded(claims)) == {"sub": "door"}
    right = hmac.new(decoded(KEY), f"{head}.{claims}".encode(), hashlib.sha384).digest()
    assert decoded(signature) == right
    assert page_token("B" * 64).split(".")[2] != signature


def test_a_worker_whose_slots_the_master_counts_wrongly_is_found() -> None:
    workers = [{"id": name, "coresused": 1} for name in ("right", "wrong", "silent")]
    own = {"right": {"coresused": 1}, "wrong": {"coresused": 0}}
    assert miscounted(workers, own) == {"wrong"}


@pytest.fixture
def master() -> Iterator[Pages]:
    """The page of a master that has found an application and two workers again."""
    with serving() as page, serving() as one, serving() as other:
        for worker in (one, other):
            worker.answers["/json/"] = {"coresused": 1}
        page.answers["/json/"] = {
            "status": "ALIVE",
            "activeapps": [{"id": "app-1"}],
            "workers": [
                {"id": name, "state": "ALIVE", "coresused": 1, "webuiaddress": worker.url}
                for name, worker in (("one", one), ("other", other))
            ],
        }
        yield page


def test_a_master_that_counts_right_is_left_alone(master: Pages) -> None:
    assert await_recovery(master.url, "a-token", looks=2, pause=0.01) == set()
    assert len(master.asked) == 2  # its status, and one look


def test_a_master_that_counts_a_slot_wrongly_in_every_look_is_told(master: Pages) -> None:
    state = master.answers["/json/"]
    assert isinstance(state, dict)
    state["workers"][0]["coresused"] = 2
    assert await_recovery(master.url, "a-token", looks=3, pause=0.01) == {"one"}
    assert len(master.asked) == 4
    assert {headers["Authorization"] for _, _, headers in master.asked} == {"Bearer a-token"}


def test_a_look_that_gets_no_answer_is_passed_over(
    master: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = master.answers["/json/"]
    assert isinstance(state, dict)
    state["workers"][0]["coresused"] = 2
    before_each_look = iter(
        [master.answers.clear, lambda: master.answers.update({"/json/": state})]
    )
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: next(before_each_look)())
    monkeypatch.setattr(the_master, "time", clock)
    assert await_recovery(master.url, "a-token", looks=2) == {"one"}
