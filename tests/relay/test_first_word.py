"""What a consumer has said before the way is open goes behind the request, and does not wait for PROD's answer."""

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from .apps import Applications, Payload, Tap, receive_exactly, receive_until_broken, reset
from .gateway import Gateway, Pair, eventually

BROKEN = "ConnectionResetError"
QUESTION = Payload(1, 500)
LONG_QUESTION = Payload(2, 200_000)
"""More than fits behind a request."""


def early(apps: Applications, pair: Pair, words: bytes) -> socket.socket:
    """A consumer that connects and says something before its relay looks. `go_on` lets that look."""
    pair.cons.kill(signal.SIGSTOP)
    consumer = apps.connect(pair.cons)
    consumer.sendall(words)
    return consumer


def go_on(pair: Pair) -> None:
    pair.cons.kill(signal.SIGCONT)


def turns_to_the_answer(mode: str) -> list[str]:
    """The request and the answer; and in the modes with a handshake, its beginning."""
    return ["cons", "prod"] * (1 if mode == "none" else 2)


def instead_of_the_answer(
    mode: str, what: Callable[[socket.socket, bytes], None]
) -> Callable[[list[str], socket.socket, bytes], None]:
    def passes(turns: list[str], destination: socket.socket, piece: bytes) -> None:
        if turns == turns_to_the_answer(mode):
            what(destination, piece)
        else:
            destination.sendall(piece)

    return passes


def test_the_first_word_is_a_round_trip_of_the_wan_earlier(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    consumer = early(apps, pair, QUESTION.bytes())
    go_on(pair)
    producer = apps.accept(server)
    assert receive_exactly(producer, QUESTION.size) == QUESTION.bytes()
    assert tap.speakers[-1].count("cons") == len(turns_to_the_answer(mode)) / 2
    apps.exchange(consumer, producer, LONG_QUESTION, Payload(3, 300_000))
    path = "tls-copy" if mode == "tls" else "splice"
    for relay in pair:
        close = relay.wait_close()
        assert close["bytes"] == {"to_producer": QUESTION.size + LONG_QUESTION.size, "to_consumer": 300_000}
        assert close["path"] == {"to_producer": path, "to_consumer": path}


def test_a_word_and_an_end_are_a_whole_question(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    for question in (b"", QUESTION.bytes(), LONG_QUESTION.bytes()):
        consumer = early(apps, pair, question)
        consumer.shutdown(socket.SHUT_WR)
        go_on(pair)
        producer = apps.accept(server)
        assert receive_until_broken(producer) == (question, "eof")
        producer.sendall(b"answer")
        producer.close()
        assert receive_until_broken(consumer) == (b"answer", "eof")
    pair.wait_closed(3)


@pytest.mark.parametrize("words", [b"", QUESTION.bytes()], ids=["silent", "after a word"])
def test_a_consumer_that_is_gone_before_its_relay_looks_is_an_abort(
    gateway: Gateway, apps: Applications, mode: str, words: bytes
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer = early(apps, pair, words)
    reset(consumer)
    go_on(pair)
    assert receive_until_broken(apps.accept(server)) == (words, BROKEN)
    for relay in pair:
        close = relay.wait_close()
        assert (close["reason"], close["errno"]) == ("aborted-by-consumer", "ECONNRESET")
        assert close["bytes"] == {"to_producer": len(words), "to_consumer": 0}


@pytest.mark.parametrize("words", [QUESTION.bytes(), LONG_QUESTION.bytes()], ids=["a word", "more"])
def test_a_refusal_arrives_though_nobody_has_read_the_word(
    gateway: Gateway, apps: Applications, mode: str, words: bytes
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    apps.forget(*apps.established(server, pair.cons))  # the probe's connection has had its user
    pair.wait_idle()
    server.close()
    consumer = early(apps, pair, words)
    go_on(pair)
    assert receive_until_broken(consumer) == (b"", BROKEN)
    (_, refused) = eventually(lambda: pair.cons.events("close")[1:] and pair.cons.events("close"))
    assert (refused["reason"], refused["errno"]) == ("unreachable", "ECONNREFUSED")
    assert refused["bytes"] == {"to_producer": 0, "to_consumer": 0}


def are_connected(near_port: int, far_port: int) -> bool:
    ends = [near_port, far_port]
    return any([*one.laddr[1:], *one.raddr[1:]] == ends for one in psutil.net_connections("tcp4"))


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


def test_a_refusal_counts_whatever_follows_it(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> None:
    """A PROD that has not read the word resets the connection behind its answer."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap, prod={"max_connections": 1})
    apps.established(server, pair.cons)

    def answer_and_reset(cons: socket.socket, answer: bytes) -> None:
        ends = cons.getpeername()[1], cons.getsockname()[1]
        pair.cons.kill(signal.SIGSTOP)
        try:
            cons.sendall(answer)
            cons.shutdown(socket.SHUT_RD)  # who waits for it lets it go, and may reset it as well
            with suppress(OSError):
                reset(cons)
            eventually(lambda: not are_connected(*ends))
        finally:
            go_on(pair)

    tap.passes = instead_of_the_answer(mode, answer_and_reset)
    consumer = early(apps, pair, QUESTION.bytes())
    go_on(pair)
    assert receive_until_broken(consumer) == (b"", BROKEN)
    assert pair.cons.wait_close()["reason"] == "busy"
    assert pair.cons.status()["last_probe"]["result"] == "busy"


def test_a_word_that_nobody_has_answered_for_may_have_arrived_and_counts(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> None:
    server = apps.listen()
    soon = {"until": "closed", "linger_s": 0.2}
    times = {"handshake_timeout_s": 0.5, "connect_timeout_s": 0.5}
    pair = gateway.pair(mode, [server.getsockname()], via=tap, prod=soon, cons=soon | times)
    given_up = threading.Event()
    tap.passes = instead_of_the_answer(mode, lambda _cons, _answer: assert_set(given_up))
    consumer = early(apps, pair, QUESTION.bytes())
    go_on(pair)
    producer = apps.accept(server)
    assert receive_until_broken(consumer) == (b"", BROKEN)
    given_up.set()
    assert receive_until_broken(producer) == (QUESTION.bytes(), BROKEN)
    ends = [relay.wait_end() for relay in pair]
    assert [end["bytes"]["to_producer"] for end in ends] == [QUESTION.size] * 2
    assert [end["reason"] for end in ends] == ["aborted_by_consumer", "relay_lost"]
