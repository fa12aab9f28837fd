"""The test network itself: what it promises, the other tests rely on."""

import errno
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from relay.apps import Applications, Payload, receive, receive_exactly, send_and_end

from .topology import NAMESPACES, Family, Host, Leg, Network, reaches, remove_leftovers, why_not

pytestmark = pytest.mark.net


@pytest.fixture
def apps() -> "Applications":
    return Applications()


def connected(
    apps: Applications, client: Host, server: Host, address: str
) -> tuple[socket.socket, socket.socket]:
    listener = server.inside(lambda: apps.listen(address))
    near = client.inside(lambda: apps.dial(listener.getsockname()))
    return near, apps.accept(listener)


def over(leg: Leg, network: Network, family: Family) -> tuple[Host, Host, str]:
    """Two hosts of a leg, and the address of the second."""
    one, other = (network.host(name) for name in list(leg.ports)[:2])
    return one, other, other.address(family, leg.name)


def test_neighbours_reach_each_other(network: Network, apps: Applications, family: Family) -> None:
    for leg in network.legs:
        one, other, address = over(leg, network, family)
        near, far = connected(apps, one, other, address)
        near.sendall(b"?")
        assert receive_exactly(far, 1) == b"?"
    apps.close()


def test_who_shares_no_leg_has_no_route_to_each_other(network: Network, family: Family) -> None:
    apart = {
        (str(one), str(other)): {reaches(one, address) for address in network.addresses(other, family)}
        for one in network.hosts
        for other in network.hosts
        if one is not other and network.between(one, other) is None
    }
    assert set(apart) >= {("producer", "consumer"), ("control", "producer"), ("consumer", "control")}
    assert all(answers == {errno.ENETUNREACH} for answers in apart.values()), apart


def test_a_wire_of_the_control_host_leads_to_one_gateway_only(network: Network, family: Family) -> None:
    there = network.gateway_b.address(family, "control-b")
    assert reaches(network.control, there) == errno.ECONNREFUSED
    assert reaches(network.gateway_a, there) == errno.ENETUNREACH
    network.gateway_a.call("ip", "route", "add", there, "via", network.control.address(family, "control-a"))
    assert reaches(network.gateway_a, there, within_s=1) == errno.ETIMEDOUT


def test_a_route_through_the_gateways_leads_nowhere_because_they_do_not_forward(
    network: Network, apps: Applications, family: Family
) -> None:
    network.add_routes_through_gateways(family)
    listener = network.consumer.inside(lambda: apps.listen(network.consumer.address(family)))
    host, port = listener.getsockname()[:2]
    assert reaches(network.producer, host, port, within_s=1) is not None
    apps.close()


def test_a_throttled_leg_lets_no_more_through(network: Network, apps: Applications) -> None:
    payload = Payload(1, 1_000_000)
    for leg in network.stream_legs:
        leg.throttle(16)
        near, far = connected(apps, *over(leg, network, "IPv4"))
        began = time.monotonic()
        sending = apps.task(lambda near=near: send_and_end(near, payload))  # type: ignore[misc]
        assert receive(far) == payload.digest()
        sending.result()
        assert time.monotonic() - began > 0.4, leg
    apps.close()


def test_a_delayed_leg_takes_its_time_each_way(network: Network, apps: Applications, family: Family) -> None:
    payload = Payload(2, 500_000)
    for leg in network.stream_legs:
        leg.delay(0.05)
        began = time.monotonic()
        near, far = connected(apps, *over(leg, network, family))
        assert time.monotonic() - began >= 0.1
        sending = apps.task(lambda near=near: send_and_end(near, payload))  # type: ignore[misc]
        assert receive(far) == payload.digest()
        sending.result()
    apps.close()


def test_a_cut_leg_swallows_everything_and_a_restored_one_has_lost_nothing(
    network: Network, apps: Applications, family: Family
) -> None:
    for leg in network.legs:
        near, far = connected(apps, *over(leg, network, family))
        leg.cut()
        near.sendall(b"into the void")
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(1)
        leg.restore()
        far.settimeout(20)
        assert receive_exactly(far, 13) == b"into the void"
    apps.close()


def test_two_networks_at_once_know_nothing_of_each_other(network: Network, apps: Applications) -> None:
    other = Network()
    try:
        other.build()
        listener = other.gateway_a.inside(lambda: apps.listen(other.gateway_a.address("IPv4", "wan")))
        port = listener.getsockname()[1]
        address = network.gateway_a.address("IPv4", "wan")
        assert reaches(network.gateway_b, address, port) == errno.ECONNREFUSED
        assert reaches(other.gateway_b, address, port) is None
        apps.close()
    finally:
        other.close()


def test_what_a_killed_run_has_left_is_removed_and_what_a_living_one_uses_stays(network: Network) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from network.topology import Network\n"
        "network = Network(); network.build(); network.wan.delay(0.01)\n"
        "print(network.wires.namespace, flush=True); time.sleep(60)\n"
    )
    tests = Path(__file__).resolve().parents[1]
    run = subprocess.Popen([sys.executable, "-c", script, str(tests)], stdout=subprocess.PIPE, text=True)
    assert run.stdout
    wires = NAMESPACES / run.stdout.readline().strip()
    assert wires.is_file()
    remove_leftovers()
    assert wires.is_file()
    run.send_signal(signal.SIGKILL)
    run.wait(20)
    run.stdout.close()
    remove_leftovers()
    assert not list(NAMESPACES.glob(f"{wires.name.rpartition('-')[0]}-*"))
    assert all((NAMESPACES / host.namespace).is_file() for host in network.hosts)


def test_a_machine_without_the_tools_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_not() == "no test network: ip was not found (Debian: apt-get install iproute2)"
