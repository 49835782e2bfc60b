"""An AWS account of loopback: a moto server, behind a proxy that records and fails requests.

Nothing that is run with its environment can reach AWS: every client is pointed at the proxy, the
credentials are made up, and instance metadata and any other host lead to a closed port.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3

from pipeline.local.ports import free_ports

REGION = "eu-west-3"
LIVE = ["pending", "running", "stopping", "stopped"]
DEBIAN = "136693071363"
CLOSED = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Request:
    """One request to AWS: `action` is EC2's or IAM's own word, or S3's method and subresource."""

    service: str
    action: str
    parameters: dict[str, str]
    at: float

    @property
    def changes_something(self) -> bool:
        if self.service == "s3":
            return not self.action.startswith(("GET", "HEAD"))
        return not re.match(r"Describe|Get|List|Simulate", self.action)


@dataclass(frozen=True)
class Answer:
    """What the proxy says in moto's place."""

    status: int
    body: str
    content_type: str = "text/xml"


def error(code: str, message: str = "injected by the test", status: int = 400) -> Answer:
    """Return an error as EC2, IAM, STS and S3 clients read it, who each look elsewhere in it."""
    return Answer(
        status,
        f"<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
        f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        f"<Code>{code}</Code><Message>{message}</Message><RequestID>1</RequestID></Response>",
    )


Rule = Callable[[Request], Answer | None]
Edit = Callable[[Request, bytes], bytes]


class Account:
    """The account: what was asked of it, and the rules by which it answers otherwise than moto."""

    def __init__(self, moto_port: int) -> None:
        self.moto_port = moto_port
        self.direct = ["127.0.0.1", "localhost"]  # what its clients may reach beside it
        self.requests: list[Request] = []
        self.rules: list[Rule] = [simulation(), quota(32), _deleted_versions]
        self.edit: Edit = lambda _, content: content  # what becomes of moto's own answers
        self._lock = threading.Lock()
        account = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, BrokenPipeError):
                    self.close_connection = True

            def pass_on(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                request = _read(self.command, self.path, dict(self.headers), body)
                answer = account.note(request)
                if answer is None:
                    status, headers, content = account.ask_moto(
                        self.command, self.path, dict(self.headers), body
                    )
                    content = account.edit(request, content)
                else:
                    status, content = answer.status, answer.body.encode()
                    headers = {"Content-Type": answer.content_type}
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def note(self, request: Request) -> Answer | None:
        with self._lock:
            self.requests.append(request)
            return next((answer for rule in self.rules if (answer := rule(request))), None)

    def ask_moto(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.moto_port, timeout=600)
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            drop = {"transfer-encoding", "connection", "server", "date"}
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
            if method != "HEAD":
                kept = {n: v for n, v in kept.items() if n.lower() != "content-length"}
            return answer.status, kept, content
        finally:
            connection.close()

    @contextmanager
    def answering(self, *rules: Rule) -> Iterator[None]:
        """Answer by these rules for the time of the block."""
        self.rules = [*rules, *self.rules]
        try:
            yield
        finally:
            self.rules = self.rules[len(rules) :]

    @contextmanager
    def recording(self) -> Iterator[list[Request]]:
        """Record what is asked in the block."""
        start = len(self.requests)
        seen: list[Request] = []
        try:
            yield seen
        finally:
            seen += self.requests[start:]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this for AWS, and to reach nothing else."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "ANSIBLE_", "BOTO"))
            and not name.lower().endswith("_proxy")
        }
        return kept | {
            "AWS_ACCESS_KEY_ID": "AKIAMADEUPFORTESTS",
            "AWS_SECRET_ACCESS_KEY": "made-up-for-tests",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": CLOSED,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_MAX_ATTEMPTS": "2",
            "http_proxy": CLOSED,
            "https_proxy": CLOSED,
            "no_proxy": ",".join(self.direct),
        }

    def client(self, service: str, region: str = REGION) -> Any:
        """Return a client that speaks with moto itself: what a test asks is not recorded."""
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=f"http://127.0.0.1:{self.moto_port}",
            aws_access_key_id="AKIAMADEUPFORTESTS",
            aws_secret_access_key="made-up-for-tests",
        )


