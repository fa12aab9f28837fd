"""Listeners, targets and relays in any number, and both versions of IP."""

import socket
from contextlib import suppress

import pytest

from .apps import Applications, Payload, nobody_waits, receive_exactly
from .gateway import Gateway, RefusedError, Relay, eventually, join, split

RESET = (b"", "ConnectionResetError")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_stream_over_ipv6_lives_its_whole_life(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen("::1")
    six = {"listen": {"address": "::1"}, "sources": ["::1"]}
    pair = gateway.pair(mode, [server.getsockname()], prod=six, cons=six)
    consumer, producer = apps.established(server, pair.cons)
    for relay in pair:
        (stream,) = relay.status()["streams"]
        assert stream["source"].startswith("[::1]:")
        assert stream["onward"].startswith("[::1]:")
        assert relay.ready["listeners"][0]["address"].startswith("[::1]:")
    apps.exchange(consumer, producer, Payload(1, 1_000_000), Payload(2, 2_000_000))
    pair.wait_closed(1)
    # Exactly the address that was asked for.
    with pytest.raises(ConnectionRefusedError):
        apps.dial(("127.0.0.1", pair.cons.address()[1]))
    for relay in pair:
        assert relay.stop()["bytes"] == {"to_producer": 1_000_001, "to_consumer": 2_000_001}


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_the_two_versions_of_ip_meet_in_one_stream(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    six = {"listen": {"address": "::1"}}
    pair = gateway.pair("tls", [server.getsockname()], prod=six)
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_each_listener_has_one_port_on_both_versions_of_ip(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    both = {"listen": {"addresses": ["127.0.0.1", "::1"], "indices": [0, 3]}, "sources": ["127.0.0.1", "::1"]}
    pair = gateway.pair(mode, [server.getsockname()], prod=both, cons={**both, "probe": "path"})
    for relay in pair:
        for rows in (relay.ready["listeners"], relay.status()["listeners"]):
            assert [row["index"] for row in rows] == [0, 0, 3, 3]
            assert len({split(row["address"])[1] for row in rows}) == 2
            hosts = [split(row["address"])[0] for row in rows]
            assert hosts == ["127.0.0.1", "::1"] * 2
            assert split(rows[0]["address"])[1] == split(rows[1]["address"])[1]
    for number, row in enumerate(pair.cons.ready["listeners"], 1):
        consumer = apps.dial(split(row["address"]))
        apps.exchange(consumer, apps.accept(server), Payload(number, 50_000), Payload(number + 9, 70_000))
    pair.wait_closed(4)
    assert [row["accepted"] for row in pair.cons.status()["listeners"]] == [1, 1, 1, 1]


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_cons_relay_reaches_a_listener_at_either_of_its_addresses(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    prod = gateway.start(
        gateway.config(
            "PROD",
            mode,
            targets=[join(server.getsockname())],
            listen={"addresses": ["::1", "127.0.0.1"]},
            max_connections=1,
        )
    )
    consumers = []
    for row in prod.ready["listeners"]:
        peers = [gateway.peer_of(prod, [row])]
        consumers.append(gateway.start(gateway.config("CONS", mode, peers=peers, probe="path")))
    keys = [{"public_key": relay.public_key, "source_addresses": ["127.0.0.1", "::1"]} for relay in consumers]
    prod.update(peers=keys)
    eventually(lambda: all(relay.status()["state"] == "READY" for relay in consumers))
    apps.established(server, consumers[0])
    # One listener: what one address carries, the other cannot.
    assert apps.knock(consumers[1].address()) == RESET
    six, four = prod.status()["listeners"]
    assert (six["active"], six["refused"], four["active"], four["refused"]) == (1, 0, 0, 1)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_consumer_counts_at_both_addresses_of_a_listener(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    both = {"addresses": ["127.0.0.1", "::1"]}
    few = {"max_connections": 1, "listen": both, "sources": ["127.0.0.1", "::1"]}
    pair = gateway.pair("tls", [server.getsockname()], cons=few)
    four, six = (split(row["address"]) for row in pair.cons.ready["listeners"])
    consumer, producer = apps.established(server, pair.cons)
    assert apps.knock(six) == RESET
    apps.exchange(consumer, producer, Payload(1, 1000), Payload(2, 1000))
    eventually(lambda: pair.cons.status()["listeners"][0]["active"] == 0)
    apps.dial(six).sendall(b"?")
    assert receive_exactly(apps.accept(server), 1) == b"?"
    assert apps.knock(four) == RESET


def port_of_both(apps: Applications) -> int:
    """A port on which we listen at ::1, and that is free at 127.0.0.1."""
    for _ in range(20):
        port = int(apps.listen("::1").getsockname()[1])
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free at both addresses")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_port_that_is_taken_at_one_of_the_addresses_is_not_used(
    gateway: Gateway, apps: Applications
) -> None:
    taken = port_of_both(apps)
    first = min(taken, 65000)
    listen = {"addresses": ["127.0.0.1", "::1"], "first_port": taken, "last_port": taken}
    with pytest.raises(RefusedError) as refusal:
        gateway.start(gateway.config("PROD", "tls", listen=listen))
    assert refusal.value.code == "ports-exhausted"
    assert f"127.0.0.1 and ::1:{taken}-{taken}" in refusal.value.message
    apps.listen("127.0.0.1", taken)  # all or nothing: it was closed again
    listen |= {"first_port": first, "last_port": first + 400, "indices": list(range(20))}
    relay = gateway.start(gateway.config("PROD", "tls", listen=listen))
    ports = [split(row["address"])[1] for row in relay.ready["listeners"]]
    assert ports[::2] == ports[1::2]
    assert len(set(ports)) == 20
    assert taken not in ports


def who_answers(apps: Applications, servers: list[socket.socket], relay: Relay, index: int) -> int:
    """The number of the server behind listener `index`; asserts that the connection is good."""
    consumer = apps.connect(relay, index)
    consumer.sendall(b"?")

    def found() -> list[tuple[int, socket.socket]]:
        """Whoever has got the question; the connections that probes have left are empty."""
        for number, server in enumerate(servers):
            server.settimeout(0)
            try:
                waiting.append((number, apps.keep(server.accept()[0])))
            except BlockingIOError:
                continue
        return [(number, one) for number, one in waiting if asked(one)]

    waiting: list[tuple[int, socket.socket]] = []
    ((number, producer),) = eventually(found)
    apps.exchange(consumer, producer, Payload(1, 20_000), Payload(2, 30_000))
    return number


def asked(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) == b"?"
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(20)


@pytest.mark.parametrize(
    ("listeners", "doors", "targets"), [(5, 2, 3), (2, 5, 3), (4, 4, 2), (1, 3, 1), (3, 1, 1)]
)
def test_listener_i_leads_to_door_i_mod_n_and_that_to_target_i_mod_m(
    gateway: Gateway, apps: Applications, listeners: int, doors: int, targets: int
) -> None:
    servers = [apps.listen() for _ in range(targets)]
    pair = gateway.pair(
        "tls",
        [server.getsockname() for server in servers],
        prod={"listen": {"indices": list(range(doors))}, "probe": "path"},
        cons={"listen": {"indices": list(range(listeners))}, "probe": "path"},
    )
    found = [who_answers(apps, servers, pair.cons, index) for index in range(listeners)]
    assert found == [index % doors % targets for index in range(listeners)]
    assert [row["accepted"] for row in pair.cons.status()["listeners"]] == [1] * listeners


def test_one_consumer_gateway_reaches_two_producer_gateways(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """A stream over two gateways: each relay has its own key, and serves its own of the stream's listeners."""
    servers = [apps.listen() for _ in range(4)]
    targets = [join(server.getsockname()) for server in servers]
    prods = [
        gateway.start(gateway.config("PROD", mode, targets=targets, listen={"indices": indices}))
        for indices in ([2, 0], [3, 1])
    ]
    assert prods[0].public_key != prods[1].public_key
    cons = gateway.start(
        gateway.config(
            "CONS",
            mode,
            peers=[gateway.peer_of(prod) for prod in prods],
            listen={"indices": [0, 1, 2, 3, 5]},
            probe="path",
        )
    )
    gateway.introduce(prods[0], cons)
    eventually(lambda: prods[0].status()["proof"])
    assert cons.status()["state"] == "LISTENING"  # one of two is not enough
    gateway.introduce(prods[1], cons)
    eventually(lambda: cons.status()["state"] == "READY")
    assert [who_answers(apps, servers, cons, index) for index in (0, 1, 2, 3, 5)] == [0, 1, 2, 3, 1]
    eventually(lambda: cons.status()["connections"]["active"] == 0)
    total = [prod.status()["connections"]["total"] for prod in prods]
    assert total == [2, 3]
    assert cons.status()["bytes"]["to_producer"] == 5 * 20_001


def test_one_connection_too_many_is_reset_at_the_consumers_listener(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    few = {"max_connections": 2, "listen": {"indices": [0, 1]}}
    pair = gateway.pair(mode, [server.getsockname()], cons=few)
    held = [apps.established(server, pair.cons) for _ in range(2)]
    assert apps.knock(pair.cons.address()) == RESET
    (first, second) = pair.cons.status()["listeners"]
    assert (first["active"], first["accepted"], first["refused"]) == (2, 2, 1)
    assert pair.cons.status()["connections"]["refused"] == 1
    apps.established(server, pair.cons, 1)  # each listener counts for itself
    assert second["refused"] == 0
    apps.exchange(*held[0], Payload(1, 1000), Payload(2, 1000))
    eventually(lambda: pair.cons.status()["listeners"][0]["active"] == 1)
    apps.established(server, pair.cons)
    assert pair.cons.stop()["connections"]["refused"] == 1
    assert [event["cause"] for event in pair.cons.events("refused")] == ["busy"]


def test_one_connection_too_many_at_the_producers_side_is_busy(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod={"max_connections": 2})
    for _ in range(2):
        apps.established(server, pair.cons)
    assert apps.knock(pair.cons.address()) == RESET
    assert pair.cons.status()["last_probe"]["result"] == "busy"
    assert pair.cons.wait_close()["reason"] == "busy"
    (listener,) = pair.prod.status()["listeners"]
    assert (listener["active"], listener["refused"]) == (2, 1)
    assert nobody_waits(server)


def test_as_many_at_once_as_are_allowed(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    room = {"max_connections": 50}
    pair = gateway.pair("tls", [server.getsockname()], prod=room, cons=room)
    ends = [apps.established(server, pair.cons) for _ in range(50)]
    assert apps.knock(pair.cons.address()) == RESET
    for consumer, producer in ends:
        producer.sendall(b"still here")
        assert receive_exactly(consumer, 10) == b"still here"
