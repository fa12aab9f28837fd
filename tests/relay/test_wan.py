"""What travels between the two relays: the request, the answer, and who may read what follows."""

import json
import select
import socket
import subprocess
from contextlib import suppress
from shutil import which
from typing import Any

import pytest

from .apps import Applications, Payload, Tap, nobody_waits, receive_exactly
from .gateway import Gateway, Relay, eventually, join

OK, DENIED, NOT_READY, PROTOCOL = 0, 3, 4, 5
PROBE_TARGET = 2
RESET = (b"", "ConnectionResetError")


def request(relay: Relay, **changes: Any) -> bytes:
    """The request of docs/relay.md for data of listener 0 in mode none, or one with mistakes."""
    fields = {
        "magic": b"S2DS",
        "protocol": 1,
        "kind": 1,
        "mode": 3,
        "reserved": 0,
        "relay_id": bytes.fromhex(relay.id),
        "listener": 0,
        "more_reserved": 0,
        "lease_s": 0,
        "rest": bytes(32),
        **changes,
    }
    return b"".join(
        [
            fields["magic"],
            bytes([fields["protocol"], fields["kind"], fields["mode"], fields["reserved"]]),
            fields["relay_id"],
            fields["listener"].to_bytes(2, "big"),
            fields["more_reserved"].to_bytes(2, "big"),
            fields["lease_s"].to_bytes(4, "big"),
            fields["rest"],
        ]
    )


def prod_without_tls(gateway: Gateway, target: socket.socket, **settings: Any) -> Relay:
    """A PROD relay to which this test speaks as CONS does."""
    prod = gateway.start(
        gateway.config("PROD", "none", targets=[join(target.getsockname())], sources=[], **settings)
    )
    prod.update(peers=[{"public_key": prod.public_key, "source_addresses": ["127.0.0.1"]}])
    return prod


def assert_serves(apps: Applications, prod: Relay, target: socket.socket) -> None:
    """A request in order leads to the target, and its connection is the only one the target has got so far."""
    cons = apps.dial(prod.address())
    cons.sendall(request(prod) + b"hello")
    answer = receive_exactly(cons, 32)
    assert answer[:8] == b"S2DR" + bytes([1, OK, 0, 0])
    producer = apps.accept(target)
    assert receive_exactly(producer, 5) == b"hello"
    producer.sendall(b"welcome")
    assert receive_exactly(cons, 7) == b"welcome"
    assert nobody_waits(target)


def test_a_second_probe_is_answered_when_there_is_a_target(gateway: Gateway, apps: Applications) -> None:
    """The first hears at once that there is none; the next ones need not ask again and again."""
    target = apps.listen()
    prod = gateway.start(gateway.config("PROD", "none", sources=[], handshake_timeout_s=60))
    prod.update(peers=[{"public_key": prod.public_key, "source_addresses": ["127.0.0.1"]}])

    def probe() -> socket.socket:
        cons = apps.dial(prod.address())
        cons.sendall(request(prod, kind=PROBE_TARGET))
        return cons

    assert receive_exactly(probe(), 32)[5] == NOT_READY
    second, third = probe(), probe()
    # a connection for data is answered at once, whoever waits
    data = apps.dial(prod.address())
    data.sendall(request(prod))
    assert receive_exactly(data, 32)[5] == NOT_READY
    assert select.select([second, third], [], [], 0)[0] == []
    prod.update(targets=[join(target.getsockname())])
    assert [receive_exactly(one, 32)[5] for one in (second, third)] == [OK, OK]
    apps.accept(target)
    assert nobody_waits(target)


def test_who_is_no_peer_any_more_hears_of_no_target(gateway: Gateway, apps: Applications) -> None:
    """Its probe was held, and the update came meanwhile."""
    target = apps.listen()
    prod = gateway.start(gateway.config("PROD", "none", sources=[], handshake_timeout_s=60))
    peer = {"public_key": prod.public_key, "source_addresses": ["127.0.0.1"]}
    prod.update(peers=[peer])
    first, held = apps.dial(prod.address()), apps.dial(prod.address())
    first.sendall(request(prod, kind=PROBE_TARGET))
    assert receive_exactly(first, 32)[5] == NOT_READY
    held.sendall(request(prod, kind=PROBE_TARGET))
    assert select.select([held], [], [], 0.3)[0] == []
    prod.update(peers=[peer | {"source_addresses": ["127.0.0.9"]}], targets=[join(target.getsockname())])
    assert receive_exactly(held, 32)[5] == DENIED
    assert prod.status()["proof"] is None
    assert nobody_waits(target)


