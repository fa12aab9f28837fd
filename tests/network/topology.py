"""Two facilities and what lies between them, as network namespaces of this machine.

    producer ──LAN── gateway A ══WAN══ gateway B ──LAN── consumer
                         │                 │
                         └──── control ────┘

Each host is a namespace; no host forwards. One more namespace holds the wires: one bridge for each leg, with a port to
each of its hosts. All that a test does to a leg happens there, so hosts see what real ones see: a narrow leg queues
and drops in the middle, a cut one swallows everything while every link is up.

The services of both facilities are at home on `control`, which has a wire of its own to each gateway: who is on one of
these wires reaches nobody else over it, so no stream can take that way. A network may have two gateways for each
facility; they share LAN and WAN.
"""

import ctypes
import errno
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar

T = TypeVar("T")
Family: TypeAlias = Literal["IPv4", "IPv6"]
FAMILIES: Final[tuple[Family, ...]] = ("IPv4", "IPv6")

COMMAND_S: Final = 20.0
PREFIX: Final = "scistream"
CLONE_NEWNET: Final = 0x40000000
NAMESPACES: Final = Path("/run/netns")
DELAY_LINE: Final = Path(__file__).with_name("delay_line.py")

# Private addresses on the LANs, those reserved for documentation on the WAN. The n-th host has number n of a network.
NETWORKS: Final[dict[str, dict[Family, str]]] = {
    "lan-a": {"IPv4": "10.11.0.0/24", "IPv6": "fd11::/64"},
    "wan": {"IPv4": "192.0.2.0/24", "IPv6": "2001:db8::/64"},
    "lan-b": {"IPv4": "10.22.0.0/24", "IPv6": "fd22::/64"},
    "control-a": {"IPv4": "10.31.0.0/24", "IPv6": "fd31::/64"},
    "control-b": {"IPv4": "10.32.0.0/24", "IPv6": "fd32::/64"},
    "control-a2": {"IPv4": "10.33.0.0/24", "IPv6": "fd33::/64"},
    "control-b2": {"IPv4": "10.34.0.0/24", "IPv6": "fd34::/64"},
}
HOSTS: Final = ("producer", "gateway-a", "gateway-b", "consumer", "control", "gateway-a2", "gateway-b2")
ENDS: Final = {
    "lan-a": ("producer", "gateway-a", "gateway-a2"),
    "wan": ("gateway-a", "gateway-b", "gateway-a2", "gateway-b2"),
    "lan-b": ("gateway-b", "consumer", "gateway-b2"),
    "control-a": ("control", "gateway-a"),
    "control-b": ("control", "gateway-b"),
    "control-a2": ("control", "gateway-a2"),
    "control-b2": ("control", "gateway-b2"),
}
SECOND: Final = ("gateway-a2", "gateway-b2")


class CommandError(Exception):
    """A command that exited with something else than 0."""


def call(*command: str, text: str = "") -> str:
    """Runs a command to its end, in bounded time; its output."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_S)
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def why_not() -> str | None:
    """What this machine lacks for a network of namespaces, in one sentence; None if it lacks nothing."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no test network: {tool} was not found (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "no test network: only root may make network namespaces"
    namespace = _name(0, "trial")
    within = ("ip", "netns", "exec", namespace)
    try:
        call("ip", "netns", "add", namespace)
        try:
            call(*within, "ip", "link", "add", "trial", "type", "bridge")
            call(*within, "ip", "link", "add", "one", "type", "veth", "peer", "name", "other")
            call(*within, "tc", "qdisc", "add", "dev", "one", "root", *_narrow(1))
        finally:
            call("ip", "netns", "del", namespace)
    except CommandError as error:
        return f"no test network: {' '.join(str(error).split())}"
    return None


