"""Strangers at the WAN listener: they cost little, they get nothing, and a stream that runs does not feel them."""

import secrets
import socket
import ssl
import struct
import time
from contextlib import suppress

import pytest

from .apps import (
    Applications,
    Payload,
    nobody_waits,
    receive,
    receive_exactly,
    receive_until_broken,
    reset,
    send_and_end,
)
from .gateway import Document, Gateway, Pair, Relay, eventually

STRANGERS = 10_000
MOST_HALF_OPEN = 512
MOST_FROM_ONE_SOURCE = 128
# Anybody may try to prove the peer's key.
ANYBODY: Document = {"sources": []}


def open_pair(gateway: Gateway, server: socket.socket, mode: str, **prod: object) -> Pair:
    """A stream whose PROD relay lets any address come as far as the handshake."""
    pair = gateway.pair(
        mode, [server.getsockname()], prod={**ANYBODY, **prod}, cons={"onward_source": "127.0.0.1"}
    )
    pair.prod.update(peers=[{"public_key": pair.cons.public_key, "source_addresses": []}])
    return pair


def knock_and_stay(apps: Applications, relay: Relay, source: str, words: bytes = b"") -> socket.socket:
    connection = apps.keep(socket.socket())
    connection.bind((source, 0))
    connection.connect(relay.address())
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(words)
    return connection


