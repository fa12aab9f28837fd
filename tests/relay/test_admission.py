"""Who may come in: keys at the WAN, addresses everywhere, and nobody before the peers are known."""

import socket
import ssl

import pytest

from .apps import Applications, Payload, nobody_waits
from .gateway import Gateway, Relay, eventually, join

RESET = (b"", "ConnectionResetError")
MANY = 60


def strangers_key(gateway: Gateway) -> str:
    """The key of a relay that has nothing to do with the stream."""
    return gateway.start(gateway.config("PROD", "tls")).public_key


def probed(relay: Relay, result: str) -> None:
    """Returns when the last probe of this relay had this result."""
    eventually(lambda: last_result(relay) == result)


def last_result(relay: Relay) -> object:
    probe = relay.status()["last_probe"]
    assert probe
    return probe["result"]


def test_cons_rejects_a_prod_with_another_key_than_the_pinned_one(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    prod = gateway.start(gateway.config("PROD", proven_mode, targets=[join(server.getsockname())]))
    peer = gateway.peer_of(prod) | {"public_key": strangers_key(gateway)}
    cons = gateway.start(gateway.config("CONS", proven_mode, peers=[peer], hello_timeout_s=2))
    gateway.introduce(prod, cons)
    probed(cons, "peer-rejected")
    assert apps.knock(cons.address()) == RESET
    assert cons.wait_close()["reason"] == "peer-rejected"
    assert prod.status()["proof"] is None
    end = cons.wait_end()
    assert (end["state"], end["reason"]) == ("FAILED", "peer_rejected")
    assert "peer-rejected" in end["message"]
    assert nobody_waits(server)


def test_prod_rejects_a_cons_with_another_key_than_the_pinned_one(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], cons={"hello_timeout_s": 2}, ready=False)
    pair.wait_ready()
    impostor = gateway.start(
        gateway.config("CONS", proven_mode, peers=[gateway.peer_of(pair.prod)], hello_timeout_s=0.5)
    )
    probed(impostor, "peer-rejected")
    end = impostor.wait_end()
    assert (end["state"], end["reason"]) == ("FAILED", "peer_rejected")
    assert pair.prod.status()["connections"]["refused"] > 0
    (refused, *_) = eventually(lambda: pair.prod.events("refused"))
    assert (refused["cause"], refused["last_source"]) == ("handshake-rejected", "127.0.0.1")
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 10_000), Payload(2, 10_000))


