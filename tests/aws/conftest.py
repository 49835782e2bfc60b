"""The account that the tests of the playbooks for EC2 share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.aws.account import Account, account


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """An account of loopback, empty but for Debian's images."""
    with account(tmp_path_factory.mktemp("aws")) as running:
        yield running