def client_hello(version: ssl.TLSVersion) -> bytes:
    """The first words of an ordinary client of this version of TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def in_records_of(size: int, record: bytes) -> bytes:
    """The same handshake message, in many records."""
    body = record[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(record[:3] + struct.pack(">H", len(piece)) + piece for piece in pieces)


def causes(relay: Relay) -> dict[str, int]:
    """How many were turned away for which cause, as the event log says in sum."""
    found: dict[str, int] = {}
    for event in relay.events("refused"):
        found[event["cause"]] = found.get(event["cause"], 0) + event["count"]
    return found


def test_ten_thousand_strangers_do_not_disturb_a_stream_and_leave_nothing(
    gateway: Gateway, apps: Applications
) -> None:
    """Port scans from one address, wrong words from several, and as many as wait stay within their bounds."""
    server = apps.listen()
    pair = open_pair(gateway, server, "tls", handshake_timeout_s=2, rate_mbits_per_s=400)
    consumer, producer = apps.established(server, pair.cons)
    before = pair.prod.status()["resources"]
    payload = Payload(1, 400_000_000)
    apps.task(lambda: send_and_end(producer, payload))
    arrived = apps.task(lambda: receive(consumer))
    plain, other_tls = b"GET / HTTP/1.1\r\n\r\n", client_hello(ssl.TLSVersion.TLSv1_2)
    waiting = []
    for number in range(STRANGERS):
        source = "127.0.0.9" if number % 2 else f"127.0.1.{number // 2 % 100 + 1}"
        with suppress(ConnectionResetError, BrokenPipeError):
            stranger = socket.socket()
            stranger.settimeout(20)
            stranger.bind((source, 0))
            stranger.connect(pair.prod.address())
            if number % 4 == 0:
                waiting.append(apps.keep(stranger))
                continue
            if number % 8 in (1, 6):
                stranger.sendall(plain if number % 8 == 1 else other_tls)
            if number % 8 == 2:
                reset(stranger)
        stranger.close()
        if number % 1000 == 0:
            resources = pair.prod.status()["resources"]
            assert resources["descriptors"] <= before["descriptors"] + MOST_HALF_OPEN + 64, resources
            assert resources["rss_bytes"] <= before["rss_bytes"] + (64 << 20), resources
    assert arrived.result() == payload.digest()
    eventually(lambda: pair.prod.status()["connections"]["refused"] == STRANGERS)
    after = pair.prod.status()["resources"]
    assert after["descriptors"] <= before["descriptors"]
    assert after["pipes"] <= before["pipes"] + 4
    assert after["rss_bytes"] <= before["rss_bytes"] + (64 << 20)
    assert nobody_waits(server)
    for stranger in waiting:
        with suppress(OSError):
            assert stranger.recv(1) == b""
    end = pair.prod.stop()
    assert end["connections"]["refused"] == sum(causes(pair.prod).values()) == STRANGERS
    seconds = end["duration_s"]
    assert len(pair.prod.events("refused")) <= (seconds + 2) * len(causes(pair.prod))
    assert pair.prod.log_path.stat().st_size < 64 << 10


def test_those_who_wait_are_bounded_in_all_and_from_each_address(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = open_pair(gateway, server, proven_mode, handshake_timeout_s=300)
    before = pair.prod.status()["resources"]

    def hold(source: str, count: int) -> None:
        for _ in range(count):
            with suppress(ConnectionResetError):
                knock_and_stay(apps, pair.prod, source)

    hold("127.0.0.2", MOST_FROM_ONE_SOURCE + 5)
    eventually(lambda: pair.prod.status()["connections"]["refused"] == 5)
    for source in ("127.0.0.3", "127.0.0.4", "127.0.0.5"):
        hold(source, MOST_FROM_ONE_SOURCE)
    assert pair.prod.status()["connections"]["refused"] == 5
    hold("127.0.0.6", 7)
    eventually(lambda: pair.prod.status()["connections"]["refused"] == 12)
    resources = pair.prod.status()["resources"]
    assert resources["pipes"] == before["pipes"]
    assert resources["descriptors"] <= before["descriptors"] + MOST_HALF_OPEN + 2
    assert eventually(lambda: causes(pair.prod)) == {"half-open": 12}
    # The peer's own address is named, and has places of its own.
    pair.prod.update(
        peers=[
            {"public_key": pair.cons.public_key, "source_addresses": ["127.0.0.1"]},
            {"public_key": secrets.token_urlsafe(32), "source_addresses": []},
        ]
    )
    consumer, producer = apps.established(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_a_peer_from_anywhere_has_places_of_its_own_once_it_has_proven_its_key(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    """Its probe has: strangers who fill their places do not keep it out, and many connections at once are no scan."""
    server = apps.listen()
    pair = open_pair(gateway, server, proven_mode, handshake_timeout_s=300)
    for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"):
        for _ in range(MOST_FROM_ONE_SOURCE):
            knock_and_stay(apps, pair.prod, source)
    for _ in range(MOST_FROM_ONE_SOURCE + 5):
        knock_and_stay(apps, pair.prod, "127.0.0.1")
    consumer, producer = apps.established(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))
    assert pair.prod.status()["connections"]["refused"] == 0
    # Revoked, it is a stranger as any other.
    pair.prod.update(peers=[{"public_key": secrets.token_urlsafe(32), "source_addresses": []}])
    with suppress(ConnectionResetError):
        knock_and_stay(apps, pair.prod, "127.0.0.1")
    assert eventually(lambda: causes(pair.prod)) == {"half-open": 1}


def test_a_byte_at_a_time_does_not_buy_more_time(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod={"handshake_timeout_s": 0.8})
    words = client_hello(ssl.TLSVersion.TLSv1_3) if mode != "none" else b"S2DS" + bytes(60)
    loris = apps.dial(pair.prod.address())
    said = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        for byte in words:
            loris.sendall(bytes([byte]))
            said += 1
            time.sleep(0.05)
    assert 0 < said < len(words)
    assert eventually(lambda: causes(pair.prod)) == {"handshake-timeout": 1}


@pytest.mark.parametrize("size", [1, 40])
def test_a_handshake_in_fragments_leaves_nothing_behind(
    gateway: Gateway, apps: Applications, proven_mode: str, size: int
) -> None:
    server = apps.listen()
    pair = open_pair(gateway, server, proven_mode)
    before = pair.prod.status()["resources"]["descriptors"]
    hello = in_records_of(size, client_hello(ssl.TLSVersion.TLSv1_3))
    for cut in (len(hello), len(hello) - 3):
        stranger = knock_and_stay(apps, pair.prod, "127.0.0.2", hello[:cut])
        with suppress(OSError):  # it may have been turned away
            stranger.shutdown(socket.SHUT_WR)
        received, _ = receive_until_broken(stranger)
        assert b"S2DR" not in received
    eventually(lambda: pair.prod.status()["connections"]["refused"] == 2)
    assert pair.prod.status()["resources"]["descriptors"] == before
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_a_peer_that_is_revoked_comes_in_no_more(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    """Whoever streams goes on until it ends; who dials anew, or has only dialled so far, is refused.

    In mode tls it has a ticket, which is worth nothing any more: it shakes hands anew.
    """
    server = apps.listen()
    pair = gateway.pair(proven_mode, [server.getsockname()], prod={"sources": []})
    consumer, producer = apps.established(server, pair.cons)
    stranger = gateway.start(gateway.config("PROD", "tls")).public_key
    pair.prod.update(peers=[{"public_key": stranger, "source_addresses": ["127.0.0.1"]}])
    assert apps.knock(pair.cons.address()) == (b"", "ConnectionResetError")
    assert pair.cons.wait_close()["reason"] == "peer-rejected"
    expected = {"handshake-rejected": 1, **({"handshake-cut": 1} if proven_mode == "tls" else {})}
    eventually(lambda: causes(pair.prod).get("handshake-rejected"))
    assert causes(pair.prod) == expected
    assert nobody_waits(server)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_a_stranger_reaches_no_target_before_it_has_proven_a_key(
    gateway: Gateway, apps: Applications, proven_mode: str
) -> None:
    server = apps.listen()
    pair = open_pair(gateway, server, proven_mode)
    before = pair.prod.status()
    kept = apps.accept(server)  # the probe's
    for words in (b"", client_hello(ssl.TLSVersion.TLSv1_3), client_hello(ssl.TLSVersion.TLSv1_2)):
        knock_and_stay(apps, pair.prod, "127.0.0.2", words)
    eventually(lambda: pair.prod.status()["connections"]["refused"] >= 1)  # TLS 1.2 at once
    status = pair.prod.status()
    assert nobody_waits(server)
    assert status["connections"]["total"] == 0
    assert status["resources"]["pipes"] == before["resources"]["pipes"]
    consumer = apps.connect(pair.cons)
    consumer.sendall(b"?")
    assert receive_exactly(kept, 1) == b"?"
