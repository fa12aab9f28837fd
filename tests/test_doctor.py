"""The doctor: every finding is seen on something that is broken, and gone after what it says to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sshd import Account, Server, make_key, why_not

from scistream_flows.config import FacilityConfig, PortRange, load_facility
from scistream_flows.diagnosis import Case, Finding, judge, judge_state
from scistream_flows.doctor import Attempt, clock_offset_s, examine, judge_attempt
from scistream_flows.doorway import serve_socket
from scistream_flows.errors import NotFound
from scistream_flows.models import Probe
from scistream_flows.relay import DirectoryFacts, NodeFacts
from scistream_flows.s2cs import S2CS

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
BOTH_BINDS = 'wan_bind = "192.0.2.10", lan_bind = "192.0.2.10"'
GIB = 1 << 30
MIB = 1 << 20

# A transfer node in good order, as `s2ds inspect` says it: 100 Gbit/s, two sockets, tuned for 50 ms.
NODE: dict[str, Any] = {
    "protocol": 1,
    "version": "0.1.0",
    "host": "dtn1",
    "uid": 1000,
    "user": "dtn",
    "kernel": "6.8.0-45-generic",
    "architecture": "x86_64",
    "at_ns": 1_795_386_177_339_738_102,
    "took_s": 0.002,
    "ktls": {"available": True, "errno": None, "new_keys": True},
    "pipe": {"asked_bytes": 1048576, "granted_bytes": 1048576, "errno": None},
    "page_bytes": 4096,
    "own_addresses": [{"address": "192.0.2.10", "interface": "ens1"}],
    "addresses": [
        {
            "address": "192.0.2.10",
            "errno": None,
            "interface": {
                "name": "ens1",
                "mtu": 9000,
                "speed_mbits_per_s": 100_000,
                "driver": "mlx5_core",
                "numa_node": 1,
            },
            "ports": {"checked": 101, "free": 101, "refused": []},
        }
    ],
    "directories": [
        {
            "path": "/home/dtn/.cache/scistream/relays-dtn1-x",
            "errno": None,
            "mode": 0o700,
            "uid": 1000,
            "file_system": {"type": "xfs", "mounted_at": "/"},
            "free_bytes": 10**12,
            "free_files": 10**6,
            "read_only": False,
            "noexec": False,
        }
    ],
    "descriptors": {"soft": 1024, "hard": 524_288},
    "settings": {
        "fs.file-max": "9223372036854775807",
        "fs.file-nr": "3000\t0\t9223372036854775807",
        "fs.pipe-max-size": "1048576",
        "fs.pipe-user-pages-soft": "16384",
        "net.core.default_qdisc": "fq",
        "net.core.rmem_max": "2147483647",
        "net.core.wmem_max": "2147483647",
        "net.ipv4.ip_local_port_range": "32768\t60999",
        "net.ipv4.ip_local_reserved_ports": "",
        "net.ipv4.tcp_available_congestion_control": "reno cubic bbr",
        "net.ipv4.tcp_congestion_control": "bbr",
        "net.ipv4.tcp_mem": "1500000\t2000000\t3000000",
        "net.ipv4.tcp_mtu_probing": "1",
        "net.ipv4.tcp_rmem": "4096\t131072\t2147483647",
        "net.ipv4.tcp_slow_start_after_idle": "0",
        "net.ipv4.tcp_timestamps": "1",
        "net.ipv4.tcp_window_scaling": "1",
        "net.ipv4.tcp_wmem": "4096\t16384\t2147483647",
    },
    "logind": {
        "running": True,
        "kill_user_processes": "no",
        "kill_only_users": "",
        "kill_exclude_users": "root",
        "linger": False,
    },
    "cpus": 16,
    "cpus_allowed": "16-31",
    "numa_nodes": {"0": "0-15", "1": "16-31"},
    "memory_bytes": 512 * GIB,
}
FILE = """
[facility]
name = "site"

[[gateway]]
name = "dtn1"
kind = "ssh"
host = "dtn1.site.example"
wan_bind = "192.0.2.10"
lan_bind = "192.0.2.10"
port_range = "5100-5200"

[policy]
targets = ["10.0.0.0/8"]
peers = ["198.51.100.0/24"]
consumers = ["10.0.0.0/8"]
"""


def changed(document: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """The document with one value changed; the path is `key/key/0/key`, as keys have dots."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    place: Any = copy
    *way, last = [int(part) if part.isdigit() and isinstance(part, str) else part for part in path.split("/")]
    for part in way:
        place = place[part if isinstance(place, list) else str(part)]
    place[last if isinstance(place, list) else str(last)] = value
    return copy


@pytest.fixture
def dtn(tmp_path: Path) -> FacilityConfig:
    file = tmp_path / "site.toml"
    file.write_text(FILE)
    return load_facility("site", file=file, state_dir=tmp_path / "state", environment={})


