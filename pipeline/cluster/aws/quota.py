"""Looks whether the account may launch as many vCPUs as the cluster will have."""

from __future__ import annotations

import re

from botocore.exceptions import BotoCoreError, ClientError

from pipeline.cluster.aws.account import Account, reason
from pipeline.cluster.aws.asking import Asking
from pipeline.cluster.aws.instances import described_instances, state_in

# The quotas that count vCPUs of the standard families.
STANDARD = re.compile(r"(a|c|d|h|i|im|is|m|r|t|z)[0-9]")
QUOTAS = {"on-demand": "L-1216C47A", "spot": "L-34B43A08"}


def check_quota(asking: Asking, found: Account) -> None:
    """Compare the vCPUs that will be launched with the quota, if it may be read."""
    if other := sorted(name for name in found.types if not STANDARD.match(name)):
        found.notes.append(f"{', '.join(other)} has a vCPU quota of its own, not checked")
        return
    needed, used = _needed(asking, found), _used(asking)
    quotas = asking.client("service-quotas")
    for market, more in needed.items():
        if more <= 0:
            continue
        try:
            answer = quotas.get_service_quota(ServiceCode="ec2", QuotaCode=QUOTAS[market])
        except (BotoCoreError, ClientError) as error:
            found.notes.append(f"the vCPU quota could not be read: {reason(error)}")
            return
        quota = answer["Quota"]["Value"]
        if used[market] + more > quota:
            found.add_problem(
                f"Expected a quota of {used[market] + more} vCPUs for {market} instances "
                f"({more} to launch, {used[market]} in use), found {quota:g}; ask AWS for "
                f"more (Service Quotas, {QUOTAS[market]}), or take fewer or smaller instances."
            )


def _needed(asking: Asking, found: Account) -> dict[str, int]:
    """Return the vCPUs to launch on each market.

    Of a type that does not exist, which is a problem of its own, nothing is launched.
    """
    knobs, roles = asking.knobs, [one.role for one in found.instances]
    vcpus = {name: kind.vcpus for name, kind in found.types.items()}
    masters = 1 - roles.count("master")
    workers = max(0, knobs["workers"] - roles.count("worker"))
    needed = {"on-demand": masters * vcpus.get(knobs["master_type"], 0), "spot": 0}
    market = "spot" if knobs["spot"] else "on-demand"
    needed[market] += workers * vcpus.get(knobs["worker_type"], 0)
    return needed


def _used(asking: Asking) -> dict[str, int]:
    """Return the vCPUs of all standard instances in the account, on each market."""
    used = {"on-demand": 0, "spot": 0}
    for one in described_instances(asking, [state_in(["pending", "running"])]):
        if STANDARD.match(one["InstanceType"]):
            cpu = one.get("CpuOptions", {})
            market = "spot" if one.get("InstanceLifecycle") == "spot" else "on-demand"
            used[market] += cpu.get("CoreCount", 0) * cpu.get("ThreadsPerCore", 0)
    return used
