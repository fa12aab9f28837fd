"""`s2cs --type Haproxy`: real HAProxies in the place of our relay, under the same control plane."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import pytest
from test_s2cs_serving import COMMAND, s2cs
from users import Site, released, sha

from scistream_flows import open_stream
from scistream_flows.config import load_facility
from scistream_flows.doctor import examine
from scistream_flows.errors import (
    ConfigError,
    NotSupported,
    PolicyDenied,
    PortsExhausted,
    RelayError,
)
from scistream_flows.facility import LocalFacility
from scistream_flows.haproxy import find_haproxy, starter
from scistream_flows.models import Peer, split_address
from scistream_flows.s2cs import S2CS

Facilities = Callable[..., S2CS]
Relays = Callable[..., list[int]]
Talk = Callable[[str, bytes], str]
Within = Callable[..., None]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(
        not shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin"), reason="haproxy is not installed"
    ),
]

PAYLOAD = random.Random(2).randbytes(2_000_003)  # noqa: S311 - no secret


@pytest.fixture
def haproxy(state_base: Path) -> Iterator[Facilities]:  # noqa: ARG001 - where the state goes
    """A function that makes the service of a development facility whose data HAProxy carries."""
    with contextlib.ExitStack() as closing:

        def make(name: str = "aps", **options: Any) -> S2CS:
            config = load_facility(name, **options).carried_by("haproxy")
            service = closing.enter_context(S2CS(config))
            closing.callback(service.evict)
            return service

        yield make


class Sides(NamedTuple):
    prod: list[str]
    cons: list[str]


def of(uid: str = "s", role: str = "PROD", **more: Any) -> dict[str, Any]:
    return {"protocol": 1, "uid": uid, "role": role} | more


def prod(target: str, **more: Any) -> dict[str, Any]:
    return of(targets=[target], mode="none", until="released") | more


def both(producer: S2CS, consumer: S2CS, target: str, *, consumers: Sequence[str] = (), **more: Any) -> Sides:
    """The listeners of both sides of a stream, and PROD told of CONS."""
    one = producer.request(prod(target, **more))
    asked = prod(target, role="CONS", offer=one.model_dump(mode="json"), consumers=list(consumers), **more)
    del asked["targets"]
    other = consumer.request(asked)
    peers = [Peer(public_key=it.public_key, source_addresses=it.dial_addresses) for it in other.relays]
    producer.update(of(peers=[it.model_dump() for it in peers]))
    return Sides(one.addresses, other.addresses)


def received(listener: str, source: str) -> bytes:
    """All that comes to one who connects from `source` and sends nothing; a reset is nothing.

    It half-closes once something came: HAProxy closes, in order and with nothing, to a client that ends before HAProxy
    is connected to the server (docs/administration.md).
    """
    said = b""
    with (
        contextlib.suppress(ConnectionResetError),
        socket.create_connection(split_address(listener), 5, source_address=(source, 0)) as connection,
    ):
        while some := connection.recv(1 << 16):
            if not said:
                connection.shutdown(socket.SHUT_WR)
            said += some
    return said


def is_served(address: str) -> bool:
    try:
        socket.create_connection(split_address(address), 5).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # who may not connect is turned away at once
        return True
    return True


def files_below(state: Path) -> list[str]:
    return [one.name for one in state.glob("*/relays/*")]


def start(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the program answers to a configuration, in which all but `changes` is right."""
    configuration = {
        "protocol": 1,
        "relay_id": "0" * 32,
        "role": "PROD",
        "mode": "none",
        "listen": {"address": "127.0.0.1", "first_port": 0, "last_port": 0, "indices": [0]},
        "targets": ["127.0.0.1:9"],
        "max_connections": 4,
        "lease_s": 20,
        "lifetime_s": 20,
        "hello_timeout_s": 20,
    } | changes
    done = subprocess.run(
        [*starter(), "start", "--runtime-dir", str(folder)],
        input=json.dumps(configuration),
        capture_output=True,
        text=True,
        timeout=30,
    )
    said: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) == (said["event"] == "ready"), done.stderr
    return said


