"""What a look has found, as the playbooks read it, and how an error of AWS becomes a problem.

`find_...` writes into an `Account` what it found, `check_...` only problems and notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from botocore.exceptions import BotoCoreError, ClientError

DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"}


@dataclass(frozen=True)
class Instance:
    """A host of the cluster; `hours` since its start, if it runs."""

    id: str
    role: str
    market: str
    type: str
    state: str
    public: str
    private: str
    launched: str
    hours: float
    vpc: str


@dataclass(frozen=True)
class InstanceType:
    """What an instance of a type has."""

    vcpus: int
    memory_mb: int
    architecture: str


@dataclass(frozen=True)
class Image:
    """What an instance starts from (an AMI), and the smallest disk that holds it."""

    id: str
    name: str
    root: str
    smallest_gb: int


@dataclass(frozen=True)
class Subnet:
    """A network of the cluster, and the VPC in which it lies."""

    vpc: str
    cidr: str


@dataclass
class Account:
    """What was found, and in `problems` what must be mended before anything is made."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    account: str = ""
    caller: str = ""
    zone: str = ""
    cost: str = ""
    types: dict[str, InstanceType] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    things: dict[str, list[str]] = field(default_factory=dict)
    loose_volumes: list[str] = field(default_factory=list)
    subnets: list[Subnet] = field(default_factory=list)
    templates: dict[str, str] = field(default_factory=dict)
    bucket: str = "unknown"
    bucket_gb: float | None = None

    def add_problem(self, text: str) -> None:
        """Note a problem, once: a permission that is missing may be missed by several questions."""
        if text not in self.problems:
            self.problems.append(text)

    @contextmanager
    def explained(self, service: str) -> Iterator[None]:
        """Turn an error of AWS into a problem that says what to do."""
        try:
            yield
        except ClientError as error:
            asked = f"{service}:{error.operation_name}"
            if error.response["Error"]["Code"] in DENIED:
                self.add_problem(
                    f"Expected the permission {asked} for {self.caller}, found it missing; "
                    "ansible/admin-policy.json lists all that an admin needs."
                )
            elif service == "sts":
                self.add_problem(
                    f"Expected AWS credentials that are valid, found: {reason(error)}. Get new "
                    "ones (aws sso login, for one), then run again."
                )
            else:
                self.add_problem(
                    f"Expected an answer to {asked}, found: {reason(error)}. Run again."
                )
        except BotoCoreError as error:
            self.add_problem(
                f"Expected AWS to answer ({service}), found: {error}. Set AWS_PROFILE or the "
                "AWS_* variables of your credentials, check the network, then run again."
            )


def reason(error: BotoCoreError | ClientError) -> str:
    """Return what an error says, with the code that AWS gave it."""
    if isinstance(error, ClientError):
        return f"{error.response['Error']['Code']} ({error.response['Error'].get('Message', '')})"
    return str(error)
