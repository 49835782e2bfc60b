"""What every look needs to ask AWS: the knobs, and clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import boto3


class Asking:
    """The knobs that the questions depend on, and clients in their region.

    Parameters
    ----------
    knobs
        The settings of the role `ec2` that a question depends on; `ansible/roles/ec2` sends them.
    """

    def __init__(self, knobs: Mapping[str, Any]) -> None:
        self.knobs = knobs
        self.session = boto3.Session(region_name=knobs["region"])
        self._clients: dict[str, Any] = {}

    @property
    def ours(self) -> dict[str, Any]:
        """The filter of EC2 for what carries the cluster's tag."""
        return {"Name": "tag:Cluster", "Values": [self.knobs["cluster"]]}

    def client(self, service: str) -> Any:
        """Return the client of a service; making one takes a good part of a second."""
        if service not in self._clients:
            self._clients[service] = self.session.client(service)
        return self._clients[service]
