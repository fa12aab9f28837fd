"""What the facts about a gateway mean for its streams, and the exact change that mends what is wrong.

Functions of facts only: nothing is asked here, and nothing is changed. Sources of the arithmetic: the bandwidth-delay
product (RFC 1072), the window scale (RFC 7323), tcp(7), pipe(7).
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from scistream_flows.config import FacilityConfig, GatewayConfig
from scistream_flows.registry import NETWORK_FILE_SYSTEMS
from scistream_flows.relay import AddressFacts, DirectoryFacts, InterfaceFacts, NodeFacts

MIB: Final = 1 << 20
LARGEST_BUFFER_BYTES: Final = 2**31 - 1  # the settings are C ints
LARGEST_WINDOW_BYTES: Final = 1 << 30  # the window field of TCP, with the largest scale
JUMBO_BYTES: Final = 9000
FAST_MBITS_PER_S: Final = 10_000
LEAST_FREE_BYTES: Final = 64 * MIB
PIPE_BYTES: Final = MIB
DESCRIPTORS_BESIDE_CONNECTIONS: Final = 1024  # listeners, workers, pooled pipes, what a process has anyway
TYPICAL_RTT_S: Final = 0.1
CLOCK_TOLERANCE_S: Final = 2.0
SYSCTL_FILE: Final = "/etc/sysctl.d/90-scistream.conf"
OTHER_STATE: Final = "export SCISTREAM_STATE_DIR=/var/tmp/scistream"

Level: TypeAlias = Literal["ok", "note", "warning", "problem"]


class Finding(BaseModel):
    """One thing that was looked at.

    Attributes:
        check: Its name, the same in every run.
        level: `ok`; `note`, good to know; `warning`, streams work but slower or with less; `problem`, they do not.
        gateway: Where it was found; None when it concerns the facility.
        message: What was found.
        fix: A command for a root shell of the gateway, or the edit of a file; None where there is nothing to change.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    level: Level
    gateway: str | None = None
    message: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One gateway, and what is expected of it.

    Attributes:
        facts: What the node says.
        gateway: Its configuration.
        config: That of its facility.
        rate_mbits_per_s: What streams are to carry together, per direction; 0 is not known.
        rtt_s: The round trip to the other facility; None is not known.
        clock_offset_s: By how much the node's clock is ahead of ours, at least; 0 when they may agree.
        relay_dir: The directory for the sockets and logs of its relays.
    """

    facts: NodeFacts
    gateway: GatewayConfig
    config: FacilityConfig
    rate_mbits_per_s: int = 0
    rtt_s: float | None = None
    clock_offset_s: float = 0.0
    relay_dir: str = ""

    def finding(self, check: str, level: Level, message: str, fix: str | None = None) -> Finding:
        """A finding about this gateway."""
        return Finding(check=check, level=level, gateway=self.gateway.name, message=message, fix=fix)

    def edit(self, **keys: Any) -> str:
        """The change of this gateway's table in the facility's file."""
        return edit(self.config, f'under [[gateway]] with name = "{self.gateway.name}"', **keys)

    @property
    def wan(self) -> list[AddressFacts]:
        """Where PROD relays listen."""
        return [one for one in self.facts.addresses if one.address in self.gateway.wan_bind]


def edit(config: FacilityConfig, table: str, **keys: Any) -> str:
    """The edit of a facility's file, in words that name file, table, key and value."""
    values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return f"in {config.file or f'{config.name}.toml'}, {table}: {values}"


def sysctl(name: str, value: object) -> str:
    """The command that changes a kernel setting now and at every start."""
    assignment = shlex.quote(f"{name}={value}")
    return f"sysctl -w {assignment} && echo {assignment} >> {SYSCTL_FILE}"


# --- judgement: each takes a case, and says what it means


def judge(case: Case) -> Iterator[Finding]:
    """Every check of one gateway, in the order in which things are best put right."""
    for check in CHECKS:
        yield from check(case)


