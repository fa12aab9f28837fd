"""Why a relay or a connection ended: one of the words of docs/relay.md, and what an administrator needs to know."""

import socket
import time
from typing import Any

import pytest

from .apps import (
    Address,
    Applications,
    Payload,
    Tap,
    receive,
    receive_exactly,
    receive_until_broken,
    reset,
    send_and_end,
)
from .gateway import Document, Gateway, Pair, eventually, join

RESET = (b"", "ConnectionResetError")
SOON: Document = {"until": "closed", "linger_s": 0.2}
# PROD is there for as long as CONS asks it.
PATIENT: Document = {"hello_timeout_s": 1.2}
IMPATIENT: Document = {"hello_timeout_s": 0.6}


def ends(pair: Pair) -> list[tuple[str, str]]:
    """State and reason of both relays, once they have ended by themselves."""
    documents = [relay.wait_end() for relay in pair]
    return [(document["state"], document["reason"]) for document in documents]


def test_a_stream_is_finished_when_all_its_connections_have_closed(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod=SOON, cons=SOON)
    one, other = (apps.established(server, pair.cons) for _ in range(2))
    apps.exchange(*one, Payload(1, 100_000), Payload(2, 200_000))
    eventually(lambda: all(relay.status()["connections"]["active"] == 1 for relay in pair))
    time.sleep(1)  # far more than it lingers
    assert [relay.status()["state"] for relay in pair] == ["STREAMING", "STREAMING"]
    apps.exchange(*other, Payload(3, 100_000), Payload(4, 200_000))
    assert ends(pair) == [("ENDED", "finished")] * 2
    for relay in pair:
        end = relay.status()
        assert end["cut"] is False
        assert end["message"] is None
        assert end["bytes"] == {"to_producer": 200_002, "to_consumer": 400_002}
        assert end["connections"] == {"active": 0, "total": 2, "refused": 0, "aborted": 0, "kept": 0}


def test_a_stream_lingers_for_a_consumer_that_comes_again(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    lingers = {"until": "closed", "linger_s": 1}
    pair = gateway.pair("tls", [server.getsockname()], prod=lingers, cons=lingers)
    for _ in range(4):
        consumer, producer = apps.through(server, pair.cons)
        apps.exchange(consumer, producer, Payload(1, 1000), Payload(2, 1000))
        time.sleep(0.4)
    assert ends(pair) == [("ENDED", "finished")] * 2
    assert [relay.status()["connections"]["total"] for relay in pair] == [4, 4]


def test_a_stream_without_a_byte_is_not_finished(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod=SOON, cons=SOON)
    consumer, producer = apps.through(server, pair.cons)
    for one, other in ((consumer, producer), (producer, consumer)):
        one.shutdown(socket.SHUT_WR)
        assert receive_until_broken(other) == (b"", "eof")
    pair.wait_closed(1)
    time.sleep(0.6)
    assert [relay.status()["state"] for relay in pair] == ["STREAMING", "STREAMING"]
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 1), Payload(2, 0))
    assert ends(pair) == [("ENDED", "finished")] * 2


def test_until_released_a_stream_waits_for_its_next_connection(gateway: Gateway, apps: Applications) -> None:
    server = apps.listen()
    kept = {"until": "released", "linger_s": 0}
    pair = gateway.pair("tls", [server.getsockname()], prod=kept, cons=kept)
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 1000), Payload(2, 1000))
    pair.wait_closed(1)
    time.sleep(0.5)
    assert [relay.status()["state"] for relay in pair] == ["STREAMING", "STREAMING"]
    assert pair.cons.stop()["reason"] == "released"
    assert pair.prod.stop("--reason", "admin")["reason"] == "admin"
    assert pair.prod.status()["state"] == "ENDED"


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_an_abort_is_the_reason_of_both_relays(
    gateway: Gateway, apps: Applications, mode: str, who: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod=SOON, cons=SOON)
    consumer, producer = apps.established(server, pair.cons)
    reset(producer if who == "producer" else consumer)
    assert ends(pair) == [("FAILED", f"aborted_by_{who}")] * 2
    for relay in pair:
        end = relay.status()
        assert end["message"] == "ECONNRESET"
        assert (end["connections"]["total"], end["connections"]["aborted"]) == (1, 1)
        assert relay.events("state")[-1]["state"] == "FAILED"


def test_a_wan_that_was_cut_is_no_end_in_order(gateway: Gateway, apps: Applications, tap: Tap) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], prod=SOON, cons=SOON, via=tap)
    apps.established(server, pair.cons)
    tap.cut_with_fin()
    for relay in pair:
        end = relay.wait_end()
        assert (end["state"], end["connections"]["aborted"]) == ("FAILED", 1)


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        ("PROD", {}, "no hello has named a target"),
        ("PROD", {"targets": ["127.0.0.1:9"]}, "no peers were given"),
        (
            "PROD",
            {
                "targets": ["127.0.0.1:9"],
                "peers": [{"public_key": "A" * 43, "source_addresses": ["127.0.0.1"]}],
            },
            "no relay has probed",
        ),
        ("CONS", {}, "no peers were given"),
    ],
)
def test_who_waits_in_vain_says_for_what(
    gateway: Gateway, mode: str, role: str, settings: Any, message: str
) -> None:
    relay = gateway.start(gateway.config(role, mode, hello_timeout_s=0.3, **settings))
    assert relay.status()["hello_remaining_s"] <= 0.3
    end = relay.wait_end()
    assert (end["state"], end["reason"], end["message"]) == ("FAILED", "hello_timeout", message)


