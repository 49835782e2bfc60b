"""The role `ec2` documents each of its knobs, and the admin's page and policy are in step."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

ANSIBLE = Path(__file__).parents[2] / "ansible"
ROLE = ANSIBLE / "roles/ec2"


def test_each_knob_is_documented_and_has_a_default() -> None:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())
    assert defaults.keys() == specs["argument_specs"]["main"]["options"].keys()


def test_the_admins_file_names_only_knobs_that_exist() -> None:
    file = ANSIBLE.parent / "inventory/group_vars/all.yml"
    knobs = {name for name in yaml.safe_load(file.read_text()) if name.startswith("ec2_")}
    assert knobs <= yaml.safe_load((ROLE / "defaults/main.yml").read_text()).keys()


def test_the_admins_policy_allows_nothing_by_wildcard() -> None:
    policy = json.loads((ANSIBLE / "admin-policy.json").read_text())
    actions = [action for statement in policy["Statement"] for action in statement["Action"]]
    assert len(actions) == len(set(actions))
    assert not [action for action in actions if "*" in action]
    for statement in policy["Statement"]:
        makes_roles = any(action.startswith("iam:Create") for action in statement["Action"])
        assert not makes_roles or statement["Resource"] != ["*"]
