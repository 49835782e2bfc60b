"""The door: tokens for Spark's pages, redirects that stay inside, a password kept hashed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import door
from pipeline.door import _keep_inside, await_recovery, keep_password, miscounted, page_token
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


@pytest.mark.parametrize(
    ("to", "stays"),
    [
        ("http://10.0.0.1:8080/spark/proxy/app-1/jobs/", "/proxy/app-1/jobs/"),
        ("http://127.0.0.1:8080/app/?id=1", "/app/?id=1"),
        ("/spark", "/"),
    ],
)
def test_a_redirect_stays_below_the_door(to: str, stays: str) -> None:
    response = SimpleNamespace(headers={"Location": to})
    _keep_inside("/spark")(response)
    assert response.headers["Location"] == stays


def test_an_answer_that_is_no_redirect_is_left_alone() -> None:
    response = SimpleNamespace(headers={})
    _keep_inside("/spark")(response)
    assert response.headers == {}


def test_a_password_is_hashed_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "password"
    assert keep_password(file, "correct horse")
    first = file.read_text()
    assert "correct horse" not in first
    assert file.stat().st_mode & 0o077 == 0
    assert not keep_password(file, "correct horse")
    assert file.read_text() == first
    assert keep_password(file, "battery staple")
    assert file.read_text() != first


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
    monkeypatch.setattr(door, "time", clock)
    assert await_recovery(master.url, "a-token", looks=2) == {"one"}