def test_a_stream_without_a_target_times_out_on_both_sides(gateway: Gateway, mode: str) -> None:
    pair = gateway.pair(mode, [], prod=PATIENT, cons=IMPATIENT, ready=False)
    assert ends(pair) == [("FAILED", "hello_timeout")] * 2
    assert "not-ready" in pair.cons.status()["message"]
    assert pair.prod.status()["message"] == "no hello has named a target"


def test_a_target_that_refuses_is_the_reason_of_both_relays(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    nowhere = server.getsockname()
    server.close()
    pair = gateway.pair(mode, [nowhere], prod=PATIENT, cons=IMPATIENT, ready=False)
    assert ends(pair) == [("FAILED", "target_unreachable")] * 2
    for relay in pair:
        assert "ECONNREFUSED" in relay.status()["message"]
    assert join(nowhere) in pair.prod.status()["message"]


def test_a_ready_relay_does_not_time_out(gateway: Gateway, apps: Applications, mode: str) -> None:
    patience = {"hello_timeout_s": 1}
    pair = gateway.pair(mode, [apps.listen().getsockname()], prod=patience, cons=patience)
    time.sleep(1.3)
    for relay in pair:
        assert (relay.status()["state"], relay.status()["hello_remaining_s"]) == ("READY", None)


@pytest.fixture
def silent(apps: Applications) -> Address:
    """The address of a target that never answers: its queue is full, and the kernel drops who comes."""
    server = apps.listen(backlog=0)
    for _ in range(3):
        waiting = apps.keep(socket.socket())
        waiting.settimeout(0)
        waiting.connect_ex(server.getsockname())
    address: Address = server.getsockname()
    return address


def test_a_target_that_never_answers_times_out(
    gateway: Gateway, apps: Applications, silent: Address, mode: str
) -> None:
    pair = gateway.pair(mode, [silent], prod={"connect_timeout_s": 0.3}, ready=False)
    eventually(lambda: (pair.cons.status()["last_probe"] or {}).get("result") == "unreachable")
    assert pair.cons.status()["last_probe"]["errno"] == "ETIMEDOUT"
    assert apps.knock(pair.cons.address()) == RESET
    for relay in pair:
        close = relay.wait_close()
        assert (close["reason"], close["errno"]) == ("unreachable", "ETIMEDOUT")
        assert relay.status()["connections"]["total"] == 0


def test_a_prod_relay_that_never_answers_times_out(
    gateway: Gateway, apps: Applications, silent: Address, mode: str
) -> None:
    peer = {
        "relay_id": "0" * 32,
        "public_key": gateway.start(gateway.config("PROD", "tls")).public_key,
        "listeners": [{"index": 0, "address": join(silent)}],
    }
    cons = gateway.start(gateway.config("CONS", mode, peers=[peer], connect_timeout_s=0.3))
    eventually(lambda: (cons.status()["last_probe"] or {}).get("result") == "timeout")
    assert apps.knock(cons.address()) == RESET
    close = cons.wait_close()
    assert (close["reason"], close["errno"]) == ("timeout", "ETIMEDOUT")


def test_a_connection_that_is_silent_for_too_long_is_cut_and_the_others_are_not(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod={"idle_s": 0.6})
    silent = apps.established(server, pair.cons)
    consumer, producer = apps.established(server, pair.cons)
    watching = apps.task(lambda: [receive_until_broken(end) for end in silent])
    while not (closed := pair.prod.events("close")):
        consumer.sendall(b"x")
        receive_exactly(producer, 1)
    assert (closed[0]["connection"], closed[0]["reason"]) == (1, "idle")
    assert watching.result() == [RESET, RESET]
    apps.exchange(consumer, producer, Payload(1, 1000), Payload(2, 1000))


def test_a_connection_of_which_one_side_has_ended_and_the_other_is_silent_is_cut(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], prod={"half_closed_s": 0.6})
    consumer, producer = apps.established(server, pair.cons)
    open_still = apps.established(server, pair.cons)
    consumer.shutdown(socket.SHUT_WR)
    assert producer.recv(1) == b""
    end = time.monotonic() + 1.2
    while time.monotonic() < end:  # it answers, and is not silent
        producer.sendall(b"x")
        receive_exactly(consumer, 1)
        time.sleep(0.05)
    assert pair.prod.events("close") == []
    assert receive_until_broken(consumer) == RESET
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        producer.sendall(b"nobody hears this")
    close = pair.prod.wait_close()
    assert (close["connection"], close["reason"]) == (1, "half-closed")
    apps.exchange(*open_still, Payload(1, 1000), Payload(2, 1000))


def test_an_end_after_a_long_silence_leaves_the_other_side_its_time_to_answer(
    gateway: Gateway, apps: Applications
) -> None:
    patience_s = 1.5
    server = apps.listen()
    pair = gateway.pair("none", [server.getsockname()], prod={"half_closed_s": patience_s})
    consumer, producer = apps.established(server, pair.cons)
    time.sleep(1.5 * patience_s)
    consumer.shutdown(socket.SHUT_WR)
    assert producer.recv(1) == b""
    time.sleep(patience_s / 3)  # the relay has looked at it in the meantime
    send_and_end(producer, payload := Payload(1, 1000))
    assert receive(consumer) == payload.digest()
    assert pair.prod.wait_close()["reason"] == "closed"
