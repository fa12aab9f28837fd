"""What goes wrong on the way to a stream between two facilities: it is said, and nothing is left."""

import contextlib
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from relay.apps import Payload
from relay.gateway import eventually

from scistream_flows.errors import (
    GatewayUnreachable,
    HostKeyRejected,
    PortsExhausted,
    RelayError,
)
from scistream_flows.models import Release
from scistream_flows.relay import find_s2ds
from scistream_flows.stream import Stream

from .services import Node, Services, Side

pytestmark = pytest.mark.net

BOTH = {"gateway-a": 1, "gateway-b": 1}
SIDES: tuple[Side, ...] = ("a", "b")


def works(services: Services, server: socket.socket, stream: Stream) -> None:
    """Asserts that a stream carries, and leaves nothing behind."""
    assert services.relays() == BOTH
    ends = services.established(server, stream.listeners[0])
    services.apps.exchange(*ends, Payload(1, 1_000_000), Payload(2, 1_000_000))
    stream.release()
    services.wait_bare()


# --- what a gateway lacks


def test_a_gateway_with_another_host_key_is_refused_before_it_hears_anything(services: Services) -> None:
    node = services.b
    known = services.home / ".ssh" / "known_hosts"
    right = known.read_text()
    other = services.a.server.host_key
    known.write_text(right.replace(node.server.host_key.split()[2], other.split()[2]))
    before = node.server.log
    server = services.listen()
    with pytest.raises(HostKeyRejected, match=r"gateway gateway-b: the host key of .* is not the one in"):
        services.open(server)
    assert node.account.name not in node.server.log.removeprefix(before)
    services.wait_bare()
    known.write_text(right)
    works(services, server, services.open(server))


@pytest.mark.parametrize("side", SIDES)
def test_a_gateway_without_a_free_port_is_named_whoever_has_them(services: Services, side: Side) -> None:
    node = services.node(side)
    address = node.host.address("IPv4", "wan" if side == "a" else "lan-b")
    services.configure(side, **{f"gateway_{side}": {"port_range": "5100-5101"}})
    server = services.listen()
    first = services.open(server, until="released")
    # one by a stream of ours, the other by somebody else
    theirs = 5100 + 5101 - int(_first_port(first, side))
    foreign = node.host.inside(lambda: services.apps.listen(address, theirs))
    with pytest.raises(PortsExhausted) as caught:
        services.open(server)
    assert f"gateway-{side}" in caught.value.message
    assert "5100-5101" in caught.value.message
    with pytest.raises(PortsExhausted) as caught:
        services.open(server, num_conn=2)
    assert f"site-{side}" in caught.value.message
    assert services.relays() == BOTH
    foreign.close()
    second = services.open(server, until="released")
    assert services.relays() == {"gateway-a": 2, "gateway-b": 2}
    first.release()
    works(services, server, second)


def _first_port(stream: Stream, side: Side) -> str:
    return stream.offers["PROD" if side == "a" else "CONS"].addresses[0].rpartition(":")[2]


@pytest.fixture
def small(services: Services) -> Iterator[Node]:
    """A gateway with a disk for a relay and little else."""
    with contextlib.ExitStack() as disk:
        try:
            disk.enter_context(services.b.account.small_disk("size=9m", "nr_inodes=40"))
        except PermissionError as wrong:
            pytest.skip(f"a small disk needs the right to mount: {wrong}")
        yield services.b
        services.close()


def fill(node: Node) -> Path:
    """Takes all room on the disk of a gateway; answers the file that does."""
    ballast = node.account.directory / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


@pytest.mark.parametrize("when", ["before the copy", "before the start"])
def test_a_full_disk_is_said_and_a_stream_opens_when_there_is_room(
    services: Services, small: Node, when: str
) -> None:
    server = services.listen()
    if when == "before the copy":
        took = [fill(small)]
    else:
        works(services, server, services.open(server))
        took = []
        with contextlib.suppress(OSError):  # no room for one more file
            while True:
                took.append(small.account.directory / f"ballast-{len(took)}")
                took[-1].touch()
    with pytest.raises(RelayError, match=r"gateway gateway-b.*No space left on device") as caught:
        services.open(server)
    assert caught.value.errno == "ENOSPC"
    assert services.relays() == {}
    for file in took:
        file.unlink(missing_ok=True)
    services.wait_bare()
    works(services, server, services.open(server))


def test_a_stream_needs_no_room_on_the_disk_and_its_end_is_known_without(
    services: Services, small: Node
) -> None:
    server = services.listen()
    works(services, server, services.open(server))
    ballast = fill(small)
    stream = services.open(server, until="released")
    ends = services.established(server, stream.listeners[0])
    services.apps.exchange(*ends, Payload(1, 1_000_000), Payload(2, 1_000_000))
    end = stream.release()
    assert end.reasons == {"PROD": "released", "CONS": "released"}
    assert end.cons.bytes.to_consumer == 1_000_001
    ballast.unlink()
    services.wait_bare()