class Host:
    """One namespace."""

    def __init__(self, name: str, namespace: str) -> None:
        self.name = name
        self.namespace = namespace

    def __repr__(self) -> str:
        return self.name

    def command(self, *command: str) -> list[str]:
        """The same command, to be run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def call(self, *command: str, text: str = "") -> str:
        """Runs a command on this host to its end; its output."""
        return call(*self.command(*command), text=text)

    def inside(self, what: Callable[[], T]) -> T:
        """The answer of `what`, called on this host. A socket that it makes stays here, whoever uses it later."""
        answer: list[T] = []
        problem: list[BaseException] = []

        def run() -> None:
            try:
                _enter(self.namespace)
                answer.append(what())
            except BaseException as error:  # noqa: BLE001 - raised again below
                problem.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(3 * COMMAND_S)
        assert not thread.is_alive(), f"no answer from {self.name} within {3 * COMMAND_S:g} s"
        if problem:
            raise problem[0]
        return answer[0]

    @contextmanager
    def here(self) -> Iterator[None]:
        """The calling thread is on this host as long as the block runs; what it starts, threads and programs, too."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self.namespace)
            try:
                yield
            finally:
                _set_namespace(before, "where it was")
        finally:
            os.close(before)

    def address(self, family: Family, leg: str | None = None) -> str:
        """The IP of this host on a leg; without one, on the LAN."""
        leg = leg or next(name for name in ENDS if name.startswith("lan-") and self.name in ENDS[name])
        network = ipaddress.ip_network(NETWORKS[leg][family])
        return str(network[1 + HOSTS.index(self.name)])

    def connections(self) -> list[str]:
        """Every TCP socket of this host as "STATE OWN PEER", but those that wait only for their peer to end as well."""
        lines = self.call("ss", "-Hnta", "exclude", "time-wait", "exclude", "fin-wait-2").splitlines()
        return [" ".join(line.split()[index] for index in (0, 3, 4)) for line in lines]

    def pids(self) -> list[int]:
        """Every process in this namespace."""
        return _inhabitants(self.namespace)

    def block(self, ports: str, leg: str, how: Literal["blackhole", "prohibit"]) -> None:
        """A packet filter on a leg: what comes for these TCP ports is swallowed, or turned away by ICMP; IPv4 only."""
        # rules before the one for local addresses, which is the first as a rule: no other tool is needed
        self.set(**{f"net__ipv4__conf__{leg}__forwarding": "1"})  # without it, the kernel says nothing
        self.call("ip", "rule", "add", "pref", "100", "lookup", "local")
        self.call("ip", "rule", "del", "pref", "0")
        self.call("ip", "rule", "add", "pref", "0", "iif", leg, "ipproto", "tcp", "dport", ports, how)

    def set(self, **sysctls: str) -> None:
        """Kernel settings of this host; `net__ipv4__ip_forward` stands for net.ipv4.ip_forward."""

        def write() -> None:
            for name, value in sysctls.items():
                (Path("/proc/sys") / name.replace("__", "/")).write_text(value)

        self.inside(write)