def case(config: FacilityConfig, document: Mapping[str, Any] = NODE, **expected: Any) -> Case:
    facts = NodeFacts.model_validate(document)
    given = {"rate_mbits_per_s": 100_000, "rtt_s": 0.05, "relay_dir": facts.directories[0].path}
    return Case(facts=facts, gateway=config.gateways[0], config=config, **{**given, **expected})


def found(findings: Iterator[Finding] | Sequence[Finding], check: str) -> list[Finding]:
    """What a check has found, what is in order left out."""
    return [one for one in findings if one.check == check and one.level != "ok"]


def edited(text: str, fix: str) -> str:
    """A facility's file after the edit that a fix names: keys of its only gateway, or of its policy."""
    match = re.fullmatch(r"in \S+, under (\[\[gateway\]\]|\[policy\])[^:]*: (.+)", fix)
    assert match, fix
    for key, value in re.findall(r'(\w+) = ("[^"]*"|\[[^]]*\]|\d+)', match[2]):
        text = re.sub(rf"(?m)^{key} = .*\n", "", text)
        text = text.replace(f"{match[1]}\n", f"{match[1]}\n{key} = {value}\n", 1)
    return text


# --- judgement, on facts as real nodes give them


def test_a_node_in_good_order_gives_no_finding_but_those_in_order(dtn: FacilityConfig) -> None:
    findings = list(judge(case(dtn)))
    assert [one for one in findings if one.level != "ok"] == []
    assert all(one.fix is None and one.gateway == "dtn1" for one in findings)


@pytest.mark.parametrize(
    ("setting", "value", "check", "level"),
    [
        ("net.ipv4.tcp_rmem", "4096\t131072\t6291456", "buffers", "warning"),
        ("net.ipv4.tcp_wmem", "4096\t16384\t4194304", "buffers", "warning"),
        ("net.core.rmem_max", "212992", "buffers", "note"),
        ("net.core.wmem_max", "212992", "buffers", "note"),
        ("net.ipv4.tcp_mem", "100000\t200000\t300000", "tcp-memory", "warning"),
        ("net.ipv4.tcp_slow_start_after_idle", "1", "slow-start-after-idle", "warning"),
        ("net.ipv4.tcp_window_scaling", "0", "window-scaling", "problem"),
        ("net.ipv4.tcp_timestamps", "0", "timestamps", "warning"),
        ("net.ipv4.tcp_mtu_probing", "0", "mtu-probing", "note"),
        ("net.ipv4.tcp_congestion_control", "reno", "congestion-control", "warning"),
        ("net.core.default_qdisc", "pfifo_fast", "pacing", "note"),
        ("net.ipv4.ip_local_port_range", "1024\t65535", "ephemeral-ports", "warning"),
        ("fs.pipe-user-pages-soft", "1024", "pipes", "warning"),
        ("fs.pipe-max-size", "65536", "pipes", "warning"),
        ("fs.file-max", "10000", "descriptors", "warning"),
    ],
)
def test_a_kernel_setting_that_hurts_is_found_and_its_fix_is_enough(
    dtn: FacilityConfig, setting: str, value: str, check: str, level: str
) -> None:
    document = changed(NODE, f"settings/{setting}", value)
    (one,) = found(judge(case(dtn, document)), check)
    assert (one.level, one.gateway) == (level, "dtn1")
    assert one.fix
    match = re.search(r"sysctl -w '?([\w.-]+)=([^']*?)'? && echo '?\1=\2'? >> /etc/sysctl\.d/", one.fix)
    assert match, one.fix
    assert found(judge(case(dtn, changed(document, f"settings/{match[1]}", match[2]))), check) == []


@pytest.mark.parametrize(
    ("rate_mbits_per_s", "rtt_s", "needed_bytes"),
    [
        (100_000, 0.05, 1280 * MIB),
        (25_000, 0.1, 640 * MIB),
        (10_000, 0.01, 24 * MIB),
        (100_000, 0.1, 2**31 - 1),
    ],
)
def test_a_buffer_is_twice_what_is_under_way_and_never_more_than_a_setting_holds(
    dtn: FacilityConfig, rate_mbits_per_s: int, rtt_s: float, needed_bytes: int
) -> None:
    document = changed(NODE, "settings/net.ipv4.tcp_rmem", "4096\t131072\t4194304")
    expected = {"rate_mbits_per_s": rate_mbits_per_s, "rtt_s": rtt_s}
    (one,) = found(judge(case(dtn, document, **expected)), "buffers")
    assert one.fix
    assert f"sysctl -w 'net.ipv4.tcp_rmem=4096 131072 {needed_bytes}'" in one.fix