def test_the_right_key_from_an_address_that_is_another_peers_is_denied(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    prod = gateway.start(
        gateway.config("PROD", proven_mode, targets=[join(server.getsockname())], sources=[])
    )
    cons = gateway.start(gateway.config("CONS", proven_mode, peers=[gateway.peer_of(prod)]))
    other = {"public_key": strangers_key(gateway), "source_addresses": ["127.0.0.1"]}
    prod.update(peers=[{"public_key": cons.public_key, "source_addresses": ["127.0.0.9"]}, other])
    probed(cons, "denied")
    assert apps.knock(cons.address()) == RESET
    prod.update(peers=[{"public_key": cons.public_key, "source_addresses": ["127.0.0.0/29"]}, other])
    eventually(lambda: cons.status()["state"] == "READY")


@pytest.mark.parametrize("addresses", [["127.0.0.9"], []], ids=["that address", "any address"])
def test_a_peer_comes_in_from_the_addresses_it_has_named(
    gateway: Gateway, apps: Applications, proven_mode: str, addresses: list[str]
) -> None:
    server = apps.listen()
    prod = gateway.start(
        gateway.config("PROD", proven_mode, targets=[join(server.getsockname())], sources=[])
    )
    peers = [gateway.peer_of(prod)]
    cons = gateway.start(gateway.config("CONS", proven_mode, peers=peers, onward_source="127.0.0.9"))
    gateway.introduce(prod, cons, addresses)
    eventually(lambda: cons.status()["state"] == "READY")
    consumer, producer = apps.through(server, cons)
    apps.exchange(consumer, producer, Payload(1, 10_000), Payload(2, 10_000))
    close = prod.wait_close()
    assert close["source"].startswith("127.0.0.9:")


def test_whoever_comes_from_an_address_that_nobody_has_named_is_reset_and_counted(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    prod = gateway.start(gateway.config("PROD", mode, targets=[join(server.getsockname())], sources=[]))
    peers = [gateway.peer_of(prod)]
    cons = gateway.start(gateway.config("CONS", mode, peers=peers, onward_source="127.0.0.9"))
    gateway.introduce(prod, cons, ["127.0.0.9"])
    eventually(lambda: cons.status()["state"] == "READY")
    assert apps.knock(prod.address()) == RESET
    assert prod.status()["listeners"][0]["refused"] == 1
    (refused,) = eventually(lambda: prod.events("refused"))
    assert (refused["cause"], refused["count"], refused["last_source"]) == ("source", 1, "127.0.0.1")


def test_before_the_peers_are_known_nobody_comes_in_and_nobody_is_counted(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    prod = gateway.start(gateway.config("PROD", mode, targets=[join(server.getsockname())]))
    cons = gateway.start(gateway.config("CONS", mode, peers=[gateway.peer_of(prod)]))
    probed(cons, "not-ready")
    assert apps.knock(prod.address()) == RESET
    assert prod.status()["connections"]["refused"] == 0
    assert prod.status()["proof"] is None
    assert nobody_waits(server)
    gateway.introduce(prod, cons)
    eventually(lambda: cons.status()["state"] == "READY")
    assert prod.events("refused") == []


def test_a_reset_by_prod_is_no_missing_route_also_where_it_comes_before_connect_has_returned(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    prod = gateway.start(gateway.config("PROD", mode))
    cons = gateway.start(gateway.config("CONS", mode, peers=[gateway.peer_of(prod)]))
    knocks = [apps.task(lambda: apps.knock(cons.address())) for _ in range(MANY)]  # busy, it looks late
    assert [knock.result() for knock in knocks] == [RESET] * MANY
    closes = eventually(lambda: cons.events("close")[MANY - 1 :] and cons.events("close"))
    assert {close["reason"] for close in closes} == {"not-ready"}


def test_a_cons_without_peers_turns_its_consumers_away(gateway: Gateway, apps: Applications) -> None:
    cons = gateway.start(gateway.config("CONS", "tls"))
    assert apps.knock(cons.address()) == RESET
    assert cons.status()["connections"]["total"] == 0


def test_a_consumer_from_another_address_is_reset_and_counted(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], cons={"sources": ["127.0.0.2", "127.1.0.0/16"]})
    assert apps.knock(pair.cons.address()) == RESET
    status = pair.cons.status()
    assert (status["listeners"][0]["refused"], status["connections"]["refused"]) == (1, 1)
    assert status["connections"]["total"] == 0
    (refused,) = eventually(lambda: pair.cons.events("refused"))
    assert (refused["cause"], refused["count"], refused["last_source"]) == ("source", 1, "127.0.0.1")
    for source in ("127.0.0.2", "127.1.2.3"):
        consumer = apps.dial(pair.cons.address(), source)
        producer = apps.accept(server)
        apps.exchange(consumer, producer, Payload(1, 10_000), Payload(2, 10_000))


def test_without_sources_nobody_may_connect(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()], cons={"sources": []})
    assert apps.knock(pair.cons.address()) == RESET


def test_strangers_do_not_disturb_a_running_stream(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)

    received, _ = apps.knock(pair.prod.address(), b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert b"HTTP" not in received
    assert len(received) < 64  # at most an alert

    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        stranger = apps.dial(pair.prod.address())
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            whole_handshake(context, stranger)

    apps.exchange(consumer, producer, Payload(1, 1_000_000), Payload(2, 1_000_000))
    pair.wait_closed(1)
    assert pair.prod.status()["connections"]["refused"] == 3
    assert nobody_waits(server)


def whole_handshake(context: ssl.SSLContext, connection: socket.socket) -> None:
    """Until the server has said something inside: a TLS 1.3 client is done before it has been judged."""
    with context.wrap_socket(connection) as session:
        session.recv(1)