# --- sshd killed


SLOW = {
    "before the start": 'if [ "$1" = start ]; then sleep 1; fi; exec {real} "$@"',
    "after the start": '{real} "$@"; status=$?; if [ "$1" = start ]; then sleep 1; fi; exit $status',
}


def slow(services: Services, side: Side, when: str) -> None:
    """The relay of a gateway takes its time to start, or to say that it has."""
    account = services.node(side).account
    shutil.copy(find_s2ds(), account.tools / "s2ds-real")
    script = account.tool("slow", SLOW[when].format(real=account.tools / "s2ds-real"))
    services.configure(side, **{f"gateway_{side}": {"s2ds": str(script)}})


def wait_for_the_copy(node: Node) -> None:
    """Returns in the middle of the copy of the relay."""
    eventually(
        lambda: [part for part in node.account.directory.glob("*.part") if part.stat().st_size > 10_000]
    )


@pytest.mark.parametrize("when", ["in the copy", "before the start", "after the start"])
def test_sshd_killed_in_mid_start_is_said_and_all_is_well_when_it_is_back(
    services: Services, when: str
) -> None:
    server = services.listen()
    node = services.b
    if when == "in the copy":
        node.account.clean()
        node.control.throttle(20)
    else:
        slow(services, "b", when)
    opening = services.apps.task(lambda: services.open(server, uid="s"))
    if when == "in the copy":
        wait_for_the_copy(node)
    else:
        eventually(lambda: node.account.processes("sleep"))
    node.server.kill()
    with pytest.raises(GatewayUnreachable, match="gateway-b"):
        opening.result(20)
    assert services.relays().keys() <= {"gateway-b"}
    node.server.start()
    services.network.restore()
    eventually(lambda: not node.account.processes("sleep") and not node.account.lost())
    works(services, server, services.open(server, uid="s"))


def test_what_a_killed_sshd_left_starting_ends_by_its_lease(services: Services) -> None:
    server = services.listen()
    slow(services, "b", "before the start")
    opening = services.apps.task(lambda: services.open(server, lease_s=2))
    eventually(lambda: services.b.account.processes("sleep"))
    services.b.server.kill()
    with pytest.raises(GatewayUnreachable):
        opening.result(20)
    eventually(services.b.relays)
    eventually(lambda: not services.b.relays(), within_s=6)
    services.b.server.start()
    assert services.facility("b").list().streams == []


# --- S2CS killed


@pytest.mark.parametrize("step", ["started s (PROD)", "claimed s (CONS)", "started s (CONS)"])
def test_services_killed_on_the_way_to_a_stream_leave_nothing_that_the_next_do_not_take_over(
    services: Services, step: str
) -> None:
    server = services.listen()
    with services.opening(server, uid="s", dies_at=step) as process:
        assert process.wait(20) == -signal.SIGKILL
    before = {name: node.relays() for name, node in services.nodes.items()}
    stream = services.open(server, uid="s")
    for name, pids in before.items():
        assert pids in ([], services.nodes[name].relays())
    works(services, server, stream)


@pytest.mark.parametrize("when", ["in the copy", "before the start", "after the start"])
def test_services_killed_in_mid_start_leave_nothing_that_the_next_do_not_take_over(
    services: Services, when: str
) -> None:
    server = services.listen()
    node = services.b
    if when == "in the copy":
        node.account.clean()
        node.control.throttle(20)
    else:
        slow(services, "b", when)
    with services.opening(server, uid="s") as process:
        if when == "in the copy":
            wait_for_the_copy(node)
        else:
            eventually(lambda: node.account.processes("sleep"))
        process.kill()
    services.network.restore()
    eventually(lambda: not node.account.processes("sleep") and not node.account.lost())
    works(services, server, services.open(server, uid="s"))


def test_a_stream_whose_services_died_is_released_by_the_next(services: Services) -> None:
    server = services.listen()
    with services.opening(server, uid="s", dies_at="started s (CONS)") as process:
        assert process.wait(20) == -signal.SIGKILL
    assert services.relays() == BOTH
    for side in SIDES:
        facility = services.facility(side)
        for stream in facility.list().streams:
            facility.release(Release(uid=stream.uid, role=stream.role))
    services.wait_bare()


def test_relays_whose_services_died_and_never_come_back_end_by_their_leases(services: Services) -> None:
    server = services.listen()
    with services.opening(server, uid="s", lease_s=2, dies_at="started s (CONS)") as process:
        assert process.wait(20) == -signal.SIGKILL
    assert services.relays() == BOTH
    eventually(lambda: not services.relays(), within_s=6)
    for side in SIDES:
        assert services.facility(side).list().streams == []