@pytest.mark.parametrize(
    ("rtt_s", "gbits_per_s", "num_conn"), [(0.1, "85899", 2), (0.15, "57266", 2), (0.3, "28633", 4)]
)
def test_what_one_connection_can_never_carry_is_said_with_how_many_are_needed(
    dtn: FacilityConfig, rtt_s: float, gbits_per_s: str, num_conn: int
) -> None:
    (one,) = found(judge(case(dtn, rtt_s=rtt_s)), "window")
    assert f"{gbits_per_s} Mbit/s" in one.message
    assert one.fix
    assert f"num_conn={num_conn} " in one.fix


def test_without_rate_and_round_trip_it_says_what_the_buffers_are_good_for(dtn: FacilityConfig) -> None:
    document = changed(NODE, "settings/net.ipv4.tcp_rmem", "4096\t131072\t67108864")
    (one,) = found(judge(case(dtn, document, rate_mbits_per_s=0, rtt_s=None)), "buffers")
    assert (one.level, one.fix) == ("note", None)
    assert "2684 Mbit/s where the round trip is 100 ms" in one.message  # 64 MiB, half of it usable


def test_settings_that_a_node_does_not_show_are_no_findings(dtn: FacilityConfig) -> None:
    findings = list(judge(case(dtn, {**NODE, "settings": dict.fromkeys(NODE["settings"])})))
    assert [one for one in findings if one.level != "ok"] == []