def _addresses(case: Case) -> Iterator[Finding]:
    for one in case.facts.addresses:
        keys = [key for key in ADDRESS_KEYS if one.address in getattr(case.gateway, key)]
        if one.errno is None:
            on = f" ({one.interface.name})" if one.interface else ""
            yield case.finding("address", "ok", f"{one.address}{on} can be bound: {', '.join(keys)}")
            continue
        version = _version(one.address)
        others = [own for own in case.facts.own_addresses if _version(own.address) == version]
        has = ", ".join(f"{own.address} ({own.interface})" for own in others) or f"no IPv{version} address"
        yield case.finding(
            "address",
            "problem",
            f"{' and '.join(keys)}: {one.address} cannot be bound ({one.errno}); this node has {has}",
            case.edit(
                **{key: _in_place_of(one.address, others[0].address, case.gateway, key) for key in keys}
            )
            if others
            else f"ip address add {one.address}/{32 if version == 4 else 128} dev INTERFACE",
        )


def _in_place_of(wrong: str, right: str, gateway: GatewayConfig, key: str) -> str | list[str]:
    """The value of a key with one address exchanged."""
    addresses = [right if own == wrong else own for own in getattr(gateway, key)]
    return addresses if len(addresses) > 1 else addresses[0]


ADDRESS_KEYS: Final = ("wan_bind", "lan_bind", "wan_source", "lan_source")


def _ports(case: Case) -> Iterator[Finding]:
    first, last = case.gateway.port_range
    for one in case.facts.addresses:
        if one.ports is None or not {*case.gateway.wan_bind, *case.gateway.lan_bind} & {one.address}:
            continue
        ports, taken = one.ports, one.ports.checked - one.ports.free
        named = ", ".join(f"{refused.port} {refused.errno}" for refused in ports.refused)
        if taken == 0:
            yield case.finding("ports", "ok", f"{one.address}: ports {first}-{last} can be bound")
        elif "EACCES" in [refused.errno for refused in ports.refused]:
            yield case.finding(
                "ports",
                "problem",
                f"{one.address}: ports {first}-{last} are for root only ({named})",
                case.edit(port_range=f"{5100}-{5100 + min(last - first, 900)}"),
            )
        elif ports.free == 0:
            room = min(last + max(last - first + 1, 100), 65_535)
            yield case.finding(
                "ports",
                "problem",
                f"{one.address}: none of the ports {first}-{last} is free ({named})",
                case.edit(port_range=f"{first}-{room}")
                if room > last
                else case.edit(port_range=f"{max(1024, first - 100)}-{last}"),
            )
        else:
            yield case.finding(
                "ports",
                "note",
                f"{one.address}: {taken} of {ports.checked} ports looked at in {first}-{last} are taken, by streams or "
                f"by other programs ({named})",
            )


def _ephemeral(case: Case) -> Iterator[Finding]:
    """The kernel gives ports of its own range to connections; those meant for listeners may then be gone."""
    first, last = case.gateway.port_range
    own = case.facts.numbers("net.ipv4.ip_local_port_range")
    if first == 0 or len(own) != 2:
        return
    reserved = case.facts.settings.get("net.ipv4.ip_local_reserved_ports") or ""
    shared = range(max(first, own[0]), min(last, own[1]) + 1)
    if all(any(low <= port <= high for low, high in _ranges(reserved)) for port in shared):
        yield case.finding("ephemeral-ports", "ok", f"the kernel gives no port of {first}-{last} to others")
        return
    wanted = f"{shared[0]}-{shared[-1]}"
    yield case.finding(
        "ephemeral-ports",
        "warning",
        f"ports {wanted} are also in net.ipv4.ip_local_port_range ({own[0]}-{own[1]}), of which outgoing connections "
        "get theirs: any program may hold one when a stream wants it",
        sysctl("net.ipv4.ip_local_reserved_ports", ",".join(filter(None, [reserved, wanted]))),
    )