def test_a_peer_that_probes_again_and_again_is_not_held_in_ever_more_places(
    gateway: Gateway, apps: Applications
) -> None:
    prod = gateway.start(gateway.config("PROD", "none", sources=[], handshake_timeout_s=60))
    prod.update(peers=[{"public_key": prod.public_key, "source_addresses": ["127.0.0.1"]}])
    probes = [apps.dial(prod.address()) for _ in range(50)]
    for probe in probes:
        probe.sendall(request(prod, kind=PROBE_TARGET))
    # the first, and all but the few that may wait
    eventually(lambda: len(select.select(probes, [], [], 0)[0]) >= 46)


def test_the_answer_is_as_documented_and_payload_may_follow_the_request_at_once(
    gateway: Gateway, apps: Applications
) -> None:
    target = apps.listen()
    prod = prod_without_tls(gateway, target)
    cons = apps.dial(prod.address())
    cons.sendall(request(prod) + b"hello")
    answer = receive_exactly(cons, 32)
    assert answer[:8] == b"S2DR" + bytes([1, OK, 0, 0])
    assert 290 < int.from_bytes(answer[8:12], "big") <= 300
    assert answer[12:] == bytes(20)
    assert receive_exactly(apps.accept(target), 5) == b"hello"


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n" * 4, bytes(64), b"S2DT" + bytes(60)])
def test_what_does_not_start_with_the_magic_is_reset_without_an_answer(
    gateway: Gateway, apps: Applications, words: bytes
) -> None:
    target = apps.listen()
    prod = prod_without_tls(gateway, target)
    assert apps.knock(prod.address(), words) == RESET
    assert_serves(apps, prod, target)
    assert prod.status()["listeners"][0]["refused"] == 1


@pytest.mark.parametrize(
    ("mistake", "verdict"),
    [
        ({"protocol": 2}, PROTOCOL),
        ({"mode": 1}, PROTOCOL),
        ({"mode": 2}, PROTOCOL),
        ({"mode": 9}, PROTOCOL),
        ({"kind": 9}, PROTOCOL),
        ({"reserved": 1}, PROTOCOL),
        ({"more_reserved": 1}, PROTOCOL),
        ({"rest": b"\1" + bytes(31)}, PROTOCOL),
        ({"relay_id": bytes(16)}, DENIED),
        ({"listener": 1}, DENIED),
    ],
    ids=str,
)
def test_a_wrong_request_is_answered_and_reaches_no_target(
    gateway: Gateway, apps: Applications, mistake: dict[str, Any], verdict: int
) -> None:
    target = apps.listen()
    prod = prod_without_tls(gateway, target)
    answer, end = apps.knock(prod.address(), request(prod, **mistake))
    assert (len(answer), end) == (32, "eof")
    assert answer[:8] == b"S2DR" + bytes([1, verdict, 0, 0])
    assert_serves(apps, prod, target)


def test_a_request_may_come_in_pieces(gateway: Gateway, apps: Applications) -> None:
    target = apps.listen()
    prod = prod_without_tls(gateway, target)
    cons = apps.dial(prod.address())
    cons.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in request(prod):
        cons.sendall(bytes([byte]))
    assert receive_exactly(cons, 32)[5] == OK


@pytest.mark.parametrize("mode", ["none", "auth", "tls"])
def test_who_says_nothing_is_turned_away_after_the_handshake_timeout(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    target = apps.listen()
    pair = gateway.pair(mode, [target.getsockname()], prod={"handshake_timeout_s": 0.3})
    assert apps.knock(pair.prod.address()) == RESET
    assert apps.knock(pair.prod.address(), b"S2DS") == RESET
    assert pair.prod.status()["listeners"][0]["refused"] == 2


def answers(apps: Applications, words: bytes) -> socket.socket:
    """A server that hears a little of each connection, says its words, and closes."""
    server = apps.listen()
    server.settimeout(None)

    def serve() -> None:
        while True:
            try:
                connection = apps.accept(server)
            except OSError:
                return  # the test is over
            with suppress(OSError):
                connection.recv(65536)
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)

    apps.task(serve)
    return server


