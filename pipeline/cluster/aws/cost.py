"""Says what the cluster costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cluster.aws.account import Instance


def cost(knobs: Mapping[str, Any], instances: Sequence[Instance]) -> str:
    """Name the instance hours, and their price if the admin wrote one down for each type."""
    if knobs.get("provision"):
        workers = sum(one.role == "worker" for one in instances)
        types = [knobs["master_type"]]
        types += [knobs["worker_type"]] * max(knobs["workers"], workers)
    else:
        types = [one.type for one in instances if one.state == "running"]
    hours, prices = Counter(types), knobs["prices"]
    parts = " and ".join(f"{count} x {name}" for name, count in hours.items()) or "no instance"
    if unpriced := sorted(hours.keys() - prices.keys()):
        money = f"ec2_prices has no price of {', '.join(unpriced)}"
    else:
        money = f"{sum(count * prices[name] for name, count in hours.items()):.4g} USD per hour"
    return f"{parts}; {money}"