@pytest.mark.parametrize(
    ("path", "value", "check", "level", "said", "fix"),
    [
        ("ktls", {"available": False, "errno": "ENOENT"}, "ktls", "note", "ENOENT", "modprobe tls"),
        ("kernel", "4.18.0-553.el8_10.x86_64", "kernel", "warning", "before 4.20", "5.11 or later"),
        ("descriptors/hard", 4096, "descriptors", "warning", "4096 files", "dtn - nofile 33792"),
        ("pipe/granted_bytes", 8192, "pipes", "warning", "8192 bytes", "fs.pipe-user-pages-soft"),
        (
            "logind/kill_user_processes",
            "yes",
            "logout",
            "problem",
            "KillUserProcesses",
            "loginctl enable-linger dtn",
        ),
        ("addresses/0/interface/mtu", 1500, "mtu", "warning", "MTU of 1500", "ip link set dev ens1 mtu 9000"),
        ("addresses/0/interface/speed_mbits_per_s", 25_000, "speed", "warning", "25000 Mbit/s", None),
        ("cpus_allowed", "0-31", "numa", "note", "NUMA node 1", "taskset -c 16-31"),
        (
            "directories/0/noexec",
            True,
            "directory",
            "problem",
            "noexec",
            'directory = "/var/tmp/scistream-site"',
        ),
        ("directories/0/read_only", True, "directory", "problem", "read-only", 'directory = "/var/tmp/'),
        ("directories/0/free_bytes", 10, "directory", "problem", "0.0 MiB", 'directory = "/var/tmp/'),
        ("directories/0/free_files", 0, "directory", "problem", "inodes", 'directory = "/var/tmp/'),
        ("directories/0/file_system/type", "nfs4", "directory", "note", "network", 'directory = "/var/tmp/'),
        (
            "addresses/0/errno",
            "EADDRNOTAVAIL",
            "address",
            "problem",
            "EADDRNOTAVAIL",
            BOTH_BINDS,
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_named_with_what_to_do(
    dtn: FacilityConfig, path: str, value: object, check: str, level: str, said: str, fix: str | None
) -> None:
    (one,) = found(judge(case(dtn, changed(NODE, path, value))), check)
    assert one.level == level
    assert said in one.message
    assert (one.fix is None) if fix is None else (fix in (one.fix or ""))


@pytest.mark.parametrize("odd", ["", "-1", "a-b", "x y z", "1-", ",", "9" * 30])
def test_what_a_node_says_oddly_is_no_crash(dtn: FacilityConfig, odd: str) -> None:
    settings = dict.fromkeys(NODE["settings"], odd) | {"net.ipv4.ip_local_port_range": "32768 60999"}
    wide = dtn.gateways[0].model_copy(update={"port_range": PortRange(1, 65_535)})
    taken = {"checked": 9, "free": 0, "refused": [{"port": 1, "errno": "EADDRINUSE"}]}
    document = {
        **NODE,
        "settings": settings,
        "kernel": odd,
        "cpus_allowed": odd,
        "numa_nodes": {"0": odd, "1": odd},
        "addresses": [{**NODE["addresses"][0], "ports": taken}],
    }
    site = dtn.model_copy(update={"gateways": (wide,)})
    (ports,) = found(list(judge(case(site, document))), "ports")
    assert 'port_range = "1024-65535"' in str(ports.fix)


@pytest.mark.parametrize(
    "logind",
    [
        {"running": False},
        {"linger": True},
        {"kill_exclude_users": "root dtn"},
        {"kill_only_users": "guest"},
    ],
)
def test_a_user_whom_logind_spares_is_in_order(dtn: FacilityConfig, logind: dict[str, Any]) -> None:
    document = {**NODE, "logind": {**NODE["logind"], "kill_user_processes": "yes", **logind}}
    assert found(judge(case(dtn, document)), "logout") == []


def test_ports_that_the_kernel_gives_to_nobody_are_in_order_and_others_stay_reserved(
    dtn: FacilityConfig,
) -> None:
    document = changed(NODE, "settings/net.ipv4.ip_local_port_range", "5150\t60999")
    document = changed(document, "settings/net.ipv4.ip_local_reserved_ports", "8080,9000-9100")
    (one,) = found(judge(case(dtn, document)), "ephemeral-ports")
    assert one.fix
    assert "ip_local_reserved_ports=8080,9000-9100,5150-5200" in one.fix
    for reserved in ("8080,5150-5200", "5000-5160,5161-6000"):
        again = changed(document, "settings/net.ipv4.ip_local_reserved_ports", reserved)
        assert found(judge(case(dtn, again)), "ephemeral-ports") == []


@pytest.mark.parametrize(
    ("ahead_s", "elapsed_s", "took_s", "offset_s"),
    [
        (0.0, 0.4, 0.1, 0.0),  # read at the beginning
        (0.2, 0.4, 0.1, 0.0),  # read any time between question and answer
        (10.0, 0.4, 0.1, 9.7),
        (-10.0, 0.4, 0.1, -10.0),
        (0.35, 0.4, 0.1, 0.05),
    ],
)
def test_a_clock_is_wrong_only_by_what_the_round_trip_cannot_explain(
    ahead_s: float, elapsed_s: float, took_s: float, offset_s: float
) -> None:
    began_ns = NODE["at_ns"]
    facts = NodeFacts.model_validate({**NODE, "at_ns": began_ns + int(ahead_s * 1e9), "took_s": took_s})
    assert clock_offset_s(facts, began_ns=began_ns, elapsed_s=elapsed_s) == pytest.approx(offset_s, abs=1e-6)


@pytest.mark.parametrize(
    ("offset_s", "said"), [(90.0, "90.0 s or more ahead"), (-5.0, "5.0 s or more behind")]
)
def test_a_clock_that_is_wrong_is_a_warning(dtn: FacilityConfig, offset_s: float, said: str) -> None:
    (one,) = found(judge(case(dtn, clock_offset_s=offset_s)), "clock")
    assert (one.level, one.fix) == ("warning", "timedatectl set-ntp true")
    assert said in one.message


@pytest.mark.parametrize(
    ("about", "said", "fix"),
    [
        (
            {"file_system": {"type": "lustre"}},
            "network file system (lustre)",
            "export SCISTREAM_STATE_DIR=/var/tmp/scistream",
        ),
        ({"uid": 0}, "belongs to uid 0, not to 1000", "chown -R 1000 /var/lib/scistream/site"),
        ({"mode": 0o755}, "open to others (mode 755)", "chmod 0700 /var/lib/scistream/site"),
        ({"errno": "EACCES", "uid": None, "mode": None}, "cannot be made", "install -d -m 0700 -o 1000 "),
        ({"read_only": True}, "read-only", "export SCISTREAM_STATE_DIR=/var/tmp/scistream"),
        ({"free_bytes": 4096}, "0.0 MiB of room", "export SCISTREAM_STATE_DIR=/var/tmp/scistream"),
        ({"free_files": 0}, "inodes", "export SCISTREAM_STATE_DIR=/var/tmp/scistream"),
    ],
)
def test_a_state_directory_that_cannot_be_trusted_is_a_problem(
    about: dict[str, Any], said: str, fix: str
) -> None:
    good = {**NODE["directories"][0], "path": "/var/lib/scistream/site", "noexec": True}
    assert [one.level for one in judge_state(DirectoryFacts(**good), uid=1000)] == ["ok"]
    (one,) = judge_state(DirectoryFacts(**{**good, **about}), uid=1000)
    assert (one.check, one.level, one.gateway) == ("state", "problem", None)
    assert said in one.message
    assert fix in (one.fix or "")


@pytest.mark.parametrize(
    ("result", "errno", "fix"),
    [
        (
            "timeout",
            "ETIMEDOUT",
            "iptables -I INPUT -p tcp -s 198.51.100.7/32 --dport 5100:5200 -j ACCEPT",
        ),
        ("refused", "ECONNREFUSED", "wan_advertise"),
        ("no-route", "EHOSTUNREACH", "ip route get 192.0.2.10"),
        ("not-ready", "ECONNRESET", "wan_advertise of gateway far-dtn"),
        ("peer-rejected", "another key", "leads to this gateway only"),
        (None, None, "logs"),
    ],
)
def test_a_way_that_does_not_lead_through_is_told_with_leg_and_errno(
    dtn: FacilityConfig, result: str | None, errno: str | None, fix: str
) -> None:
    probe = Probe(result=result, errno=errno) if result else None
    attempt = Attempt(probe, "192.0.2.10:5117", "dtn1", "far-dtn", ["198.51.100.7/32"])
    one = judge_attempt(case(dtn), attempt, far="compute:far", inward=True)
    assert (one.check, one.level) == ("reach", "problem")
    assert "compute:far gateway far-dtn -> dtn1, WAN, 192.0.2.10:5117" in one.message
    assert errno is None or errno in one.message
    assert fix in (one.fix or "")


# --- real nodes


class Environment:
    """One facility with a file of its own, and the doctor in a process of its own where limits matter."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "site.toml"
        self.state_dir = folder / "own"

    def write(self, *, policy: str = "", **keys: object) -> None:
        gateway = {"name": "here", "wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1", **keys}
        lines = ["[facility]", 'name = "site"', "[[gateway]]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in gateway.items()]
        lines += [
            "[policy]",
            'targets = ["127.0.0.0/8"]',
            'peers = ["127.0.0.0/8"]',
            'consumers = ["127.0.0.0/8"]',
        ]
        self.file.write_text("\n".join([*lines, policy, ""]))

    def apply(self, fix: str | None) -> None:
        """Make the edit of the file that a fix names."""
        assert fix
        assert f"in {self.file}, " in fix
        self.file.write_text(edited(self.file.read_text(), fix))

    def config(self) -> FacilityConfig:
        return load_facility("site", file=self.file, state_dir=self.state_dir)

    def examine(self, **options: Any) -> list[Finding]:
        return list(examine(self.config(), **options))

    def examine_below(self, *command: str) -> list[Finding]:
        """The same in a process that `command` starts."""
        done = subprocess.run(
            [*command, sys.executable, "-c", EXAMINING, str(self.file), str(self.state_dir)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if "unshare failed" in done.stderr:
            pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return [Finding.model_validate_json(line) for line in done.stdout.splitlines()]


EXAMINING = """
import sys
from scistream_flows.config import load_facility
from scistream_flows.doctor import examine
for one in examine(load_facility("site", file=sys.argv[1], state_dir=sys.argv[2])):
    print(one.model_dump_json())
"""


@pytest.fixture
def site(tmp_path: Path, state_base: Path) -> Environment:  # noqa: ARG001 - where other state goes
    environment = Environment(tmp_path)
    environment.write()
    return environment


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    within: Callable[..., None],
    relays_below: Callable[..., list[int]],
) -> Iterator[None]:
    """What the doctor makes for its proofs is gone when it has said everything: directories, relays and threads."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = threading.active_count()
    yield
    assert list(temporary.iterdir()) == []
    assert relays_below(temporary) == []
    within(lambda: threading.active_count() <= before, what="threads to end")


def test_a_development_facility_has_no_problem_and_nothing_is_made(state_base: Path) -> None:
    findings = list(examine(load_facility("aps")))
    assert [one for one in findings if one.level == "problem"] == []
    assert findings[0].check == "configuration"
    assert findings[0].fix == "s2cs init --facility aps"
    assert {"state", "gateway", "address", "directory", "clock", "kernel", "pipes", "descriptors"} <= {
        one.check for one in findings
    }
    assert list(state_base.iterdir()) == []


def test_only_the_gateways_named_are_looked_at(site: Environment) -> None:
    site.file.write_text(
        site.file.read_text().replace(
            "[policy]",
            '[[gateway]]\nname = "other"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n[policy]',
        )
    )
    assert {one.gateway for one in site.examine()} == {None, "here", "other"}
    assert {one.gateway for one in site.examine(gateways=["other"])} == {None, "other"}
    with pytest.raises(NotFound, match="no gateway 'third'"):
        site.examine(gateways=["other", "third"])


def test_an_address_that_the_node_does_not_have_is_a_problem_until_the_edit(site: Environment) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        try:
            outward.connect(("192.0.2.77", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
    site.write(wan_bind="203.0.113.77", lan_bind="203.0.113.77")
    (one,) = found(site.examine(), "address")
    assert (one.level, one.gateway) == ("problem", "here")
    assert "203.0.113.77 cannot be bound (EADDRNOTAVAIL)" in one.message
    site.apply(one.fix)
    assert found(site.examine(), "address") == []


def test_a_range_that_others_have_taken_is_a_problem_until_the_edit(site: Environment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        site.write(port_range=f"{port}")
        (one,) = found(site.examine(), "ports")
        assert one.level == "problem"
        assert f"{port} EADDRINUSE" in one.message
        site.apply(one.fix)
        assert [one.level for one in found(site.examine(), "ports")] in ([], ["note"])
    site.write(port_range=f"{port}")
    assert found(site.examine(), "ports") == []


def test_an_open_state_directory_is_a_problem_until_the_command(site: Environment) -> None:
    site.state_dir.mkdir(mode=0o755)
    (one,) = found(site.examine(), "state")
    assert one.level == "problem"
    assert one.fix
    subprocess.run(["sh", "-c", one.fix], check=True)
    assert found(site.examine(), "state") == []


@ROOT_ONLY
def test_a_state_directory_of_somebody_else_is_a_problem_until_the_command(site: Environment) -> None:
    site.state_dir.mkdir(mode=0o700)
    os.chown(site.state_dir, 65534, 65534)
    (one,) = found(site.examine(), "state")
    assert one.fix
    subprocess.run(["sh", "-c", one.fix], check=True)
    assert found(site.examine(), "state") == []


def test_a_state_directory_below_a_file_is_a_problem(site: Environment) -> None:
    site.state_dir.write_text("")
    site.state_dir /= "site"
    (one,) = found(site.examine(), "state")
    assert "ENOTDIR" in one.message


def test_a_state_directory_that_nobody_may_look_for_is_a_problem_and_no_crash(site: Environment) -> None:
    site.state_dir = (
        site.state_dir.parent / ("a" * 300) / "site"
    )  # as below a folder that is closed: it cannot be looked at
    (one,) = found(site.examine(), "state")
    assert "cannot be made (ENAMETOOLONG)" in one.message


@ROOT_ONLY
def test_a_full_disk_is_found_where_state_and_relays_lie(site: Environment) -> None:
    """The fix names another place; here it is the same place with room."""
    site.state_dir.mkdir(mode=0o700)
    mount = f"mount -t tmpfs -o size=$0,mode=0700 none {shlex.quote(str(site.state_dir))}"
    full = f'{mount} && dd if=/dev/zero of={shlex.quote(str(site.state_dir))}/x bs=4k >/dev/null 2>&1; "$@"'
    findings = site.examine_below("unshare", "--mount", "sh", "-c", full, "1m")
    for check in ("state", "directory"):
        (one,) = found(findings, check)
        assert one.level == "problem"
        assert "export SCISTREAM_STATE_DIR=/var/tmp/scistream" in (one.fix or "")
    findings = site.examine_below("unshare", "--mount", "sh", "-c", f'{mount} && "$@"', "200m")
    assert found(findings, "state") + found(findings, "directory") == []


def test_too_few_descriptors_are_a_warning_until_there_are_as_many_as_it_says(site: Environment) -> None:
    site.write(policy="max_num_conn = 4\nmax_connections = 64")
    (one,) = found(site.examine_below("prlimit", "--nofile=600:600"), "descriptors")
    assert (one.level, "256 connections" in one.message) == ("warning", True)
    needed = re.search(r"nofile (\d+)", one.fix or "")
    assert needed
    limit = f"--nofile={needed[1]}:{needed[1]}"
    assert found(site.examine_below("prlimit", limit), "descriptors") == []


def test_a_quota_may_need_more_descriptors_than_the_policy(site: Environment) -> None:
    few = "max_num_conn = 1\nmax_connections = 10\n"
    site.write(policy=few)
    assert found(site.examine_below("prlimit", "--nofile=1200:1200"), "descriptors") == []
    site.write(policy=few + '[[policy.quota]]\nusers = ["urn:scistream:unix:7@dtn"]\nmax_connections = 100')
    (one,) = found(site.examine_below("prlimit", "--nofile=1200:1200"), "descriptors")
    assert "100 connections" in one.message


def test_a_connection_budget_bounds_what_descriptors_are_needed(site: Environment) -> None:
    site.write(connection_budget=40)
    assert found(site.examine_below("prlimit", "--nofile=1200:1200"), "descriptors") == []


@ROOT_ONLY
def test_a_pipe_budget_beyond_what_the_user_may_have_is_a_warning(site: Environment) -> None:
    """As a user without privileges; the budget is taken back instead of raising a limit of the whole machine."""
    soft = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
    if soft == 0:
        pytest.skip("this machine does not limit the pipes of its users")
    budget = soft * os.sysconf("SC_PAGE_SIZE") // MIB
    facts = _inspected_by_nobody()
    site.write(pipe_budget_mib=2 * budget)
    config = site.config()
    (one,) = found(judge(Case(facts=facts, gateway=config.gateways[0], config=config)), "pipes")
    assert one.fix
    assert f"sysctl -w fs.pipe-user-pages-soft={2 * soft} " in one.fix
    site.write(pipe_budget_mib=budget)
    config = site.config()
    assert found(judge(Case(facts=facts, gateway=config.gateways[0], config=config)), "pipes") == []


def _inspected_by_nobody() -> NodeFacts:
    from scistream_flows.relay import find_s2ds

    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        binary = shutil.copy(find_s2ds(), folder)
        done = subprocess.run(
            [binary, "inspect", "--runtime-dir", "/tmp/nobody"],
            input='{"protocol": 1}',
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            user=65534,
            group=65534,
            extra_groups=[],
        )
    return NodeFacts.model_validate_json(done.stdout)


def test_a_gateway_that_somebody_drains_is_noted_by_its_service(site: Environment) -> None:
    with S2CS(site.config()) as service:
        service.drain("here")
        (one,) = found(site.examine(service=service), "draining")
        assert (one.level, one.gateway, one.fix) == ("note", "here", "s2cs gateway undrain here")
        service.undrain("here")
        assert found(site.examine(service=service), "draining") == []


def test_an_allow_list_that_allows_nothing_is_noted(site: Environment) -> None:
    site.file.write_text(site.file.read_text().replace('peers = ["127.0.0.0/8"]\n', ""))
    (one,) = found(site.examine(), "policy")
    assert "policy.peers is empty" in one.message
    assert one.fix
    site.apply(one.fix.replace("NETWORK/LENGTH", "127.0.0.0/8"))
    assert found(site.examine(), "policy") == []


def test_a_secret_that_others_may_read_is_a_problem_until_the_command(
    site: Environment, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    table = f'[globus]\nclient_id = "{"7" * 8}-7777-4777-8777-{"7" * 12}"\nclient_secret_file = "{secret}"\n'
    site.file.write_text(site.file.read_text() + table)
    (one,) = found(site.examine(), "secret")
    assert "cannot be read (ENOENT)" in one.message
    secret.write_text("a secret that no finding may name")
    secret.chmod(0o644)
    findings = site.examine()
    (one,) = found(findings, "secret")
    assert one.fix
    subprocess.run(["sh", "-c", one.fix], check=True)
    findings += site.examine()
    assert [one.level for one in findings if one.check == "secret"] == ["problem", "ok"]
    assert not [one for one in findings if "no finding may name" in f"{one.message} {one.fix}"]


def test_a_socket_that_others_could_replace_or_that_nobody_serves_is_found(
    site: Environment, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    place.mkdir(mode=0o755)
    identity = f"urn:globus:auth:identity:{'7' * 8}-7777-4777-8777-{'7' * 12}"
    table = f'[service]\nsocket = "{place}/s2cs"\n[service.accounts]\nnobody-like-that = "{identity}"\n'
    site.file.write_text(site.file.read_text() + table)
    place.chmod(0o777)
    findings = site.examine()
    (one,) = found(findings, "socket")
    fix = f"chmod go-w {place}"
    assert (one.level, one.fix) == ("problem", fix)
    subprocess.run(["sh", "-c", fix], check=True)
    (one,) = found(site.examine(), "socket")
    assert (one.level, one.fix) == ("warning", f"s2cs --config {site.file}")
    with serve_socket(site.config()):
        assert [one.level for one in site.examine() if one.check == "socket"] == ["ok"]
    (account,) = found(findings, "accounts")
    assert "nobody-like-that, which is no account" in account.message


def test_the_way_to_another_facility_is_proven_in_both_directions(
    site: Environment, facility: Callable[..., S2CS], relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    far = facility("far")
    reached = [one for one in site.examine(peer="local:far") if one.check == "reach"]
    assert [one.level for one in reached] == ["ok", "ok"]
    assert relays_below(state_base) == []
    assert far.survey().streams == []
    assert not site.state_dir.exists()


def test_a_peer_that_the_policy_does_not_have_is_a_problem_until_the_edit(
    site: Environment, facility: Callable[..., S2CS]
) -> None:
    facility("far")
    allowed = 'peers = ["127.0.0.0/8"]'
    site.file.write_text(site.file.read_text().replace(allowed, 'peers = ["198.51.100.0/24"]'))
    (one,) = found(site.examine(peer="local:far"), "reach")
    assert one.level == "problem"
    assert "from here to local:far" in one.message
    assert "peers" in f"{one.message} {one.fix}"
    site.file.write_text(site.file.read_text().replace('peers = ["198.51.100.0/24"]', allowed))
    assert found(site.examine(peer="local:far"), "reach") == []


def test_a_peer_that_cannot_be_addressed_is_a_problem(site: Environment) -> None:
    (one,) = found(site.examine(peer="nowhere"), "peer")
    assert (one.level, "nowhere" in one.message) == ("problem", True)


# --- over SSH


@pytest.fixture(scope="module")
def the_account() -> Iterator[Account]:
    if reason := why_not():
        pytest.skip(reason)
    Path("/run/sshd").mkdir(
        mode=0o755, exist_ok=True
    )  # where sshd locks itself in; others may use it too: it stays
    account = Account()
    yield account
    account.remove()


@pytest.fixture
def account(the_account: Account, within: Callable[..., None]) -> Iterator[Account]:
    """The gateway's user; after the test nothing of it runs, and it has written nowhere but in its directory."""
    the_account.clean()
    yield the_account
    within(lambda: not the_account.processes(), what="the processes of the user to end")
    assert the_account.lost() == []


@pytest.fixture
def far(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Environment
) -> Iterator[Server]:
    """An sshd whose key is known, and the facility with this one gateway."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    make_key(home / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (account.tools / "rmdir").symlink_to(shutil.which("rmdir") or "/bin/rmdir")
    server = Server(account, (home / ".ssh" / "id_ed25519.pub").read_text())
    server.start()
    (home / ".ssh" / "known_hosts").write_text(server.host_key)
    over_ssh(site, server)
    yield server
    server.kill()


def over_ssh(site: Environment, server: Server, **keys: object) -> None:
    there: dict[str, Any] = {
        "kind": "ssh",
        "host": "127.0.0.1",
        "port": server.port,
        "user": server.account.name,
    }
    there |= {"directory": str(server.account.directory), "connect_timeout_s": 5, **keys}
    site.write(**there)


def test_a_gateway_over_ssh_is_examined_as_one_here_and_nothing_is_left(
    site: Environment, far: Server, facility: Callable[..., S2CS]
) -> None:
    facility("far")
    findings = site.examine(peer="local:far")
    assert [one for one in findings if one.level == "problem"] == []
    assert [one.level for one in findings if one.check == "reach"] == ["ok", "ok"]
    (answers,) = [one for one in findings if one.check == "gateway"]
    assert f"user {far.account.name}" in answers.message
    assert far.account.left() == []
    assert [one for one in far.account.directory.iterdir() if one.is_dir()] == []


def test_an_unknown_host_key_is_a_problem_until_the_command(
    site: Environment, far: Server, tmp_path: Path
) -> None:
    (tmp_path / "home" / ".ssh" / "known_hosts").unlink()
    findings = site.examine()
    (one,) = found(findings, "gateway")
    assert "is not in" in one.message
    assert one.fix
    assert {one.check for one in findings if one.gateway} == {"gateway"}
    subprocess.run(["sh", "-c", one.fix], check=True, timeout=30, capture_output=True)
    assert found(site.examine(), "gateway") == []
    assert far.sessions() is not None


def test_a_gateway_that_is_not_there_is_a_problem_and_the_others_are_examined(
    site: Environment, far: Server
) -> None:
    far.kill()
    over_ssh(site, far, connect_timeout_s=1)
    site.file.write_text(
        site.file.read_text().replace(
            "[policy]",
            '[[gateway]]\nname = "other"\nwan_bind = "127.0.0.1"\nlan_bind = "127.0.0.1"\n[policy]',
        )
    )
    findings = site.examine()
    (one,) = found(findings, "gateway")
    assert (one.gateway, one.level) == ("here", "problem")
    assert [one.gateway for one in findings if one.check == "gateway" and one.level == "ok"] == ["other"]


def test_a_directory_that_is_mounted_noexec_is_a_problem_until_the_edit(
    site: Environment, far: Server
) -> None:
    try:
        with far.account.small_disk("noexec"):
            (one,) = found(site.examine(), "gateway")
            assert one.level == "problem"
            assert 'directory = "/var/tmp/scistream-site"' in (one.fix or "")
            # a place that the test may use
            site.apply((one.fix or "").replace("/var/tmp/scistream-site", str(far.account.home / "own")))
            (far.account.home / "own").mkdir()
            os.chown(far.account.home / "own", far.account.uid, far.account.uid)
            assert found(site.examine(), "gateway") == []
    except PermissionError as wrong:
        pytest.skip(f"this process may not mount: {wrong}")
    finally:
        shutil.rmtree(far.account.home / "own", ignore_errors=True)


def test_a_disk_that_is_nearly_full_is_a_warning_until_there_is_room(site: Environment, far: Server) -> None:
    try:
        with far.account.small_disk("size=16m"):
            (one,) = found(site.examine(), "directory")
            assert one.level == "warning"
            assert 'directory = "/var/tmp/scistream-' in (one.fix or "")
    except PermissionError as wrong:
        pytest.skip(f"this process may not mount: {wrong}")
    assert found(site.examine(), "directory") == []


def test_a_relay_of_another_architecture_is_a_problem_with_what_to_do(site: Environment, far: Server) -> None:
    far.account.tool("uname", "case $1 in -m) echo aarch64;; *) echo Linux;; esac")
    (one,) = found(site.examine(), "gateway")
    assert "aarch64" in one.message
    assert "s2ds" in (one.fix or "")


def test_an_older_relay_that_knows_no_facts_is_a_problem_and_no_crash(site: Environment, far: Server) -> None:
    old = far.account.tool(
        "s2ds-old",
        'case $1 in version) echo \'{"name":"s2ds","version":"0.0.9","protocol":1}\';; *) exit 64;; esac',
    )
    over_ssh(site, far, s2ds=str(old))
    (one,) = found(site.examine(), "gateway")
    assert "inspect" in one.message
