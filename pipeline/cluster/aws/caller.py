"""Looks at who asks: the account, what the caller may do, and the credentials."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from pipeline.cluster.aws.account import Account, reason
from pipeline.cluster.aws.asking import Asking

SESSION_OF_ROLE = re.compile(r"arn:.*:sts::\d+:assumed-role/([^/]+)/")


def find_caller(asking: Asking, found: Account) -> None:
    """Find whose the credentials are."""
    who = asking.client("sts").get_caller_identity()
    found.account, found.caller = who["Account"], who["Arn"]


def check_permissions(asking: Asking, found: Account) -> None:
    """Name the permissions that are missing, if the caller may ask IAM for it."""
    if found.caller.endswith(":root"):
        return
    policy = json.loads(Path(asking.knobs["admin_policy"]).read_text())
    iam = asking.client("iam")
    try:
        source = _source(iam, found.caller)
        denied = {
            action
            for statement in policy["Statement"]
            for action in _denied(iam, source, statement, found.account)
        }
    except (BotoCoreError, ClientError) as error:
        found.notes.append(f"permissions could not be checked: {reason(error)}")
        return
    if denied:
        found.add_problem(
            f"Expected {source} to be allowed what ansible/admin-policy.json lists, found "
            f"these missing: {', '.join(sorted(denied))}. Give it that policy."
        )


def _source(iam: Any, caller: str) -> str:
    """Return the ARN whose policies count: for a session, its role's."""
    session = SESSION_OF_ROLE.match(caller)
    if not session:
        return caller
    # The role's path, which roles of single sign-on have, is not in the session's name.
    role: str = iam.get_role(RoleName=session[1])["Role"]["Arn"]
    return role


def _denied(iam: Any, source: str, statement: Mapping[str, Any], account: str) -> Iterator[str]:
    resources = [
        one.replace("::*:", f"::{account}:").replace("/*", "/fruits")
        for one in statement["Resource"]
    ]
    pages = iam.get_paginator("simulate_principal_policy").paginate(
        PolicySourceArn=source, ActionNames=statement["Action"], ResourceArns=resources
    )
    for page in pages:
        for one in page["EvaluationResults"]:
            if one["EvalDecision"] != "allowed" and not one.get("MissingContextValues"):
                yield one["EvalActionName"]
