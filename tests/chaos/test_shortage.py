"""What runs out: a reader's patience, the disk, descriptors, pipes, ports. It is said, others go on, and it ends."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from relay.apps import Applications, Payload, receive, receive_exactly, send_and_end
from relay.gateway import Gateway, Pair, RefusedError, eventually, is_running, join

from scistream_flows.config import load_facility
from scistream_flows.errors import PortsExhausted, RegistryError, RelayError, ScistreamError
from scistream_flows.s2cs import S2CS

from .report import Record

PROD = {"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
SIDE = {"protocol": 1, "uid": "s", "role": "PROD"}


def test_a_consumer_that_is_stuck_holds_up_its_own_connection_and_no_other(
    gateway: Gateway, apps: Applications, record: Record, chance: random.Random, mode: str
) -> None:
    """Who does not read stops who sends to him, and nobody else on the same relays; when he reads on, he gets all."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    stuck, behind = apps.established(server, pair.cons)
    all_of_it = Payload(chance.randrange(1, 1 << 30), 60_000_000)
    sending = apps.task(lambda: send_and_end(behind, all_of_it))
    seen: list[int] = []

    def stands_still() -> bool:
        seen.append(pair.cons.status()["bytes"]["to_consumer"])
        return len(seen) > 2 and seen[-1] == seen[-3] > 0

    eventually(stands_still, every_s=0.2)
    record.struck()
    for number in range(3):
        ends = apps.established(server, pair.cons)
        apps.exchange(*ends, Payload(number, 2_000_000), Payload(number + 9, 2_000_000))
    with record.recovering():
        assert receive(stuck) == all_of_it.digest()
    sending.result()


@pytest.mark.chaos
def test_a_slow_consumer_gets_everything(
    gateway: Gateway, apps: Applications, chance: random.Random, mode: str
) -> None:
    """A reader slower than the sender costs nothing but time."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    payload = Payload(chance.randrange(1, 1 << 30), 30_000_000)
    sending = apps.task(lambda: send_and_end(producer, payload))
    received = bytearray()
    while len(received) < 10_000_000:
        received += receive_exactly(consumer, chance.randrange(1, 700_000))
        time.sleep(chance.uniform(0, 0.05))
    received_bytes = len(received)
    while piece := consumer.recv(1 << 20):
        received += piece
    assert received_bytes < payload.size
    assert bytes(received) == payload.bytes()
    sending.result()


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 2 MB below which a facility keeps its state."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=2m,nr_inodes=100,mode=0700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    monkeypatch.setenv("SCISTREAM_STATE_DIR", str(folder))
    monkeypatch.setenv("SCISTREAM_CONFIG_DIR", str(tmp_path / "none"))
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all room that is left on a disk."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return ballast


@pytest.mark.chaos
def test_a_full_disk_stops_new_streams_and_no_running_one(
    small_disk: Path, relays_below: Callable[..., list[int]], apps: Applications, record: Record
) -> None:
    """What cannot be written down is refused and leaves nothing; what runs, runs; a release ends the relay anyway."""
    server = apps.listen()
    service = S2CS(load_facility("aps"))
    request = {**PROD, "targets": [join(server.getsockname())], "until": "released"}
    offer = service.request(request)
    cons = {**request, "role": "CONS", "offer": offer.model_dump(mode="json")}
    del cons["targets"]
    other = service.request(cons)
    peers = [{"public_key": other.relays[0].public_key, "source_addresses": ["127.0.0.1"]}]
    service.update({**SIDE, "peers": peers})
    eventually(lambda: service.status(SIDE).ready)
    host, _, port = other.addresses[0].rpartition(":")
    consumer = apps.dial((host, int(port)))
    producer = apps.accept(server)
    ballast = fill(small_disk)
    record.struck()
    with pytest.raises((RegistryError, RelayError)) as wrong:
        service.request({**PROD, "uid": "other"})
    assert "disk" in str(wrong.value) or "space" in str(wrong.value)
    record.detected()
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
    ends: list[Any] = []
    for role in ("PROD", "CONS"):
        with contextlib.suppress(RegistryError):
            ends.append(service.release({**SIDE, "role": role}))
    eventually(lambda: not relays_below(small_disk))
    ballast.unlink()
    with record.recovering():
        for role in ("PROD", "CONS"):
            end = service.release({**SIDE, "role": role}).end
            assert end is not None
            assert end.ended
            assert end.reason in ("released", "relay_lost"), end
        assert service.list({"protocol": 1}).streams == []
        service.request({**PROD, "uid": "other"})
    service.release({**SIDE, "uid": "other"})
    assert list((service.config.state_dir / "relays").iterdir()) == []
    service.close()


@pytest.mark.chaos
def test_a_relay_without_descriptors_turns_away_and_carries_on(
    gateway: Gateway, apps: Applications, record: Record, mode: str
) -> None:
    """Connections that it cannot take wait or are reset; the running one is not touched; it costs no processor time."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    running = apps.established(server, pair.cons)
    used = int(pair.cons.status()["resources"]["descriptors"])
    _, hard = resource.prlimit(pair.cons.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pair.cons.pid, resource.RLIMIT_NOFILE, (used + 2, hard))
    record.struck()
    late = []
    for _ in range(10):
        with contextlib.suppress(ConnectionResetError):  # it may be reset before connect returns
            late.append(apps.connect(pair.cons))
    before = cpu_s(pair.cons.pid)
    time.sleep(1)
    assert cpu_s(pair.cons.pid) - before < 0.3
    apps.exchange(*running, Payload(1, 5_000_000), Payload(2, 5_000_000))
    assert is_running(pair.cons.pid)
    resource.prlimit(pair.cons.pid, resource.RLIMIT_NOFILE, (hard, hard))
    for one in late:
        one.close()
    with record.recovering():
        ends = eventually(lambda: attempt(gateway, pair.cons.id))
        assert ends
    fresh = apps.connect(pair.cons)
    fresh.sendall(b"?")
    producers = []

    def reached() -> bool:
        producers.append(apps.accept(server))
        return producers[-1].recv(1) == b"?"

    eventually(reached)
    apps.exchange(fresh, producers[-1], Payload(3, 1000), Payload(4, 1000))