@pytest.mark.parametrize(
    "words",
    [
        b"HTTP/1.1 400 Bad Request, and no more than that",
        b"S2DR" + bytes([2, 0]) + bytes(26),
        b"S2DR" + bytes([1, 77]) + bytes(26),
        b"S2DR" + bytes([1, 0]) + bytes(25) + b"\1",
    ],
)
def test_an_answer_that_is_none_is_a_protocol_error_and_never_payload(
    gateway: Gateway, apps: Applications, words: bytes
) -> None:
    fake = answers(apps, words + b"surely not payload")
    peer = {
        "relay_id": "0" * 32,
        "public_key": gateway.start(gateway.config("PROD", "none")).public_key,
        "listeners": [{"index": 0, "address": join(fake.getsockname())}],
    }
    cons = gateway.start(gateway.config("CONS", "none", peers=[peer]))
    eventually(lambda: (cons.status()["last_probe"] or {}).get("result") == "protocol")
    assert apps.knock(cons.address()) == RESET
    assert cons.wait_close()["reason"] == "protocol"
    assert cons.status()["state"] == "LISTENING"


def test_payload_is_readable_on_the_wire_in_modes_none_and_auth_and_never_in_tls(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    consumer, producer = apps.through(server, pair.cons)
    there, back = Payload(1, 200_000), Payload(2, 300_000)
    apps.exchange(consumer, producer, there, back)
    pair.wait_closed(1)
    readable = mode != "tls"
    for payload, records in ((there, tap.to_prod), (back, tap.to_cons)):
        assert any(payload.bytes() in record for record in records) == readable
        some = payload.bytes()[1000:1032]
        assert any(some in record for record in records) == readable
    # The request names the relay: only in mode none may others read it.
    assert (bytes.fromhex(pair.prod.id) in tap.seen()) == (mode == "none")


@pytest.mark.skipif(not which("iperf3"), reason="iperf3 is not installed")
@pytest.mark.parametrize("direction", [[], ["--reverse"]], ids=["to the server", "to the client"])
def test_iperf3_runs_through_a_stream(gateway: Gateway, mode: str, direction: list[str]) -> None:
    """A server for one session only: the connection of the probe has to be the first of the session."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    server = subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", address[0], "-p", str(address[1])], stdout=subprocess.DEVNULL
    )
    try:
        pair = gateway.pair(mode, [address])
        host, port = pair.cons.address()
        done = subprocess.run(
            ["iperf3", "-c", host, "-p", str(port), "-n", "50M", "--json", *direction],
            capture_output=True,
            text=True,
            timeout=30,
        )
        report = json.loads(done.stdout)
        assert done.returncode == 0, report
        # The session ends with a word on its first connection, which does not wait for what the second has under way.
        assert report["end"]["sum_sent"]["bytes"] >= 50_000_000
        assert report["end"]["sum_received"]["bytes"] >= 1_000_000
        assert server.wait(20) == 0
        pair.wait_closed(2)
    finally:
        server.kill()
        server.wait()


def test_mode_tls_says_which_path_it_takes_and_why(gateway: Gateway, apps: Applications) -> None:
    kernel = gateway.verb("inspect", document={"protocol": 1})["ktls"]
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 200_000))
    pair.wait_closed(1)
    for relay in pair:
        (close,) = relay.events("close")
        path = "ktls-splice" if kernel["available"] else "tls-copy"
        assert close["path"] == {"to_consumer": path, "to_producer": path}
        if kernel["available"]:
            assert close["path_reason"].endswith(" by the kernel")
        else:
            assert close["path_reason"] == f"no kernel TLS (TCP_ULP: {kernel['errno']})"


def test_a_stream_goes_on_when_a_key_has_made_all_the_records_that_it_may(
    gateway: Gateway, apps: Applications
) -> None:
    """2048 and 3072 full records, where a key may make 1024."""
    server = apps.listen()
    limit = {"records_per_key": 1024}
    pair = gateway.pair("tls", [server.getsockname()], prod=limit, cons=limit)
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 32 << 20), Payload(2, 48 << 20))
    pair.wait_closed(1)