# --- as its users meet it


@pytest.fixture
def user(state_base: Path, tmp_path: Path) -> Iterator[Site]:  # noqa: ARG001 - where the state goes
    """The commands of 1.x at two facilities, each served by `s2cs --type Haproxy`."""
    words = ("--port", 0, "--listener_ip", "127.0.0.1", "--type", "Haproxy", "--facility")
    with s2cs(*words, "aps") as (aps, _), s2cs(*words, "alcf") as (alcf, _):
        environment = {**os.environ, "SCISTREAM_CONFIG_DIR": str(tmp_path / "user")}
        yield Site(aps, alcf, cast("Any", ()), environment)


def test_the_commands_of_1_x_carry_bytes_both_ways_and_leave_nothing(
    user: Site, state_base: Path, application: Any, talk: Talk, relays_below: Relays
) -> None:
    refused = user.s2uc("inbound-request", "--s2cs", user.prod, "--num-conn", 1)
    assert refused.returncode != 0
    assert "protects nothing" in refused.stderr
    opened = user.inbound(application.address, "--mode", "none")
    with released(user, opened["uid"]):
        listeners = ",".join(opened["listeners"])
        done = user.outbound(opened["uid"], listeners, "--wait-s", "20")
        assert done.returncode == 0, done.stderr
        assert "nothing has proven it" in done.stderr
        entry = user.document("status", opened["uid"], "--role", "CONS")["streams"][0]["listeners"][0]
        assert talk(entry, PAYLOAD) == sha(application.payload)
        seen = user.document("status", opened["uid"])["streams"]
        assert [one["mode"] for one in seen] == ["none", "none"]
        assert [one["proof"] for one in seen] == [None, None]
        assert {one["state"] for one in seen} == {"STREAMING"}
        for one in seen:
            assert one["bytes"] == {"to_consumer": len(application.payload), "to_producer": len(PAYLOAD)}
            assert "unproven" in one["message"]
    assert application.received == [sha(PAYLOAD)]
    assert not any(map(is_served, [entry, *opened["listeners"]]))
    assert relays_below(state_base, patience_s=5) == []
    assert files_below(state_base) == []


def test_open_stream_waits_for_it_and_sees_its_end(haproxy: Facilities, application: Any, talk: Talk) -> None:
    sides = LocalFacility(haproxy("aps")), LocalFacility(haproxy("alcf"))
    with open_stream(*sides, targets=[application.address], mode="none", num_conn=2, linger_s=0) as stream:
        for listener in stream.listeners:
            assert talk(listener, PAYLOAD) == sha(application.payload)
        end = stream.wait(timeout_s=20)
    assert end.reasons == {"PROD": "finished", "CONS": "finished"}
    for side in (end.prod, end.cons):
        assert side.bytes.to_consumer == 2 * len(application.payload)


# --- who and what is let through


def test_only_the_networks_that_are_named_may_connect(haproxy: Facilities, application: Any) -> None:
    aps, alcf = haproxy("aps"), haproxy("alcf")
    sides = both(aps, alcf, application.address, consumers=["127.0.0.3"])
    for listener, source in ((sides.cons[0], "127.0.0.1"), (sides.prod[0], "127.0.0.2")):
        assert received(listener, source) == b""
    assert application.accepted == 0
    assert sha(received(sides.cons[0], "127.0.0.3")) == sha(application.payload)
    assert alcf.status(of(role="CONS")).connections.refused == 1
    assert aps.status(of()).connections.refused == 1
    aps.update(of(peers=[]))
    assert received(sides.cons[0], "127.0.0.3") == b""
    assert application.accepted == 1


def test_one_connection_more_than_allowed_is_turned_away(haproxy: Facilities, application: Any) -> None:
    sides = both(haproxy("aps"), haproxy("alcf"), application.address, max_connections=2)
    address = split_address(sides.cons[0])
    with socket.create_connection(address, 5) as first, socket.create_connection(address, 5) as second:
        for one in (first, second):
            one.settimeout(5)
            assert one.recv(1) == application.payload[:1]
        assert received(sides.cons[0], "127.0.0.1") == b""
    assert application.accepted == 2