# Takes what pipes its user may have, down to the last that a relay could use, and holds them until it is told.
HOG: Final = """
import fcntl, os, sys
if sys.argv[1:]:
    user = int(sys.argv[1])
    os.setgroups([]), os.setgid(user), os.setuid(user)
F_SETPIPE_SZ, held = 1031, []

def grows(end):
    for size in (1 << 20, 1 << 16):
        try:
            return fcntl.fcntl(end, F_SETPIPE_SZ, size)
        except PermissionError:
            pass
    return 0

while not held or grows(held[-1][1]):
    held.append(os.pipe())
print(len(held), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def without_pipes(user: int | None) -> Iterator[None]:
    """As long as the block runs, another program of this user has all his pipe pages."""
    command = [sys.executable, "-c", HOG, *([] if user is None else [str(user)])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        assert hog.stdin
        assert hog.stdout
        assert int(hog.stdout.readline()) > 1
        yield
        hog.stdin.close()
        assert hog.wait(20) == 0


@pytest.mark.parametrize("mode", ["none", "auth"])
def test_a_user_without_pipes_left_loses_no_byte_and_is_told(
    nobodys_gateway: Gateway, apps: Applications, record: Record, chance: random.Random, mode: str
) -> None:
    """What gets no pipe is copied and says so; who has pipes keeps them; the next bytes take those that become free."""
    server = apps.listen()
    spliced = nobodys_gateway.pair(mode, [server.getsockname()])
    running = apps.established(server, spliced.cons)
    sizes = [chance.randrange(2_000_000, 6_000_000) for _ in range(4)]
    with without_pipes(nobodys_gateway.user):
        record.struck()
        late = nobodys_gateway.pair(mode, [server.getsockname()])
        short, whole = apps.established(server, late.cons), apps.established(server, late.cons)
        assert paths(late) == {"copy"}
        record.detected()
        apps.exchange(*whole, Payload(1, sizes[0]), Payload(2, sizes[1]))
        assert paths(late) == {"copy"}
        eventually(lambda: speak(*running) and paths(spliced) == {"splice"})
    with record.recovering():
        eventually(lambda: speak(*short) and paths(late) == {"splice"})
    apps.exchange(*short, Payload(3, sizes[2]), Payload(4, sizes[3]))
    apps.exchange(*running, Payload(5, sizes[2]), Payload(6, sizes[3]))
    for pair, count in ((late, 2), (spliced, 1)):
        pair.wait_closed(count)
        for relay in pair:
            assert {one["reason"] for one in relay.events("close")} == {"closed"}


def speak(one: socket.socket, other: socket.socket) -> bool:
    """A byte each way."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"?")
        assert receive_exactly(receiver, 1) == b"?"
    return True