def instances(aws: Account, cluster: str = "orchard") -> list[dict]:
    answer = aws.client("ec2").describe_instances(
        Filters=[
            {"Name": "tag:Cluster", "Values": [cluster]},
            {"Name": "instance-state-name", "Values": LIVE},
        ]
    )
    return [one for reservation in answer["Reservations"] for one in reservation["Instances"]]


def tags(one: dict) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in one["Tags"]}


def by_role(aws: Account, state: str = "running", cluster: str = "orchard") -> Counter[str]:
    found = instances(aws, cluster)
    assert {one["State"]["Name"] for one in found} <= {state}
    return Counter(tags(one)["Role"] for one in found)


def things(aws: Account, cluster: str = "orchard") -> list[str]:
    """Everything that is tagged as a cluster's, or on its path, and still exists."""
    ec2, iam = aws.client("ec2"), aws.client("iam")
    ours = [{"Name": "tag:Cluster", "Values": [cluster]}]
    endpoints = ec2.describe_vpc_endpoints(Filters=ours)["VpcEndpoints"]
    path = f"/fruits/{cluster}/"
    return [
        *(one["InstanceId"] for one in instances(aws, cluster)),
        *(one["VpcId"] for one in ec2.describe_vpcs(Filters=ours)["Vpcs"]),
        *(one["SubnetId"] for one in ec2.describe_subnets(Filters=ours)["Subnets"]),
        *(
            one["InternetGatewayId"]
            for one in ec2.describe_internet_gateways(Filters=ours)["InternetGateways"]
        ),
        *(one["RouteTableId"] for one in ec2.describe_route_tables(Filters=ours)["RouteTables"]),
        *(one["VpcEndpointId"] for one in endpoints if one["State"] not in ("deleted", "deleting")),
        *(one["GroupId"] for one in ec2.describe_security_groups(Filters=ours)["SecurityGroups"]),
        *(
            one["LaunchTemplateName"]
            for one in ec2.describe_launch_templates(Filters=ours)["LaunchTemplates"]
        ),
        *(one["RoleName"] for one in iam.list_roles(PathPrefix=path)["Roles"]),
        *(
            one["InstanceProfileName"]
            for one in iam.list_instance_profiles(PathPrefix=path)["InstanceProfiles"]
        ),
    ]


def changes(requests: list[Request]) -> list[str]:
    """Return which of the requests change something, by their action."""
    return [request.action for request in requests if request.changes_something]


def _read(method: str, path: str, headers: dict[str, str], body: bytes) -> Request:
    scope = re.search(r"Credential=[^/]+/[^/]+/[^/]+/([^/]+)/", headers.get("Authorization", ""))
    service = scope[1] if scope else "none"
    url = urlsplit(path)
    if service == "s3":
        query = parse_qs(url.query, keep_blank_values=True)
        word = next(iter(sorted(query)), "")
        parameters = {"path": url.path, "body": body.decode(errors="replace")[:4000]}
        return Request(service, f"{method} {word}".strip(), parameters, time.monotonic())
    if target := headers.get("X-Amz-Target"):
        action = target.rpartition(".")[2]
        return Request(service, action, json.loads(body or b"{}"), time.monotonic())
    form = {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}
    return Request(service, form.pop("Action", f"{method} {url.path}"), form, time.monotonic())