class Leg:
    """What joins some hosts: as fast as this machine, until a test says otherwise."""

    def __init__(self, name: str, ends: Sequence[str], wires: Host) -> None:
        self.name = name
        self.ports = {end: f"{name}.{number}" for number, end in enumerate(ends)}
        self._wires = wires
        self._throttled = False
        self._cut: set[str] = set()
        self._delay_line: subprocess.Popen[str] | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def carried_bytes(self) -> int:
        """What has gone over it so far, headers included."""
        there = [f"/sys/class/net/{port}/statistics/rx_bytes" for port in self.ports.values()]
        return sum(map(int, self._wires.call("cat", *there).split()))

    def throttle(self, mbits_per_s: float) -> None:
        """Lets no more than this through, in each direction; what comes faster queues for 50 ms, then is dropped."""
        for port in self.ports.values():
            self._wires.call("tc", "qdisc", "replace", "dev", port, "root", *_narrow(mbits_per_s))
        self._throttled = True

    def cut(self, *hosts: Host) -> None:
        """Swallows everything from now on that these hosts send or should receive; without any, all of it.

        Links stay up, addresses and routes stay: nobody is told.
        """
        if self._delay_line is not None:
            self._end_delay()
        self._take_ports_out(*[self.ports[host.name] for host in hosts] or self.ports.values())

    def delay(self, seconds: float) -> None:
        """Everything arrives so much later, in each direction: the round trip grows by twice as much."""
        self._end_delay()
        self._take_ports_out(*self.ports.values())
        self._delay_line = subprocess.Popen(
            self._wires.command(sys.executable, "-I", str(DELAY_LINE), *self.ports.values(), str(seconds)),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._delay_line.stdout
        assert self._delay_line.stdout.readline() == "ready\n", "the delay line does not start"

    def restore(self) -> None:
        """A leg as in the beginning."""
        self._end_delay()
        for port in self._cut:
            self._wires.call("ip", "link", "set", port, "master", self.name)
        self._cut.clear()
        if self._throttled:
            for port in self.ports.values():
                self._wires.call("tc", "qdisc", "del", "dev", port, "root")
            self._throttled = False

    def _take_ports_out(self, *ports: str) -> None:
        for port in ports:
            self._wires.call("ip", "link", "set", port, "nomaster")
            self._cut.add(port)

    def _end_delay(self) -> None:
        if self._delay_line is not None:
            self._delay_line.kill()
            self._delay_line.wait(COMMAND_S)
            assert self._delay_line.stdout
            self._delay_line.stdout.close()
            self._delay_line = None


@dataclass
class Network:
    """Two facilities, the WAN between them, and nothing else.

    Attributes:
        gateways: One or two for each facility.
    """

    gateways: int = 1
    number: int = field(default_factory=count(1).__next__)

    def __post_init__(self) -> None:
        self.wires = Host("wires", _name(self.number, "wires"))
        missing = SECOND if self.gateways == 1 else ()
        self._hosts = {name: Host(name, _name(self.number, name)) for name in HOSTS if name not in missing}
        self.hosts = tuple(self._hosts.values())
        self.producer, self.gateway_a, self.gateway_b, self.consumer, self.control = self.hosts[:5]
        self._legs: dict[str, Leg] = {}
        for leg, everybody in ENDS.items():
            ends = [end for end in everybody if end in self._hosts]
            if len(ends) > 1:
                self._legs[leg] = Leg(leg, ends, self.wires)
        self.legs = tuple(self._legs.values())
        self.lan_a, self.wan, self.lan_b = self.stream_legs = self.legs[:3]

    def host(self, name: str) -> Host:
        """The host of this name."""
        return self._hosts[name]

    def leg(self, name: str) -> Leg:
        """The leg of this name."""
        return self._legs[name]

    def build(self) -> None:
        """Makes the namespaces and joins them."""
        everybody = (*self.hosts, self.wires)
        _batch(f"netns add {host.namespace}" for host in everybody)
        # Before there is an interface: a wire has no addresses, and a host's are at its disposal at once.
        self.wires.set(net__ipv6__conf__default__disable_ipv6="1")
        for host in self.hosts:
            host.set(
                net__ipv4__ip_forward="0",
                net__ipv6__conf__all__forwarding="0",
                net__ipv6__conf__default__accept_dad="0",
                net__ipv6__conf__default__accept_ra="0",
                net__ipv6__conf__default__router_solicitations="0",
            )
        _batch(self._wiring(), self.wires)
        for host in self.hosts:
            _batch(self._addresses(host), host)

    def between(self, one: Host, other: Host) -> Leg | None:
        """The leg that joins two hosts; None where there is none."""
        return next((leg for leg in self.legs if {one.name, other.name} <= leg.ports.keys()), None)

    def addresses(self, host: Host, family: Family) -> list[str]:
        """Every IP of a host."""
        return [host.address(family, leg.name) for leg in self.legs if host.name in leg.ports]

    def cut_off(self, host: Host) -> None:
        """As if the host had lost its power: it answers to nobody, on no leg."""
        for leg in self.legs:
            if host.name in leg.ports:
                leg.cut(host)

    def add_routes_through_gateways(self, family: Family) -> None:
        """Each host believes that its neighbours forward. None does."""
        here, there = NETWORKS["lan-a"][family], NETWORKS["lan-b"][family]
        for host, network, via in (
            (self.producer, there, self.gateway_a.address(family, "lan-a")),
            (self.gateway_a, there, self.gateway_b.address(family, "wan")),
            (self.gateway_b, here, self.gateway_a.address(family, "wan")),
            (self.consumer, here, self.gateway_b.address(family, "lan-b")),
        ):
            host.call("ip", "route", "add", network, "via", via)

    def restore(self) -> None:
        """Every leg as in the beginning."""
        for leg in self.legs:
            leg.restore()

    def close(self) -> None:
        """Removes everything, and asserts that nobody was left on a host."""
        try:
            self.restore()
        finally:
            left = {host.name: host.pids() for host in self.hosts if (NAMESPACES / host.namespace).exists()}
            remove(*(host.namespace for host in (*self.hosts, self.wires)))
        assert not any(left.values()), f"processes were left on the network: {left}"

    def _wiring(self) -> Iterator[str]:
        yield "link set lo up"
        for leg in self.legs:
            yield f"link add {leg.name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
            yield f"link set {leg.name} up"
            for end, port in leg.ports.items():
                yield f"link add {port} type veth peer name {leg.name} netns {self.host(end).namespace}"
                yield f"link set {port} master {leg.name} up"

    def _addresses(self, host: Host) -> Iterator[str]:
        yield "link set lo up"
        for leg in self.legs:
            if host.name in leg.ports:
                yield f"link set {leg.name} up"
                for family in FAMILIES:
                    length = NETWORKS[leg.name][family].rpartition("/")[2]
                    yield f"address add {host.address(family, leg.name)}/{length} dev {leg.name}"


def remove_leftovers() -> None:
    """Removes the networks of test runs that were killed."""
    for namespace in NAMESPACES.glob(f"{PREFIX}-*") if NAMESPACES.is_dir() else ():
        run = re.fullmatch(rf"{PREFIX}-(\d+)\.(\d+)-.*", namespace.name)
        if run and _born(int(run[1])) != run[2]:
            remove(namespace.name)


def remove(*namespaces: str) -> None:
    """Ends every process of these namespaces, and removes them. Repeating it is no error."""
    there = [one for one in namespaces if (NAMESPACES / one).exists()]
    end = time.monotonic() + COMMAND_S
    for namespace in there:
        while pids := _inhabitants(namespace):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                raise TimeoutError(f"processes of {namespace} do not end: {pids}")
            time.sleep(0.01)
    if there:
        _batch(f"netns del {one}" for one in there)


def _inhabitants(namespace: str) -> list[int]:
    """Every process in a namespace; zombies are in none."""
    inode = (NAMESPACES / namespace).stat().st_ino
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "ns" / "net").stat().st_ino == inode:
                found.append(int(process.name))
    return found


