"""What a reviewer made of the relay who meant it ill: each of these once worked."""

import secrets
import socket
import struct

from .apps import (
    Applications,
    Payload,
    nobody_waits,
    receive,
    receive_exactly,
    receive_until_broken,
    send_and_end,
)
from .gateway import Gateway, Relay, eventually, join

KIND_DATA = 1
MODE_NONE = 3


def request(relay_id: str, listener: int = 0) -> bytes:
    """The first message on the WAN, in mode none."""
    head = struct.pack(">4sBBBB", b"S2DS", 1, KIND_DATA, MODE_NONE, 0)
    return (head + bytes.fromhex(relay_id) + struct.pack(">HHI", listener, 0, 0)).ljust(64, b"\0")


def test_an_urgent_byte_does_not_cut_the_stream_short(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """Splice stops in front of it, as if the stream had ended there."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    producer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    rest = secrets.token_bytes(100_000)
    consumer.sendall(b"abc")
    assert receive_exactly(producer, 3) == b"abc"
    consumer.send(b"!", socket.MSG_OOB)
    consumer.sendall(rest)
    consumer.shutdown(socket.SHUT_WR)
    received = bytearray()
    while piece := producer.recv(1 << 16):
        received += piece
    assert bytes(received).removeprefix(b"!") == rest
    answer = Payload(3, 200_000)
    apps.task(lambda: send_and_end(producer, answer))
    assert receive(consumer) == answer.digest()


def test_what_follows_an_urgent_byte_arrives_though_nothing_more_comes(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """A read ends in front of it, as if that were all."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    producer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    for _ in range(20):
        consumer.sendall(b"before")
        consumer.send(b"!", socket.MSG_OOB)
        consumer.sendall(b"after")
        received = b""
        while received.replace(b"!", b"") != b"beforeafter":
            received += producer.recv(100)
            assert b"beforeafter".startswith(received.replace(b"!", b""))


def test_a_peer_that_is_revoked_while_it_is_silent_is_not_admitted(
    gateway: Gateway, apps: Applications
) -> None:
    server = apps.listen()
    config = gateway.config("PROD", "none", targets=[join(server.getsockname())], sources=[])
    prod = gateway.start(config)
    peer = gateway.start(gateway.config("PROD", "none")).public_key
    prod.update(peers=[{"public_key": peer, "source_addresses": ["127.0.0.1"]}])
    early = apps.dial(prod.address())
    prod.update(peers=[{"public_key": peer, "source_addresses": ["10.9.9.9"]}], sources=[])
    early.sendall(request(prod.id))
    assert receive_until_broken(early) == (b"", "ConnectionResetError")
    assert nobody_waits(server)
    assert prod.status()["connections"]["total"] == 0


def test_an_update_does_not_end_a_stream_that_flows(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair(
        "tls", [server.getsockname()], prod={"hello_timeout_s": 0.5}, cons={"hello_timeout_s": 0.5}
    )
    consumer, producer = apps.established(server, pair.cons)
    gone = apps.listen()
    pair.prod.update(targets=[join(gone.getsockname())])
    gone.close()
    asked = pair.prod.status()["uptime_s"]
    eventually(lambda: pair.prod.status()["uptime_s"] > asked + 1, every_s=0.1)
    apps.exchange(consumer, producer, Payload(1, 300_000), Payload(2, 300_000))


def test_new_peers_do_not_end_a_stream_that_flows(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], cons={"hello_timeout_s": 0.5})
    consumer, producer = apps.established(server, pair.cons)
    vanished = gateway.start(gateway.config("PROD", "tls", targets=[join(server.getsockname())]))
    pair.cons.update(peers=[gateway.peer_of(vanished)])
    vanished.stop()
    asked = pair.cons.status()["uptime_s"]
    eventually(lambda: pair.cons.status()["uptime_s"] > asked + 1, every_s=0.1)
    apps.exchange(consumer, producer, Payload(1, 300_000), Payload(2, 300_000))


def probed_s(relay: Relay) -> float:
    """When the last probe ended, in seconds of the relay's life."""
    status = relay.status()
    return float(status["uptime_s"] - status["last_probe"]["age_s"])


def test_a_refused_request_renews_no_lease(gateway: Gateway, apps: Applications, proven_mode: str) -> None:
    """Its sender has proven its key, but asks for a relay that this one is not."""
    server = apps.listen()
    settings = {"targets": [join(server.getsockname())], "lease_s": 30}
    prod = gateway.start(gateway.config("PROD", proven_mode, **settings))
    stranger = {**gateway.peer_of(prod), "relay_id": secrets.token_hex(16)}
    cons = gateway.start(gateway.config("CONS", proven_mode, peers=[stranger], lease_s=3000))
    gateway.introduce(prod, cons)
    eventually(lambda: (cons.status()["last_probe"] or {}).get("result") == "denied")
    cons.renew(3000)
    asked = cons.status()["uptime_s"]
    eventually(lambda: probed_s(cons) > asked)
    assert prod.status()["lease_remaining_s"] <= 30