def simulation(*denied: str) -> Rule:
    """Answer IAM's simulation, which moto lacks: all is allowed but some actions."""

    def rule(request: Request) -> Answer | None:
        if request.action != "SimulatePrincipalPolicy":
            return None
        asked = [v for name, v in request.parameters.items() if name.startswith("ActionNames.")]
        members = "".join(
            f"<member><EvalActionName>{action}</EvalActionName>"
            f"<EvalDecision>{'implicitDeny' if action in denied else 'allowed'}</EvalDecision>"
            "</member>"
            for action in asked
        )
        return Answer(
            200,
            '<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
            "<SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated>"
            f"<EvaluationResults>{members}</EvaluationResults></SimulatePrincipalPolicyResult>"
            "</SimulatePrincipalPolicyResponse>",
        )

    return rule


def quota(vcpus: int) -> Rule:
    """Answer the question for EC2's quota, which moto does not know."""

    def rule(request: Request) -> Answer | None:
        if request.action != "GetServiceQuota":
            return None
        body = json.dumps({"Quota": {"Value": vcpus}})
        return Answer(200, body, "application/x-amz-json-1.1")

    return rule


def _deleted_versions(request: Request) -> Answer | None:
    """Answer the deletion of older versions of a launch template, which moto lacks."""
    if request.action != "DeleteLaunchTemplateVersions":
        return None
    return Answer(
        200,
        '<DeleteLaunchTemplateVersionsResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"/>',
    )


def fail(action: str, code: str = "InternalError", *, nth: int = 1) -> Rule:
    """Fail the n-th request for an action, once; a client that tries again is failed again."""
    count = 0

    def rule(request: Request) -> Answer | None:
        nonlocal count
        if request.action != action:
            return None
        count += 1
        return error(code, status=400) if count == nth else None

    return rule


def fail_after(event: str, action: str, code: str = "InternalError") -> Rule:
    """Fail every request for an action once another was asked for."""
    happened = False

    def rule(request: Request) -> Answer | None:
        nonlocal happened
        happened |= request.action == event
        return error(code) if happened and request.action == action else None

    return rule


def only(allowed: int) -> Rule:
    """Let so many requests that change something pass, and fail those after them."""
    left = allowed

    def rule(request: Request) -> Answer | None:
        nonlocal left
        if not request.changes_something:
            return None
        left -= 1
        return error("UnsupportedOperation") if left < 0 else None

    return rule


@contextmanager
def account(folder: Path) -> Iterator[Account]:
    """Start moto and the proxy, with Debian's images in the account; stop both at the end."""
    images = folder / "images.json"
    images.write_text(json.dumps(list(_debian_images())))
    (port,) = free_ports("127.0.0.1", 1)
    with (folder / "moto.log").open("wb") as log:
        moto = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("moto_server")),
                "-H",
                "127.0.0.1",
                "-p",
                str(port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"MOTO_AMIS_PATH": str(images), "MOTO_ENABLE_ISO_REGIONS": "false"},
            cwd=folder,
        )
    try:
        _wait_for(port, moto)
        running = Account(port)
        serving = threading.Thread(target=running.server.serve_forever, daemon=True)
        serving.start()
        try:
            yield running
        finally:
            running.server.shutdown()
            running.server.server_close()
            serving.join(10)
    finally:
        moto.terminate()
        moto.wait(120)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto did not start: see moto.log") from None
            time.sleep(0.1)


def _debian_images() -> Iterator[dict[str, object]]:
    for number, (architecture, name) in enumerate((("x86_64", "amd64"), ("arm64", "arm64"))):
        for day in ("20260101", "20260601"):
            yield {
                "ami_id": f"ami-{number}{day}debian"[:21],
                "state": "available",
                "public": True,
                "owner_id": DEBIAN,
                "image_location": f"amazon/debian-12-{name}-{day}",
                "sriov": "simple",
                "root_device_type": "ebs",
                "root_device_name": "/dev/xvda",
                "description": "Debian 12",
                "image_type": "machine",
                "architecture": architecture,
                "name": f"debian-12-{name}-{day}-1234",
                "virtualization_type": "hvm",
                "hypervisor": "xen",
                "creation_date": f"{day[:4]}-{day[4:6]}-{day[6:]}T00:00:00.000Z",
            }
