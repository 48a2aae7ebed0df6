"""A small internet on one machine: namespaces with hosts behind real NATs.

Root, iproute2 and nftables are needed; `missing` says what is not there. Members are
threads of the test process, each with a trio loop of its own and in its own network
namespace (setns works per thread), so a member costs no process and no import.

Every name carries this process's id and a number, and everything lives in the namespaces
and goes with them; those of a test process that was killed are removed by the next.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import trio

from pals.net.host import open_host
from pals.net.nat.traversal import TraversalOptions, open_traversal
from pals.net.nat.upnp import UpnpGateway
from pals.types import PeerId
from tests.integration.net.harness import ECHO, Members, echo, identity
from tests.integration.net.nat.members import Member

Nat = Literal["port-preserving", "other-port", "symmetric"]

PUBLIC_NET = "45.45.45"
PORT = 4001
CLONE_NEWNET = 0x40000000
JOIN_S = 20.0

T = TypeVar("T")
_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def missing() -> str:
    """Return why there can be no lab on this machine, or an empty string; it tries."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian package {package})"
    _remove_orphans()
    try:
        with open_lab("symmetric"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"namespaces or NAT are not permitted here: {error.stderr.strip()[:200]}"


def _remove_orphans() -> None:
    """Remove what test processes left that were killed."""
    for path in Path("/run/netns").glob("pals-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            _run("ip", "netns", "del", path.name)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=stdin)
    return done.stdout


def _exec(namespace: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace)


@contextmanager
def namespaces(*kinds: str) -> Iterator[list[str]]:
    """Make network namespaces; their links and rules go with them."""
    number = next(_numbers)
    with ExitStack() as stack:
        names = []
        for kind in kinds:
            name = f"pals-{os.getpid()}-{number}-{kind}"
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            names.append(name)
        yield names


@dataclass(frozen=True, slots=True)
class Site:
    """A host behind a NAT of its own.

    Attributes:
        host: Namespace of the host, whose address is ``10.<number>.0.2``.
        router: Namespace of the NAT, whose public address is ``45.45.45.<number>``.
    """

    number: int
    host: str
    router: str

    @property
    def public_ip(self) -> str:
        return f"{PUBLIC_NET}.{self.number}"

    def translate(self, nat: Nat) -> None:
        """Give the router the rules of a NAT, in place of those it had."""
        rule = {
            "port-preserving": "masquerade",
            "other-port": f"tcp sport {PORT} snat to {self.public_ip}:{PORT + 20_000}",
            "symmetric": "masquerade fully-random",
        }[nat]
        rules = f"""
            table ip lab
            delete table ip lab
            table ip lab {{
                chain out {{
                    type nat hook postrouting priority 100;
                    oifname "wan" {rule}
                    oifname "wan" masquerade
                }}
                chain through {{
                    type filter hook forward priority 0; policy drop;
                    iifname "lan" accept
                    ct state established,related accept
                    ct status dnat accept
                }}
                chain here {{
                    type filter hook input priority 0;
                    iifname "wan" ct state new drop
                }}
            }}
        """
        _run(*_exec(self.router), "nft", "-f", "-", stdin=rules)

    def forward(self, external_port: int) -> str:
        """Have the router forward a port, as its owner may; return the address to announce."""
        rules = f"""
            table ip forwards {{
                chain in {{
                    type nat hook prerouting priority -100;
                    iifname "wan" tcp dport {external_port} dnat to 10.{self.number}.0.2:{PORT}
                }}
            }}
        """
        _run(*_exec(self.router), "nft", "-f", "-", stdin=rules)
        return f"/ip4/{self.public_ip}/tcp/{external_port}"

    @contextmanager
    def forwarding_ports(self, folder: Path) -> Iterator[None]:
        """Run miniupnpd on the router, which then forwards what its hosts ask for."""
        chains = """
            table inet filter {
                chain miniupnpd { }
                chain prerouting_miniupnpd { }
                chain postrouting_miniupnpd { }
                chain in { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
            }
        """
        _run(*_exec(self.router), "nft", "-f", "-", stdin=chains)
        config = folder / "miniupnpd.conf"
        config.write_text(
            "ext_ifname=wan\nlistening_ip=lan\nenable_upnp=yes\nenable_natpmp=no\n"
            f"lease_file={folder}/leases\nuuid=9c0ab5b5-06c7-411f-a93f-d743d8378c11\n"
            "allow 1024-65535 0.0.0.0/0 1024-65535\n"
        )
        daemon = subprocess.Popen(
            [*_exec(self.router), "miniupnpd", "-d", "-f", config, "-P", folder / "pid"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            daemon.terminate()
            daemon.wait(JOIN_S)

    def forwards(self) -> str:
        """Return the rules by which the router forwards ports."""
        chain = ("list", "chain", "inet", "filter", "prerouting_miniupnpd")
        return _run(*_exec(self.router), "nft", *chain)


@dataclass(slots=True)
class Lab:
    """One public network, with hosts on it and behind NATs."""

    public: str
    sites: list[Site] = field(default_factory=list)


@contextmanager
def open_lab(*nats: Nat) -> Iterator[Lab]:
    """Make a public host at 45.45.45.100 and one host behind each of ``nats``."""
    kinds = [f"{kind}{n}" for n in range(1, len(nats) + 1) for kind in ("host", "nat")]
    with namespaces("public", *kinds) as (public, *others):
        _run("ip", "-n", public, "link", "add", "net", "type", "bridge")
        _run("ip", "-n", public, "addr", "add", f"{PUBLIC_NET}.100/24", "dev", "net")
        _run("ip", "-n", public, "link", "set", "net", "up")
        lab = Lab(public)
        for n, nat in enumerate(nats, start=1):
            site = Site(n, *others[2 * n - 2 : 2 * n])
            _connect(public, site)
            site.translate(nat)
            lab.sites.append(site)
        yield lab


def _connect(public: str, site: Site) -> None:
    inside, n = f"10.{site.number}.0", site.number
    _join(site.router, "wan", public, f"wan{n}")
    _run("ip", "-n", public, "link", "set", f"wan{n}", "master", "net", "up")
    _join(site.router, "lan", site.host, "eth0")
    for namespace, device, address in (
        (site.router, "wan", site.public_ip),
        (site.router, "lan", f"{inside}.1"),
        (site.host, "eth0", f"{inside}.2"),
    ):
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", device)
        _run("ip", "-n", namespace, "link", "set", device, "up")
    _run("ip", "-n", site.host, "route", "add", "default", "via", f"{inside}.1")
    _set(site.router, "ipv4/ip_forward", 1)
    # What a dial without an answer left behind would keep to the rules of its time.
    _set(site.router, "netfilter/nf_conntrack_tcp_timeout_syn_sent", 2)


def _set(namespace: str, name: str, value: int) -> None:
    _run(*_exec(namespace), "sh", "-c", f"echo {value} > /proc/sys/net/{name}")


def _join(one: str, device: str, other: str, peer: str) -> None:
    command = ("ip", "link", "add", device, "netns", one, "type", "veth")
    _run(*command, "peer", "name", peer, "netns", other)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Move this thread into a network namespace, and then to that of the process.

    A thread starts in the namespace of the one that made it, and pools hand it on.
    """
    with Path("/proc", str(os.getpid()), "ns/net").open() as home:
        with Path("/run/netns", namespace).open() as file:
            _enter(file.fileno())
        try:
            yield
        finally:
            _enter(home.fileno())


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class GatewayOf:
    """What speaks UPnP to the router of a site, from whatever thread."""

    def __init__(self, site: Site) -> None:
        self._host = site.host
        self._gateway = UpnpGateway()

    def find(self) -> str:
        with inside(self._host):
            return self._gateway.find()

    def forward(self, external_port: int, port: int, lease_s: int) -> None:
        with inside(self._host):
            self._gateway.forward(external_port, port, lease_s)

    def remove(self, external_port: int) -> None:
        with inside(self._host):
            self._gateway.remove(external_port)


class RemoteMember:
    """A member in a namespace, and its thread; made by `start_member`."""

    def __init__(self, namespace: str, number: int, options: TraversalOptions, members: Members):
        self.peer_id: PeerId = identity(number).peer_id
        self._namespace, self._number = namespace, number
        self._options, self._members = options, members
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(JOIN_S), "the member does not start"
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with inside(self._namespace):
                trio.run(self._serve)
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        listen = f"/ip4/0.0.0.0/tcp/{PORT}"
        self._stop = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with (
            open_host(identity(self._number), listen=listen, allow=self._members.allow) as host,
            open_traversal(host, self._options) as traversal,
        ):
            host.handle(ECHO, echo)
            self._member = Member(host, traversal)
            self._ready.set()
            await self._stop.wait()

    def call(self, function: Callable[[Member], Awaitable[T]]) -> T:
        """Run a coroutine function on the member's loop, from the test's thread."""
        return trio.from_thread.run(function, self._member, trio_token=self._token)

    def stop(self) -> None:
        with suppress(trio.RunFinishedError, AttributeError):
            self._token.run_sync_soon(self._stop.set)
        self._thread.join(JOIN_S)
        assert not self._thread.is_alive(), "the member does not end"
        if self._error is not None:
            raise self._error


@contextmanager
def start_members(*where: tuple[str, TraversalOptions]) -> Iterator[list[RemoteMember]]:
    """Run a member in each namespace; the others connect to the first."""
    members = Members(identity(n + 1).peer_id for n in range(len(where)))
    with ExitStack() as stack:
        started: list[RemoteMember] = []
        for n, (namespace, options) in enumerate(where):
            member = RemoteMember(namespace, n + 1, options, members)
            stack.callback(member.stop)
            started.append(member)
        first = started[0]
        addresses = [f"/ip4/{PUBLIC_NET}.100/tcp/{PORT}/p2p/{first.peer_id}"]
        for member in started[1:]:
            member.call(lambda m: m.host.connect(first.peer_id, addresses))
        yield started
