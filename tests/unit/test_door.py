"""The door: redirects that stay inside, a password kept hashed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster.door import _keep_inside, keep_password


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
