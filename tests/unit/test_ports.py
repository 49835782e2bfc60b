"""Ports for servers that take a while to get to theirs."""

from __future__ import annotations

import socket

import pytest

from pipeline.errors import ClusterError
from pipeline.local import ports
from pipeline.local.ports import ELSEWHERE, LINUX_SAYS, LOWEST, free_ports


def only(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "LOWEST", port)
    monkeypatch.setattr(ports, "_first_of_connections", lambda: port + 1)


def test_no_connection_is_given_a_servers_port() -> None:
    found = free_ports("127.0.0.1", 50)
    assert len(set(found)) == 50
    first = int(LINUX_SAYS.read_text().split()[0]) if LINUX_SAYS.exists() else ELSEWHERE
    assert all(LOWEST <= port < first for port in found)


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        (taken,) = free_ports("127.0.0.1", 1)
        server.bind(("127.0.0.1", taken))
        only(taken, monkeypatch)
        monkeypatch.setattr(ports, "_given", set())
        with pytest.raises(
            ClusterError, match=rf"from {taken} to {taken} on 127\.0\.0\.1, found 0"
        ):
            free_ports("127.0.0.1", 1)


def test_a_port_is_given_once_though_its_server_does_not_listen_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (given,) = free_ports("127.0.0.1", 1)
    only(given, monkeypatch)
    with pytest.raises(ClusterError, match="found 0"):
        free_ports("127.0.0.1", 1)