def reaches(host: Host, address: str, port: int = 9, *, within_s: float = COMMAND_S) -> int | None:
    """None when a connection from this host is accepted; else the errno, ETIMEDOUT when nobody answers."""

    def dial() -> int | None:
        try:
            socket.create_connection((address, port), timeout=within_s).close()
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno
        return None

    return host.inside(dial)


def _narrow(mbits_per_s: float) -> Sequence[str]:
    bits_per_s = int(mbits_per_s * 1e6)
    burst = max(16_000, bits_per_s // 8 // 200)
    return ("tbf", "rate", f"{bits_per_s}bit", "burst", str(burst), "latency", "50ms")


def _batch(commands: Iterator[str], host: Host | None = None) -> None:
    there = () if host is None else ("-n", host.namespace)
    call("ip", *there, "-batch", "-", text="\n".join(commands) + "\n")


def _name(number: int, host: str) -> str:
    """Names the process that made it, so that it cannot collide and can be recognised when that is dead."""
    return f"{PREFIX}-{os.getpid()}.{_born(os.getpid())}-{number}-{host}"


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: a later one may have the same pid. None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def _enter(namespace: str) -> None:
    """Moves the calling thread."""
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_namespace(descriptor, namespace)
    finally:
        os.close(descriptor)


def _set_namespace(descriptor: int, name: str) -> None:
    """Python has os.setns from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns to {name}: {os.strerror(number)}")
