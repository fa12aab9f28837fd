"""The event log: one line at the start and one at the end of a connection, and never more than its megabyte."""

import json
import socket
from contextlib import suppress

from .apps import Applications, Payload, receive_exactly
from .gateway import Gateway, Relay, eventually, join
from .test_wan import request

LOG_BYTES = 1 << 20


def test_a_connection_has_one_line_at_its_start_and_one_at_its_end(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    address = "{}:{}".format(*consumer.getsockname())
    there, back = Payload(1, 20_000_000), Payload(2, 10_000_000)
    apps.exchange(consumer, producer, there, back)
    pair.wait_closed(1)
    for relay in pair:
        close = relay.wait_close()
        (opened,) = relay.events("open")
        for event in (opened, close):
            assert (event["protocol"], event["connection"], event["listener"]) == (1, 1, 0)
            assert event["source"] == opened["source"]
            assert event["onward"] == opened["onward"]
        assert close["bytes"] == {"to_producer": there.size, "to_consumer": back.size}
        assert (close["reason"], close["errno"]) == ("closed", None)
        assert close["duration_s"] >= close["first_byte_s"] > 0
    assert pair.cons.events("open")[0]["source"] == address
    assert pair.cons.events("open")[0]["onward"] == join(pair.prod.address())
    assert pair.prod.events("open")[0]["onward"] == join(server.getsockname())
    assert [event["event"] for event in pair.cons.events()] == [
        "ready",
        *["state"] * 2,
        "open",
        "state",
        "close",
    ]
    assert [event["state"] for event in pair.cons.events("state")] == ["LISTENING", "READY", "STREAMING"]


def test_the_log_of_thousands_of_connections_is_bounded_and_still_ends_with_the_end(
    gateway: Gateway, apps: Applications
) -> None:
    target = apps.listen()
    settings = {"targets": [join(target.getsockname())], "sources": [], "max_connections": 4096}
    prod = gateway.start(gateway.config("PROD", "none", **settings))
    prod.update(peers=[{"public_key": prod.public_key, "source_addresses": ["127.0.0.1"]}])
    count = 2400

    def serve() -> None:
        for _ in range(count):
            target.accept()[0].close()

    serving = apps.task(serve)
    for _ in range(count):
        come_and_go(prod)
    serving.result()
    status = prod.status()
    assert status["connections"]["total"] == count
    end = prod.stop()
    assert end["suppressed_events"] > 0
    assert end["connections"]["total"] == count
    log = prod.log_path.read_bytes()
    assert LOG_BYTES - (32 << 10) < len(log) <= LOG_BYTES
    assert log.endswith(b"\n")
    assert json.loads(log.splitlines()[-1]) == end
    assert prod.status() == end


def come_and_go(prod: Relay) -> None:
    """A connection as short as they come: asked for, answered, ended by both."""
    with socket.create_connection(prod.address(), timeout=20) as cons:
        cons.sendall(request(prod))
        receive_exactly(cons, 32)
        cons.shutdown(socket.SHUT_WR)
        assert cons.recv(1) == b""


def test_a_scan_is_told_in_sum(gateway: Gateway, apps: Applications) -> None:
    """A line for each would let a stranger fill the log."""
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], cons={"sources": ["127.0.0.2"]})
    for _ in range(500):
        with suppress(ConnectionResetError):
            socket.create_connection(pair.cons.address(), timeout=20).close()
    eventually(lambda: pair.cons.status()["connections"]["refused"] == 500)
    end = pair.cons.stop()
    refused = pair.cons.events("refused")
    assert sum(event["count"] for event in refused) == end["connections"]["refused"] == 500
    assert len(refused) < 20