def _kernel(case: Case) -> Iterator[Finding]:
    version = _kernel_version(case.facts.kernel)
    missing = [words for least, words in _KERNELS if version < least]
    if not missing:
        yield case.finding("kernel", "ok", f"Linux {case.facts.kernel}")
        return
    yield case.finding(
        "kernel",
        "warning",
        f"Linux {case.facts.kernel}: {'; '.join(missing)}",
        "boot a kernel of 5.11 or later, best 6.8 or later",
    )


_KERNELS: Final = (
    ((4, 20), "rates are not enforced before 4.20"),
    ((5, 4), "what limits a stream is not told in full before 5.4"),
    ((5, 11), "relays may keep descriptors of who starts them before 5.11"),
)


def _kernel_tls(case: Case) -> Iterator[Finding]:
    if case.facts.ktls.available:
        cipher = (
            "AES-256-GCM" if case.facts.ktls.new_keys else "ChaCha20-Poly1305, if the other side's does too"
        )
        yield case.finding("ktls", "ok", f"the kernel carries mode tls, with {cipher}")
    else:
        yield case.finding(
            "ktls",
            "note",
            f"the kernel offers no TLS ({case.facts.ktls.errno}): in mode tls relays copy through user space",
            "modprobe tls && echo tls > /etc/modules-load.d/scistream.conf",
        )


