"""The hosts' network: a bridge on this machine, a namespace per host, and a wall around both.

Hosts talk to each other. Outward they reach the resolver and the package registries, on this
machine only the ports that are opened for them, and nothing else at all.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from tests.hosts.commands import HostsError, call

_LINKS = Path("/sys/class/net")
_NAMESPACES = Path("/run/netns")
_FORWARDING = "/proc/sys/net/ipv4/conf/{}/forwarding"
_NOTE = re.compile(r"forwarding of (\S+) was (\d)")


@dataclass(frozen=True)
class Network:
    """The names and addresses of one network, all derived from its tag and its subnet."""

    tag: str
    subnet: IPv4Network

    @property
    def bridge(self) -> str:
        """The machine's end of every cable."""
        return f"{self.tag}-br"

    @property
    def gateway(self) -> IPv4Address:
        """The machine's address on the bridge."""
        return self.subnet[1]

    def address(self, number: int) -> IPv4Address:
        """Return the address of a host, which are numbered from 1."""
        if 10 + number >= self.subnet.num_addresses - 1:
            raise HostsError(f"the subnet {self.subnet} has no address left; choose a larger one")
        return self.subnet[10 + number]

    def namespace(self, name: str) -> str:
        """Return the network namespace of a host."""
        return f"{self.tag}-{name}"

    def link(self, number: int) -> str:
        """Return the machine's end of a host's cable; the host's is its eth0."""
        return f"{self.tag}-{number}"  # a name would not fit into 15 characters

    def is_up(self) -> bool:
        """Tell whether the bridge and its wall stand."""
        return (_LINKS / self.bridge).exists() and self._table_exists()

    def up(
        self, resolvers: Iterable[str], registries: Iterable[tuple[str, int]], ports: Iterable[int]
    ) -> None:
        """Make the bridge and the wall around it; what stands of an earlier one goes first."""
        self.down()
        self._refuse_a_taken_subnet()
        outer = _outer_link()
        # A fixed hardware address: the bridge would take its lowest cable's, and change it with it.
        hardware = ("address", _hardware_address(self.gateway))
        call("ip", "link", "add", self.bridge, "mtu", _mtu(outer), *hardware, "type", "bridge")
        call("ip", "address", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", self.bridge)
        call("nft", "-f", "-", given=self._rules(resolvers, registries, ports))
        call("ip", "link", "set", self.bridge, "up")
        if outer:
            self._forward(outer)

    def down(self) -> None:
        """Take away the namespaces, the cables, the bridge, the wall and the forwarding."""
        for name in self.names():
            self.unplug(name, None)
        for link in self._links():
            if link != self.bridge:
                _quietly("ip", "link", "delete", link)
        if self._table_exists():
            call("nft", "delete", "table", "inet", self.tag)
        if (_LINKS / self.bridge).exists():
            self._stop_forwarding()
            call("ip", "link", "delete", self.bridge)
        if _NAMESPACES.is_dir() and not any(_NAMESPACES.iterdir()):
            _quietly("umount", _NAMESPACES)  # `ip netns` mounts it for the first namespace
            with suppress(OSError):
                _NAMESPACES.rmdir()

    def names(self) -> list[str]:
        """Return the names that have a namespace."""
        found = _NAMESPACES.glob(f"{self.tag}-*")
        return sorted(file.name.removeprefix(f"{self.tag}-") for file in found)

    def plug(self, name: str, number: int) -> None:
        """Give a name its namespace, with an address and a cable to the bridge."""
        space, link = self.namespace(name), self.link(number)
        if (_NAMESPACES / space).exists() and (_LINKS / link).exists():
            return
        if not self.is_up():
            raise HostsError("the hosts' network is not there; `up` makes it")
        self.unplug(name, number)
        mtu = _mtu(self.bridge)
        hardware = _hardware_address(self.address(number))
        call("ip", "netns", "add", space)
        call(
            *("ip", "link", "add", link, "mtu", mtu, "type", "veth"),
            *("peer", "name", "eth0", "netns", space, "mtu", mtu, "address", hardware),
        )
        call("ip", "link", "set", link, "master", self.bridge, "up")
        inside = ("ip", "-n", space)
        address = f"{self.address(number)}/{self.subnet.prefixlen}"
        call(*inside, "link", "set", "lo", "up")
        call(*inside, "address", "add", address, "dev", "eth0")
        call(*inside, "link", "set", "eth0", "up")
        call(*inside, "route", "add", "default", "via", self.gateway)

    def unplug(self, name: str, number: int | None) -> None:
        """Take away a name's cable, then its namespace with the processes that are in it.

        The cable goes first: peers then hear nothing more, as when the power fails, and the
        namespace does not wait for connections that nobody will close.
        """
        space = self.namespace(name)
        if number is not None and (_LINKS / self.link(number)).exists():
            _quietly("ip", "link", "delete", self.link(number))
        if (_NAMESPACES / space).exists():
            _quietly("ip", "-n", space, "link", "delete", "eth0")
            orphans = "net.ipv4.tcp_orphan_retries=1"
            _quietly("ip", "netns", "exec", space, "sysctl", "-qw", orphans)
            for pid in self._pids(space):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _quietly("ip", "netns", "delete", space)

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        call("ip", "link", "set", self.link(number), "down")

    def mend(self, number: int) -> None:
        """Put a host's cable back."""
        call("ip", "link", "set", self.link(number), "up")

    def is_plugged(self, number: int) -> bool:
        """Tell whether a host's cable is there and carries."""
        state = _LINKS / self.link(number) / "operstate"
        return state.exists() and state.read_text().strip() == "up"

    def open_port(self, port: int) -> None:
        """Let hosts reach a TCP port of this machine."""
        call("nft", "add", "element", "inet", self.tag, "ports", f"{{ {port} }}")

    def leftovers(self) -> list[str]:
        """Return what there is of this network."""
        return [
            *(f"network namespace {self.namespace(name)}" for name in self.names()),
            *(f"link {link}" for link in self._links()),
            *([f"nft table inet {self.tag}"] if self._table_exists() else []),
        ]

    def _links(self) -> list[str]:
        pattern = re.compile(rf"{self.tag}-(br|\d+)")
        return sorted(link.name for link in _LINKS.iterdir() if pattern.fullmatch(link.name))

    def _table_exists(self) -> bool:
        with suppress(HostsError):
            call("nft", "list", "table", "inet", self.tag)
            return True
        return False

    def _pids(self, space: str) -> list[int]:
        with suppress(HostsError):
            return [int(pid) for pid in call("ip", "netns", "pids", space).split()]
        return []

    def _refuse_a_taken_subnet(self) -> None:
        for route in json.loads(call("ip", "-4", "-json", "route", "show", "table", "main")):
            if route["dst"] != "default" and IPv4Network(route["dst"]).overlaps(self.subnet):
                raise HostsError(
                    f"the subnet {self.subnet} is in use on {route.get('dev')}; choose another one"
                )

    def _forward(self, outer: str) -> None:
        """Let packets pass between the bridge and the outer link.

        How it was before is noted on the bridge itself, which outlives a crash. Of several networks
        on one machine, each notes what it was before the first of them.
        """
        before = next((value for link, value in forwarding_notes().values() if link == outer), None)
        before = before or Path(_FORWARDING.format(outer)).read_text().strip()
        call("ip", "link", "set", self.bridge, "alias", f"forwarding of {outer} was {before}")
        for link in (outer, self.bridge):
            Path(_FORWARDING.format(link)).write_text("1")

    def _stop_forwarding(self) -> None:
        notes = forwarding_notes()
        outer, before = notes.pop(self.bridge, ("", ""))
        if outer and outer not in {link for link, _ in notes.values()}:
            Path(_FORWARDING.format(outer)).write_text(before)

    def _rules(
        self, resolvers: Iterable[str], registries: Iterable[tuple[str, int]], ports: Iterable[int]
    ) -> str:
        endpoints = [f"{address} . {port}" for address, port in registries]
        return f"""
table inet {self.tag} {{
    set resolvers {{ type ipv4_addr; {_elements(resolvers)} }}
    set registries {{ type ipv4_addr . inet_service; {_elements(endpoints)} }}
    set ports {{ type inet_service; {_elements(str(port) for port in ports)} }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname {self.bridge} oifname {self.bridge} accept
        oifname {self.bridge} ct state established,related accept
        oifname {self.bridge} drop
        iifname != {self.bridge} accept
        ct state established,related accept
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr . tcp dport @registries accept
        reject with icmpx admin-prohibited
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname != {self.bridge} accept
        ct state established,related accept
        icmp type echo-request accept
        tcp dport @ports accept
        drop
    }}
    chain outward {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {self.subnet} oifname != {self.bridge} masquerade
    }}
}}
"""


def _elements(items: Iterable[str]) -> str:
    listed = ", ".join(sorted(set(items)))
    return f"elements = {{ {listed} }};" if listed else ""


def forwarding_notes() -> dict[str, tuple[str, str]]:
    """Return, by bridge, the outer link and how its forwarding was before the first network."""
    found = {}
    for link in _LINKS.iterdir():
        with suppress(OSError):
            note = _NOTE.match((link / "ifalias").read_text())
            if note:
                found[link.name] = (note[1], note[2])
    return found


def _hardware_address(address: IPv4Address) -> str:
    return "02:00:" + ":".join(f"{part:02x}" for part in address.packed)


def _outer_link() -> str | None:
    routes = json.loads(call("ip", "-4", "-json", "route", "show", "default"))
    return str(routes[0]["dev"]) if routes else None


def _mtu(link: str | None) -> int:
    return int((_LINKS / link / "mtu").read_text()) if link else 1500


def _quietly(*command: object) -> None:
    """Run a command whose failure means that there was nothing to do."""
    with suppress(HostsError):
        call(*command)
