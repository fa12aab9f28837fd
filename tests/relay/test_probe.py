"""The probe proves the way to the application, and leaves its connection to the first who uses it."""

import select
import socket
import time
from typing import Any

import psutil

from .apps import Applications, Payload, receive, receive_exactly, receive_until_broken, send_and_end
from .gateway import Gateway, eventually, join


def waiting(server: socket.socket) -> bool:
    """Whether a connection waits to be accepted."""
    return bool(select.select([server], [], [], 0.3)[0])


def test_a_server_that_accepts_exactly_once_serves_the_first_consumer(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    assert pair.prod.status()["connections"]["kept"] == 1
    producer = apps.accept(server)
    server.close()
    consumer = apps.connect(pair.cons)
    apps.exchange(consumer, producer, Payload(1, 400_000), Payload(2, 500_000))
    pair.wait_closed(1)
    assert pair.prod.status()["connections"]["kept"] == 0


def test_a_server_that_speaks_first_is_heard(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    producer = apps.accept(server)
    producer.sendall(b"220 ready when you are\r\n")
    consumer = apps.connect(pair.cons)
    assert receive_exactly(consumer, 24) == b"220 ready when you are\r\n"
    consumer.sendall(b"QUIT\r\n")
    assert receive_exactly(producer, 6) == b"QUIT\r\n"


def test_a_producer_that_has_sent_all_and_closed_before_the_consumer_came_loses_nothing(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """It accepts once, sends, closes; its listening socket stays open, but nobody accepts again."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    producer = apps.accept(server)
    frame = Payload(3, 20_000)
    send_and_end(producer, frame)
    consumer = apps.connect(pair.cons)
    assert receive(consumer) == frame.digest()


def test_a_producer_that_has_sent_all_and_gone_loses_nothing(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    producer = apps.accept(server)
    frame = Payload(3, 20_000)
    send_and_end(producer, frame)
    server.close()
    consumer = apps.connect(pair.cons)
    assert receive(consumer) == frame.digest()


def test_a_kept_connection_that_the_target_has_closed_does_not_spoil_the_first_real_one(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    apps.accept(server).close()
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_a_probe_of_the_path_opens_no_connection_to_the_target(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], cons={"probe": "path"})
    assert [relay.status()["proof"] for relay in pair] == ["path", "path"]
    assert pair.prod.status()["connections"]["kept"] == 0
    assert not waiting(server)
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_many_listeners_that_lead_to_one_target_keep_one_connection(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    indices = {"listen": {"indices": [0, 1, 2]}}
    pair = gateway.pair(mode, [server.getsockname()], prod=indices, cons=indices)
    assert pair.prod.status()["connections"]["kept"] == 1
    apps.accept(server)
    assert not waiting(server)


def test_a_kept_connection_that_nobody_used_is_closed_in_order(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    producer = apps.accept(server)
    pair.prod.stop()
    assert receive_until_broken(producer) == (b"", "eof")


def test_a_target_that_is_replaced_sees_its_unused_connection_closed_in_order(
    gateway: Gateway, apps: Applications
) -> None:
    old, new = apps.listen(), apps.listen()
    pair = gateway.pair("none", [old.getsockname()])
    producer = apps.accept(old)
    pair.prod.update(targets=[join(new.getsockname())])
    assert receive_until_broken(producer) == (b"", "eof")


def test_the_stream_is_ready_again_after_its_targets_were_replaced(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    old, new = apps.listen(), apps.listen()
    pair = gateway.pair(mode, [old.getsockname()])
    pair.prod.update(targets=[join(new.getsockname())])
    pair.wait_ready()
    assert pair.prod.status()["proof"] == "target"
    consumer, producer = apps.through(new, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 100_000), Payload(2, 100_000))


def test_targets_given_late_make_the_stream_ready(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [], ready=False)
    eventually(lambda: (pair.cons.status()["last_probe"] or {}).get("result") == "not-ready")
    assert pair.prod.status()["state"] == "WAITING_HELLO"
    assert pair.cons.status()["state"] == "LISTENING"
    pair.prod.update(targets=[join(server.getsockname())])
    pair.wait_ready()


def test_a_probe_that_is_held_proves_nothing_of_peers_that_came_after_it(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """CONS has been given other peers while its probe waited for the first one's target."""
    server = apps.listen()
    pair = gateway.pair(mode, [], ready=False, prod={"handshake_timeout_s": 60})
    eventually(lambda: (pair.cons.status()["last_probe"] or {}).get("result") == "not-ready")
    other = gateway.start(gateway.config("PROD", mode))

    def held() -> list[tuple[object, ...]]:
        """The addresses of CONS that are connected to PROD."""
        return [
            tuple(one.laddr) for one in psutil.net_connections("tcp4") if one.raddr == pair.prod.address()
        ]

    def one_is_held() -> bool:
        """It is there for longer than a handshake takes."""
        before = held()
        time.sleep(0.2)
        return bool(set(before) & set(held()))

    def asked_of_the_other() -> dict[str, Any]:
        probe: dict[str, Any] = pair.cons.status()["last_probe"] or {}
        return probe if probe.get("address") == join(other.address()) else {}

    eventually(one_is_held)
    pair.cons.update(peers=[gateway.peer_of(other)])
    pair.prod.update(targets=[join(server.getsockname())])
    assert eventually(asked_of_the_other)["result"] != "ok"
    assert pair.cons.status()["state"] == "LISTENING"


def test_a_refusing_target_is_named_with_its_errno(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    nowhere = server.getsockname()
    server.close()
    pair = gateway.pair(mode, [nowhere], ready=False)
    probe = eventually(
        lambda: (
            (found := pair.cons.status()["last_probe"] or {}) and found["result"] == "unreachable" and found
        )
    )
    assert probe["errno"] == "ECONNREFUSED"
    assert apps.knock(pair.cons.address()) == (b"", "ConnectionResetError")
    for relay in pair:
        close = relay.wait_close()
        assert (close["reason"], close["errno"]) == ("unreachable", "ECONNREFUSED")


def test_three_hundred_consumers_at_once_are_all_served(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """They reach PROD from one address, that of the CONS relay, and all in one moment."""
    server = apps.listen()
    room = {"max_connections": 400}
    pair = gateway.pair(mode, [server.getsockname()], prod=room, cons=room)
    consumers = [apps.connect(pair.cons) for _ in range(300)]
    for number, consumer in enumerate(consumers):
        consumer.sendall(number.to_bytes(4, "big"))

    def serve() -> int:
        for _ in consumers:
            producer = apps.accept(server)
            producer.sendall(receive_exactly(producer, 4))
        return len(consumers)

    serving = apps.task(serve)
    for number, consumer in enumerate(consumers):
        assert receive_exactly(consumer, 4) == number.to_bytes(4, "big")
    assert serving.result() == len(consumers)
    assert [relay.status()["connections"]["refused"] for relay in pair][1] == 0