def _pipes(case: Case) -> Iterator[Finding]:
    facts = case.facts
    largest = facts.numbers("fs.pipe-max-size")
    if largest and largest[0] < PIPE_BYTES:
        yield case.finding(
            "pipes",
            "warning",
            f"a pipe may have {largest[0]} bytes, relays want {PIPE_BYTES}: more system calls for each byte",
            sysctl("fs.pipe-max-size", PIPE_BYTES),
        )
    pages = facts.numbers("fs.pipe-user-pages-soft")
    budget_bytes = case.gateway.pipe_budget_mib * MIB
    limit_bytes = pages[0] * facts.page_bytes if pages else 0
    granted_bytes = facts.pipe.granted_bytes or 0
    if facts.uid != 0 and 0 < limit_bytes < budget_bytes:
        yield case.finding(
            "pipes",
            "warning",
            f"pipe_budget_mib is {case.gateway.pipe_budget_mib}, but user {facts.user or facts.uid} may have "
            f"{limit_bytes // MIB} MiB of pipes: beyond it connections copy",
            sysctl("fs.pipe-user-pages-soft", -(-budget_bytes // facts.page_bytes)),
        )
    elif granted_bytes < min(PIPE_BYTES, largest[0] if largest else PIPE_BYTES):
        yield case.finding(
            "pipes",
            "warning",
            f"user {facts.user or facts.uid} got a pipe of {granted_bytes} bytes in place of {PIPE_BYTES}"
            f"{f' ({facts.pipe.errno})' if facts.pipe.errno else ''}: his other pipes have used up what he may have",
            sysctl("fs.pipe-user-pages-soft", 4 * max(limit_bytes, 64 * MIB) // facts.page_bytes),
        )
    elif not largest or largest[0] >= PIPE_BYTES:
        yield case.finding("pipes", "ok", f"pipes have {granted_bytes} bytes, within the budget")


def _descriptors(case: Case) -> Iterator[Finding]:
    """The worst case that policy and budget admit for one relay."""
    facts, policy = case.facts, case.config.policy
    admitted = [(policy.max_num_conn, policy.max_connections)]
    for quota in policy.quota:
        limits = quota.max_num_conn or policy.max_num_conn, quota.max_connections or policy.max_connections
        admitted.append(limits)
    connections = max(num_conn * each for num_conn, each in admitted)
    if case.gateway.connection_budget:
        connections = min(connections, case.gateway.connection_budget)
    needed = 2 * connections + DESCRIPTORS_BESIDE_CONNECTIONS
    hard = facts.descriptors.hard
    if hard is None or hard >= needed:  # None: no limit
        yield case.finding(
            "descriptors", "ok", f"a relay may open {hard or 'any number of'} files, {needed} are the most"
        )
    else:
        user = facts.user or str(facts.uid)
        line = shlex.quote(f"{user} - nofile {needed}")
        yield case.finding(
            "descriptors",
            "warning",
            f"a relay may open {hard} files; {connections} connections, which policy and budget admit, need {needed} "
            f"(the fix counts from the next login on; for a service of systemd it is LimitNOFILE={needed})",
            f"echo {line} > /etc/security/limits.d/90-scistream.conf",
        )
    everybody = facts.numbers("fs.file-max")
    used = facts.numbers("fs.file-nr")
    if everybody and used and everybody[0] - used[0] < needed:
        yield case.finding(
            "descriptors",
            "warning",
            f"all processes together may open {everybody[0]} files, and have {used[0]} open",
            sysctl("fs.file-max", used[0] + 2 * needed),
        )


def _buffers(case: Case) -> Iterator[Finding]:
    """A connection has under way what its buffers hold; about half of a buffer is the kernel's own bookkeeping."""
    largest = {name: case.facts.numbers(f"net.ipv4.tcp_{name}") for name in ("rmem", "wmem")}
    if any(len(numbers) != 3 for numbers in largest.values()):
        return
    if not case.rate_mbits_per_s or not case.rtt_s:
        usable_bytes = min(numbers[2] for numbers in largest.values()) / 2
        yield case.finding(
            "buffers",
            "note",
            f"one connection carries at most {_mbits(usable_bytes, TYPICAL_RTT_S)} where the round trip is "
            f"{TYPICAL_RTT_S * 1000:g} ms; name rate and round trip to learn whether that is enough",
        )
        return
    product_bytes = case.rate_mbits_per_s * 125_000 * case.rtt_s
    per_connection_bytes = min(product_bytes, LARGEST_WINDOW_BYTES)
    least_bytes = min(2 * per_connection_bytes, LARGEST_BUFFER_BYTES)
    needed_bytes = _rounded(least_bytes)
    path = f"{case.rate_mbits_per_s} Mbit/s x {case.rtt_s * 1000:g} ms"
    if product_bytes > LARGEST_WINDOW_BYTES:
        yield case.finding(
            "window",
            "warning",
            f"{path} are {_mib(product_bytes)} under way; one connection can have 1024 MiB, that is "
            f"{_mbits(LARGEST_WINDOW_BYTES, case.rtt_s)}",
            f"open such streams with num_conn={math.ceil(product_bytes / LARGEST_WINDOW_BYTES)} or more, and use all "
            "its listeners at once",
        )
    for name, numbers in largest.items():
        setting = f"net.ipv4.tcp_{name}"
        if numbers[2] >= least_bytes:
            yield case.finding("buffers", "ok", f"{setting} ends at {_mib(numbers[2])}, enough for {path}")
        else:
            yield case.finding(
                "buffers",
                "warning",
                f"{path} are {_mib(product_bytes)} under way, but {setting} ends at {_mib(numbers[2])}, half of it for "
                f"bookkeeping: at most {_mbits(numbers[2] / 2, case.rtt_s)} a connection",
                sysctl(setting, f"{numbers[0]} {numbers[1]} {needed_bytes}"),
            )
    for name in ("rmem_max", "wmem_max"):
        setting = f"net.core.{name}"
        limit = case.facts.numbers(setting)
        if limit and limit[0] < least_bytes:
            yield case.finding(
                "buffers",
                "note",
                f"{setting} is {_mib(limit[0])}: relays leave sizes to the kernel and are not bound by it, "
                "applications that set their own (iperf3 -w) are",
                sysctl(setting, needed_bytes),
            )
    yield from _tcp_memory(case, needed_bytes)


def _tcp_memory(case: Case, needed_bytes: int) -> Iterator[Finding]:
    pages = case.facts.numbers("net.ipv4.tcp_mem")
    needed = 2 * needed_bytes // case.facts.page_bytes  # what comes in on one leg goes out on the other
    if len(pages) == 3 and pages[1] < needed:
        yield case.finding(
            "tcp-memory",
            "warning",
            f"all TCP sockets together come under pressure at {_mib(pages[1] * case.facts.page_bytes)}; one connection "
            f"of this rate needs {_mib(2 * needed_bytes)}",
            sysctl("net.ipv4.tcp_mem", f"{max(pages[0], needed)} {2 * needed} {3 * needed}"),
        )


def _transport(case: Case) -> Iterator[Finding]:
    """Settings of TCP that are on almost everywhere."""
    for name, level, words in _ON:
        setting = f"net.ipv4.tcp_{name}"
        value = case.facts.numbers(setting)
        if value and value[0] == 0:
            yield case.finding(name.replace("_", "-"), level, f"{setting} is 0: {words}", sysctl(setting, 1))
    after_idle = case.facts.numbers("net.ipv4.tcp_slow_start_after_idle")
    if after_idle and after_idle[0]:
        long = case.rtt_s is not None and case.rtt_s >= 0.005
        yield case.finding(
            "slow-start-after-idle",
            "warning" if long else "note",
            "a connection that was silent begins slowly again: bad for detectors that send in bursts",
            sysctl("net.ipv4.tcp_slow_start_after_idle", 0),
        )


_ON: Final[tuple[tuple[str, Level, str], ...]] = (
    ("window_scaling", "problem", "a connection can have 64 KiB under way, and no more"),
    ("timestamps", "warning", "round trips are measured badly, old segments not told from new ones"),
)


def _congestion_control(case: Case) -> Iterator[Finding]:
    current = case.facts.settings.get("net.ipv4.tcp_congestion_control")
    if not current:
        return
    available = (case.facts.settings.get("net.ipv4.tcp_available_congestion_control") or "").split()
    if current in ("bbr", "cubic", "htcp"):
        yield case.finding("congestion-control", "ok", f"new connections use {current}")
        return
    better = next((one for one in ("bbr", "cubic") if one in available), None)
    load = "" if better else "modprobe tcp_bbr && echo tcp_bbr > /etc/modules-load.d/scistream-bbr.conf && "
    yield case.finding(
        "congestion-control",
        "warning",
        f"new connections use {current}, which is slow on long paths (available: {' '.join(available)})",
        load + sysctl("net.ipv4.tcp_congestion_control", better or "bbr"),
    )


def _pacing(case: Case) -> Iterator[Finding]:
    current = case.facts.settings.get("net.core.default_qdisc")
    if not current:
        return
    if current == "fq":
        yield case.finding("pacing", "ok", "the queueing discipline of new interfaces is fq")
        return
    cards = [one.interface.name for one in case.wan if one.interface and one.interface.name != "lo"]
    replace = "".join(f"tc qdisc replace dev {name} root fq && " for name in dict.fromkeys(cards))
    yield case.finding(
        "pacing",
        "note",
        f"the queueing discipline of new interfaces is {current}: rates are kept by TCP's own timers, fq does it with "
        "less processor time",
        replace + sysctl("net.core.default_qdisc", "fq"),
    )


def _interfaces(case: Case) -> Iterator[Finding]:
    wanted = case.rate_mbits_per_s or case.gateway.capacity_mbits_per_s
    seen = set()
    for one in case.facts.addresses:
        interface = one.interface
        if interface is None or interface.name == "lo" or interface.name in seen:
            continue
        seen.add(interface.name)
        speed = interface.speed_mbits_per_s
        if speed and speed < wanted:
            yield case.finding(
                "speed",
                "warning",
                f"{interface.name} is a link of {speed} Mbit/s, {wanted} Mbit/s are expected of it",
                case.edit(capacity_mbits_per_s=speed) if case.gateway.capacity_mbits_per_s > speed else None,
            )
        yield from _mtu(case, interface, fast=max(speed or 0, wanted) >= FAST_MBITS_PER_S)
        yield from _numa(case, interface)


def _mtu(case: Case, interface: InterfaceFacts, *, fast: bool) -> Iterator[Finding]:
    mtu = interface.mtu
    if mtu is None:
        return
    if mtu < JUMBO_BYTES and fast:
        yield case.finding(
            "mtu",
            "warning" if case.rate_mbits_per_s >= FAST_MBITS_PER_S else "note",
            f"{interface.name} has an MTU of {mtu}; {JUMBO_BYTES} needs fewer packets, where all switches take it",
            f"ip link set dev {interface.name} mtu {JUMBO_BYTES}",
        )
        return
    yield case.finding("mtu", "ok", f"{interface.name} has an MTU of {mtu}")
    probing = case.facts.numbers("net.ipv4.tcp_mtu_probing")
    if mtu > 1500 and probing and probing[0] == 0:
        yield case.finding(
            "mtu-probing",
            "note",
            f"{interface.name} sends large packets; where a router drops them without a word, connections stall",
            sysctl("net.ipv4.tcp_mtu_probing", 1),
        )


def _numa(case: Case, interface: InterfaceFacts) -> Iterator[Finding]:
    facts, node = case.facts, interface.numa_node
    if node is None or len(facts.numa_nodes) < 2 or not facts.numa_nodes.get(node):
        return
    near, allowed = _processors(facts.numa_nodes[node]), _processors(facts.cpus_allowed)
    if allowed <= near:
        yield case.finding("numa", "ok", f"relays run on the node of {interface.name}, {node}")
        return
    yield case.finding(
        "numa",
        "note",
        f"{interface.name} is at NUMA node {node} (processors {facts.numa_nodes[node]}), relays may run on "
        f"{facts.cpus_allowed}",
        f"start what starts the relays with: taskset -c {facts.numa_nodes[node]}",
    )


def _clock(case: Case) -> Iterator[Finding]:
    offset_s = case.clock_offset_s
    if abs(offset_s) < CLOCK_TOLERANCE_S:
        yield case.finding("clock", "ok", "its clock agrees with ours")
        return
    yield case.finding(
        "clock",
        "warning",
        f"its clock is {abs(offset_s):.1f} s or more {'ahead of' if offset_s > 0 else 'behind'} ours: logs of both do "
        "not fit together, and tokens may seem expired",
        "timedatectl set-ntp true",
    )


def _logout(case: Case) -> Iterator[Finding]:
    logind, user = case.facts.logind, case.facts.user or str(case.facts.uid)
    if case.gateway.kind != "ssh" or not logind.running:
        return
    ends = (logind.kill_user_processes or "").lower() in ("yes", "true", "on", "1")
    only, excluded = (
        (text or "").split() for text in (logind.kill_only_users, logind.kill_exclude_users or "root")
    )
    if not ends or logind.linger or user in excluded or (only and user not in only):
        yield case.finding("logout", "ok", f"what user {user} leaves running at logout goes on")
        return
    yield case.finding(
        "logout",
        "problem",
        f"logind ends what user {user} leaves running at logout (KillUserProcesses): relays end with the connection "
        "that started them",
        f"loginctl enable-linger {user}",
    )


def _directory(case: Case) -> Iterator[Finding]:
    about = next((one for one in case.facts.directories if one.path == case.relay_dir), None)
    if about is None:
        return
    elsewhere = another_directory(case.gateway, case.config)
    copied = case.gateway.kind == "ssh" and case.gateway.s2ds is None
    found = list(_room(about, elsewhere, noexec_matters=copied))
    kind = about.file_system.type if about.file_system else None
    if kind in NETWORK_FILE_SYSTEMS:
        found.append(
            (
                "note",
                f"is on a network file system ({kind}): when that hangs, no relay can be started",
                elsewhere,
            )
        )
    for level, words, fix in found:
        yield case.finding("directory", level, f"{about.path} {words}", fix)
    if not found:
        yield case.finding("directory", "ok", f"{about.path} can be used ({kind})")


def another_directory(gateway: GatewayConfig, config: FacilityConfig) -> str:
    """How to have a gateway's relays keep their files in another place."""
    if gateway.kind == "local":
        return OTHER_STATE
    table = f'under [[gateway]] with name = "{gateway.name}"'
    return edit(config, table, directory=f"/var/tmp/scistream-{config.name}")  # noqa: S108 - made 0700, or refused


CHECKS: Final[tuple[Callable[[Case], Iterator[Finding]], ...]] = (
    _addresses,
    _ports,
    _ephemeral,
    _directory,
    _logout,
    _clock,
    _kernel,
    _kernel_tls,
    _descriptors,
    _pipes,
    _transport,
    _buffers,
    _congestion_control,
    _pacing,
    _interfaces,
)


def judge_state(about: DirectoryFacts, *, uid: int) -> Iterator[Finding]:
    """The state directory of a facility whose service runs as `uid`."""
    quoted = shlex.quote(about.path)

    def finding(level: Level, words: str, fix: str | None = None) -> Finding:
        return Finding(check="state", level=level, message=f"state directory {about.path} {words}", fix=fix)

    found = []
    kind = about.file_system.type if about.file_system else None
    if kind in NETWORK_FILE_SYSTEMS:
        found.append(
            finding(
                "problem", f"is on a network file system ({kind}): locks cannot be trusted there", OTHER_STATE
            )
        )
    if about.errno not in (None, "ENOENT"):
        found.append(
            finding("problem", f"cannot be made ({about.errno})", f"install -d -m 0700 -o {uid} {quoted}")
        )
    elif about.errno is None and about.uid != uid:
        found.append(
            finding(
                "problem",
                f"belongs to uid {about.uid}, not to {uid}; where the service runs as {about.uid}, so must the doctor",
                f"chown -R {uid} {quoted}",
            )
        )
    elif about.mode is not None and about.mode & 0o077:
        found.append(finding("problem", f"is open to others (mode {about.mode:o})", f"chmod 0700 {quoted}"))
    found += [
        finding(level, words, fix) for level, words, fix in _room(about, OTHER_STATE, noexec_matters=False)
    ]
    yield from found or [
        finding("ok", "will be made" if about.errno == "ENOENT" else f"can be used ({kind})")
    ]


def _room(about: DirectoryFacts, elsewhere: str, *, noexec_matters: bool) -> Iterator[tuple[Level, str, str]]:
    """What is wrong with the file system of a directory in which something has to be written."""
    if about.read_only:
        yield "problem", "is on a file system that is mounted read-only", elsewhere
    if about.noexec and noexec_matters:
        yield (
            "problem",
            "is on a file system that is mounted noexec: the relay that is copied there cannot run",
            elsewhere,
        )
    if about.free_bytes is not None and about.free_bytes < LEAST_FREE_BYTES:
        yield (
            "problem" if about.free_bytes < MIB else "warning",
            f"has {_mib(about.free_bytes)} of room left",
            elsewhere,
        )
    elif about.free_files == 0:
        yield "problem", "has no room for another file (inodes)", elsewhere


# --- small arithmetic


def _rounded(size: float) -> int:
    """A size up to the next 128 MiB, 1 MiB below that; within what a setting can be."""
    step = 128 * MIB if size > 128 * MIB else MIB
    return min(math.ceil(size / step) * step, LARGEST_BUFFER_BYTES)


def _mib(size: float) -> str:
    return f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.1f} MiB"


def _mbits(window_bytes: float, rtt_s: float) -> str:
    return f"{window_bytes * 8 / rtt_s / 1e6:.0f} Mbit/s"


def _version(address: str) -> int:
    return ipaddress.ip_address(address).version


def _kernel_version(release: str) -> tuple[int, int]:
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (99, 0)


def _ranges(text: str) -> list[tuple[int, int]]:
    """`1,4-6` as pairs of first and last."""
    return [(int(first), int(last or first)) for first, last in re.findall(r"([0-9]+)(?:-([0-9]+))?", text)]


def _processors(text: str | None) -> set[int]:
    return {number for first, last in _ranges(text or "") for number in range(first, last + 1)}