def paths(pair: Pair) -> set[str]:
    """Which ways the last bytes have taken in both relays of a pair."""
    return {
        path for relay in pair for stream in relay.status()["streams"] for path in stream["path"].values()
    }


def attempt(gateway: Gateway, relay_id: str) -> bool:
    """Whether a relay answers."""
    try:
        return bool(gateway.verb("status", relay_id))
    except RefusedError:
        return False


def cpu_s(pid: int) -> float:
    """The processor time of a process."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / 100


@pytest.mark.chaos
def test_a_service_without_descriptors_says_so_and_recovers(
    facility: Callable[..., S2CS],
    state_base: Path,
    relays_below: Callable[..., list[int]],
    record: Record,
) -> None:
    """A verb that cannot be done is a typed error and leaves nothing; with descriptors again, all works."""
    service = facility()
    service.request(PROD)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [int(one.name) for one in Path("/proc/self/fd").iterdir()]
    record.struck()
    try:
        for room in range(1, 12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + room, hard))
            with contextlib.suppress(ScistreamError):
                service.request({**PROD, "uid": f"s{room}"})
            with contextlib.suppress(ScistreamError):
                service.status(SIDE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with record.recovering():
        assert service.status(SIDE).state == "LISTENING"
    for stream in service.list({"protocol": 1}).streams:
        service.release({**SIDE, "uid": stream.uid})
    assert relays_below(state_base, patience_s=5) == []
    assert list((service.config.state_dir / "relays").iterdir()) == []


@pytest.mark.chaos
def test_a_port_range_that_is_used_up_is_said_and_every_port_comes_back(
    site: Callable[..., None], facility: Callable[..., S2CS], apps: Applications, record: Record
) -> None:
    """The stream that finds no port is refused by name; those that run go on; a released port is taken at once."""
    first = eventually(lambda: free_ports(apps, 4))
    site("aps", {"port_range": f"{first}-{first + 3}"})
    service = facility()
    for number in range(4):
        service.request({**PROD, "uid": f"s{number}"})
    record.struck()
    with pytest.raises(PortsExhausted, match="1 ports free"):
        service.request({**PROD, "uid": "s4"})
    record.detected()
    with record.recovering():
        for number in range(8):
            service.release({**SIDE, "uid": f"s{number}"})
            service.request({**PROD, "uid": f"s{number + 4}"})
    assert [one.state for one in service.list({"protocol": 1}).streams] == ["LISTENING"] * 4
    for stream in service.list({"protocol": 1}).streams:
        service.release({**SIDE, "uid": stream.uid})


def free_ports(apps: Applications, count: int) -> int:
    """The first of so many ports of loopback in a row that are free now; below those that the kernel gives away."""
    first = random.SystemRandom().randrange(10_000, 32_000)
    held = []
    try:
        held = [apps.listen(port=first + number) for number in range(count)]
    except OSError:
        return 0
    finally:
        for one in held:
            one.close()
    return first
