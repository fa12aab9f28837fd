"""The doctor on real gateways: settings of their kernels, firewalls and routes between them, over SSH."""

import ipaddress
import re
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from scistream_flows.config import load_facility
from scistream_flows.diagnosis import Finding
from scistream_flows.doctor import examine

from .services import Services
from .topology import Host

pytestmark = pytest.mark.net

FAST: dict[str, Any] = {"rate_mbits_per_s": 10_000, "rtt_s": 0.05}


@pytest.fixture(autouse=True)
def usual_programs(services: Services) -> None:
    """The doctor takes back what it has made there."""
    for node in services.nodes.values():
        (node.account.tools / "rmdir").symlink_to(shutil.which("rmdir") or "/bin/rmdir")


def runtime_directories(services: Services) -> set[str]:
    """Those of A's gateway, wherever they are; earlier tests have left some, each facility's own."""
    return {
        one.name
        for node in services.nodes.values()
        for one in node.account.directory.iterdir()
        if one.name.startswith("relays-gateway-a-")
    }


def found(check: str, **options: Any) -> list[Finding]:
    """What is not in order at facility A."""
    findings = examine(load_facility("site-a"), **options)
    return [one for one in findings if one.check == check and one.level != "ok"]


def paste(host: Host, fix: str | None) -> None:
    """Run a command as root of a gateway; what it writes for later starts goes with this shell."""
    assert fix
    host.call("sh", "-c", f"mount -t tmpfs none /etc/sysctl.d && {fix}")


@pytest.mark.parametrize(
    ("setting", "broken", "check", "level"),
    [
        ("net.ipv4.tcp_rmem", "4096 131072 6291456", "buffers", "warning"),
        ("net.ipv4.tcp_wmem", "4096 16384 4194304", "buffers", "warning"),
        ("net.ipv4.tcp_slow_start_after_idle", "1", "slow-start-after-idle", "warning"),
        ("net.ipv4.tcp_window_scaling", "0", "window-scaling", "problem"),
        ("net.ipv4.tcp_timestamps", "0", "timestamps", "warning"),
        ("net.ipv4.tcp_congestion_control", "reno", "congestion-control", "warning"),
        ("net.ipv4.ip_local_port_range", "5000 60999", "ephemeral-ports", "warning"),
    ],
)
def test_a_setting_of_the_gateways_kernel_is_found_until_its_fix_is_pasted_there(
    services: Services, setting: str, broken: str, check: str, level: str
) -> None:
    host = services.a.host
    # everything else in order, so that the finding is this one's
    host.set(
        net__ipv4__tcp_rmem="4096 131072 268435456",
        net__ipv4__tcp_wmem="4096 16384 268435456",
        net__ipv4__tcp_slow_start_after_idle="0",
    )

    def seen() -> list[Finding]:
        return [one for one in found(check, **FAST) if one.level != "note"]

    assert seen() == []
    host.set(**{setting.replace(".", "__"): broken})
    (one,) = seen()
    assert (one.level, one.gateway) == (level, "gateway-a")
    assert setting in f"{one.message} {one.fix}"
    paste(host, one.fix)
    assert seen() == []


def test_a_small_mtu_is_found_until_its_fix_is_pasted_there(services: Services) -> None:
    services.configure("a", gateway_a={"lan_bind": services.a.host.address(services.family, "wan")})
    services.a.host.set(net__ipv4__tcp_mtu_probing="0")
    (one,) = found("mtu", **FAST)
    assert (one.level, "wan has an MTU of 1500" in one.message) == ("warning", True)
    paste(services.a.host, one.fix)
    assert found("mtu", **FAST) == []
    (one,) = found("mtu-probing", **FAST)
    paste(services.a.host, one.fix)
    assert found("mtu-probing", **FAST) == []


@pytest.mark.usefixtures("family")
def test_an_address_of_another_gateway_is_found_until_the_edit(services: Services) -> None:
    theirs, ours = (node.host.address(services.family, "wan") for node in (services.b, services.a))
    services.configure("a", gateway_a={"wan_bind": theirs})
    (one,) = found("address")
    assert f"{theirs} cannot be bound (EADDRNOTAVAIL)" in one.message
    assert f"{ours} (wan)" in one.message
    edit = re.search(r'wan_bind = "(.*)"', one.fix or "")
    assert edit
    assert ipaddress.ip_address(edit[1]).version == ipaddress.ip_address(theirs).version
    services.configure("a", gateway_a={"wan_bind": edit[1]})
    assert found("address") == []


@pytest.mark.usefixtures("family")
def test_the_way_between_two_facilities_is_proven_in_both_directions_and_nothing_is_left(
    services: Services,
) -> None:
    before = runtime_directories(services)
    findings = [
        one for one in examine(load_facility("site-a"), peer=services.facility("b")) if one.check == "reach"
    ]
    assert [one.level for one in findings] == ["ok", "ok"]
    assert services.relays() == {}
    services.wait_bare()
    assert runtime_directories(services) == before


@pytest.fixture
def swallowing(services: Services) -> Sequence[str]:
    """The options of a rule of gateway A that swallows what comes for its listeners, as a firewall does."""
    host = services.a.host
    # before the table of its own addresses, which comes first otherwise
    host.call("ip", "rule", "add", "pref", "100", "lookup", "local")
    host.call("ip", "rule", "del", "pref", "0")
    return ("pref", "10", "iif", "wan", "ipproto", "tcp", "dport", "5100-5199")


def test_a_firewall_before_the_listeners_is_found_with_leg_and_errno_until_it_lets_them_through(
    services: Services, swallowing: Sequence[str]
) -> None:
    host, wan = services.a.host, services.a.host.address(services.family, "wan")
    host.call("ip", "rule", "add", *swallowing, "blackhole")
    (one,) = found("reach", peer=services.facility("b"))
    assert (one.level, one.gateway) == ("problem", "gateway-a")
    assert f"local:site-b gateway gateway-b -> gateway-a, WAN, {wan}:" in one.message
    assert "timeout (ETIMEDOUT)" in one.message
    theirs = services.b.host.address(services.family, "wan")
    assert f"iptables -I INPUT -p tcp -s {theirs}/32 --dport 5100:5199 -j ACCEPT" in (one.fix or "")
    services.wait_bare()
    host.call("ip", "rule", "del", *swallowing, "blackhole")
    assert found("reach", peer=services.facility("b")) == []


def test_a_missing_route_is_found_in_its_direction_until_it_is_there(services: Services) -> None:
    wan = services.b.host.address(services.family, "wan")
    services.a.host.call("ip", "route", "add", "unreachable", wan)
    findings = found("reach", peer=services.facility("b"))
    outward = next(one for one in findings if "gateway-a -> local:site-b" in one.message)
    assert "no-route (EHOSTUNREACH)" in outward.message
    assert f"ip route get {wan}" in (outward.fix or "")
    services.wait_bare()
    services.a.host.call("ip", "route", "del", "unreachable", wan)
    assert found("reach", peer=services.facility("b")) == []