def test_the_target_can_be_said_later_and_changed(haproxy: Facilities, application: Any) -> None:
    aps, alcf = haproxy("aps"), haproxy("alcf")
    sides = both(aps, alcf, "127.0.0.1:9")
    assert received(sides.cons[0], "127.0.0.1") == b""
    aps.hello(of(targets=[application.address]))
    assert sha(received(sides.cons[0], "127.0.0.1")) == sha(application.payload)
    with pytest.raises(RelayError, match="cannot change"):
        aps.update(of(rate_mbits_per_s=100))


def test_it_listens_at_its_address_only_and_takes_no_port_from_others(haproxy: Facilities) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = haproxy(port_range=f"{port}-{port}")
        with pytest.raises(PortsExhausted, match="Address already in use"):
            service.request(prod("127.0.0.1:9"))
    (listener,) = service.request(prod("127.0.0.1:9")).addresses
    assert listener == f"127.0.0.1:{port}"
    assert is_served(listener)
    assert not is_served(f"127.0.0.9:{port}")


def test_a_gateway_of_both_ip_versions_listens_in_both_at_one_port(
    site: Callable[..., None], application: Any
) -> None:
    addresses = ["127.0.0.1", "::1"]
    site("aps", {"wan_bind": addresses, "lan_bind": addresses})
    with S2CS(load_facility("aps").carried_by("haproxy")) as service:
        (relay,) = service.request(prod(application.address)).relays
        (listener,) = relay.listeners
        assert listener.also == [f"[::1]:{split_address(listener.address)[1]}"]
        peer = Peer(public_key=relay.public_key, source_addresses=["::1/128"])
        service.update(of(peers=[peer.model_dump()]))
        assert received(listener.address, "127.0.0.1") == b""
        assert sha(received(listener.also[0], "::1")) == sha(application.payload)
        service.release(of())


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "tls"},
        {"targets": ["127.0.0.1:9\n  server x 127.0.0.1:1"]},
        {"targets": ["fe80::1%x disabled\n:9"]},
        {"onward_source": "fe80::1%x\nglobal"},
        {"sources": ["127.0.0.0/8; shutdown frontend f0"]},
        {"sources": ["::1%a;b/128"]},
        {"peers": [{"public_key": "x", "source_addresses": []}]},
        {"listen": {"address": "localhost", "first_port": 0, "last_port": 0, "indices": [0]}},
        {"relay_id": "../../x"},
        {"max_connections": "1\n  user root"},
        {"lease_s": float("nan")},
        {"daemon": True},
    ],
    ids=str,
)
def test_no_text_gets_into_its_configuration(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    said = start(tmp_path / "relays", **changes)
    assert (said["event"], said["code"]) == ("failed", "bad-config")
    assert list((tmp_path / "relays").iterdir()) == []


# --- its end


def test_the_lease_ends_it(
    haproxy: Facilities, state_base: Path, relays_below: Relays, within: Within
) -> None:
    service = haproxy()
    (listener,) = service.request(prod("127.0.0.1:9", lease_s=1)).addresses
    assert is_served(listener)
    assert {one.stat().st_mode & 0o777 for one in state_base.glob("*/relays/*")} == {0o600}
    within(lambda: service.status(of()).ended)
    assert service.status(of()).reason == "lease_expired"
    assert not is_served(listener)
    assert relays_below(state_base, patience_s=5) == []
    assert files_below(state_base) == []


def test_one_that_nobody_needed_ends_by_its_hello_timeout(haproxy: Facilities, within: Within) -> None:
    service = haproxy()
    service.request(prod("127.0.0.1:9", hello_timeout_s=1))
    within(lambda: service.status(of()).reason == "hello_timeout")


@pytest.mark.parametrize("killed", ["haproxy", "keeper"])
def test_one_that_is_killed_is_lost_and_nothing_serves_on(
    haproxy: Facilities, state_base: Path, relays_below: Relays, within: Within, killed: str
) -> None:
    service = haproxy()
    (listener,) = service.request(prod("127.0.0.1:9")).addresses
    names = {psutil.Process(pid).name() == "haproxy": pid for pid in relays_below(state_base)}
    assert names.keys() == {True, False}
    os.kill(names[killed == "haproxy"], signal.SIGKILL)
    within(lambda: service.status(of()).ended)
    status = service.status(of())
    assert (status.state, status.reason) == ("FAILED", "relay_lost")
    assert relays_below(state_base, patience_s=5) == []
    assert not is_served(listener)
    assert files_below(state_base) == []


def test_a_frozen_one_is_released_all_the_same(
    haproxy: Facilities, state_base: Path, relays_below: Relays
) -> None:
    service = haproxy()
    (listener,) = service.request(prod("127.0.0.1:9")).addresses
    for pid in relays_below(state_base):
        if psutil.Process(pid).name() == "haproxy":
            os.kill(pid, signal.SIGSTOP)
    assert service.release(of()).end is not None
    assert relays_below(state_base) == []
    assert not is_served(listener)


# --- what is refused


def test_what_it_cannot_keep_is_refused_in_words(haproxy: Facilities, facility: Facilities) -> None:
    service, ours = haproxy("aps"), facility("alcf")
    with pytest.raises(PolicyDenied, match="protects nothing"):
        service.request(prod("127.0.0.1:9", mode="tls"))
    with pytest.raises(NotSupported, match="keeps to no rate"):
        service.request(prod("127.0.0.1:9", rate_mbits_per_s=100))
    offer = service.request(prod("127.0.0.1:9")).model_dump(mode="json")
    with pytest.raises(NotSupported, match="runs s2ds, PROD's runs haproxy"):
        ours.request(of(role="CONS", mode="none", offer=offer))
    offer = ours.request(prod("127.0.0.1:9", uid="other")).model_dump(mode="json")
    ours.release(of("other"))
    with pytest.raises(NotSupported, match="runs haproxy, PROD's runs s2ds"):
        service.request(of("other", role="CONS", mode="none", offer=offer))


@pytest.mark.parametrize(
    ("gateway", "policy", "said"),
    [
        ({}, {"modes": ["tls", "auth"]}, "policy.modes"),
        ({"kind": "ssh", "host": "gw"}, {}, "on this machine only"),
    ],
    ids=["policy", "ssh"],
)
def test_a_facility_that_may_not_run_it_does_not_start(
    site: Callable[..., None], gateway: dict[str, Any], policy: dict[str, Any], said: str
) -> None:
    site("aps", gateway, **policy)
    done = subprocess.run(
        [*COMMAND, "--facility", "aps", "--port", "0", "--type", "haproxy"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    file = Path(os.environ["SCISTREAM_CONFIG_DIR"]) / "aps.toml"
    file.write_text(file.read_text().replace("[facility]", '[facility]\ndata_server = "haproxy"'))
    with pytest.raises(ConfigError, match=said) as caught:
        load_facility("aps")
    assert caught.value.details["key"] == "facility.data_server"


def test_the_configuration_can_name_it(site: Callable[..., None]) -> None:
    site("aps", {})
    file = Path(os.environ["SCISTREAM_CONFIG_DIR"]) / "aps.toml"
    file.write_text(file.read_text().replace("[facility]", '[facility]\ndata_server = "haproxy"'))
    with S2CS(load_facility("aps")) as service:
        (relay,) = service.request(prod("127.0.0.1:9")).relays
        assert relay.data_server == "haproxy"
        service.release(of())


def test_the_doctor_looks_for_it(state_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    config = load_facility("aps").carried_by("haproxy")
    found = {one.check: one for one in examine(config, peer="local:alcf")}
    assert found["data-server"].message == f"{find_haproxy()} carries the data"
    assert "no probe" in found["reach"].message
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    missing = next(one for one in examine(config) if one.check == "data-server")
    assert missing.level == "problem"


def test_a_machine_without_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(RelayError) as caught:
        find_haproxy()
    assert "apt-get install haproxy" in caught.value.hint
