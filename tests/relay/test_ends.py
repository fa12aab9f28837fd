"""How a connection ends: in order, half, or not at all. An abort stays an abort."""

import array
import errno
import fcntl
import os
import signal
import socket
import termios
from functools import partial

import pytest

from .apps import (
    Applications,
    Payload,
    Tap,
    digest,
    receive,
    receive_exactly,
    receive_until_broken,
    reset,
    send,
    send_and_end,
)
from .gateway import Gateway, eventually

BROKEN = "ConnectionResetError"


def test_both_directions_at_once_arrive_whole(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    there, back = Payload(1, 9_000_001), Payload(2, 50_000_003)
    apps.exchange(consumer, producer, there, back)
    pair.wait_closed(1)
    for relay in pair:
        assert relay.status()["bytes"] == {"to_producer": there.size, "to_consumer": back.size}
        (close,) = relay.events("close")
        assert close["reason"] == "closed"
        assert close["errno"] is None


def test_an_answer_after_the_clients_fin_arrives(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    send_and_end(consumer, Payload(1, 10_000))
    assert receive(producer) == Payload(1, 10_000).digest()
    answer = Payload(2, 3_000_000)
    sender = apps.task(lambda: send_and_end(producer, answer))
    assert receive(consumer) == answer.digest()
    sender.result()


def test_a_question_after_the_servers_fin_arrives(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    send_and_end(producer, Payload(1, 10_000))
    assert receive(consumer) == Payload(1, 10_000).digest()
    question = Payload(2, 3_000_000)
    sender = apps.task(lambda: send_and_end(consumer, question))
    assert receive(producer) == question.digest()
    sender.result()
    pair.wait_closed(1)


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_a_reset_reaches_the_other_application_while_nothing_moves(
    gateway: Gateway, apps: Applications, mode: str, who: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    consumer.sendall(b"hello")
    assert receive_exactly(producer, 5) == b"hello"
    producer.sendall(b"welcome")
    assert receive_exactly(consumer, 7) == b"welcome"
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    reset(one)
    assert receive_until_broken(other) == (b"", BROKEN)
    for relay in pair:
        close = relay.wait_close()
        assert close["reason"] == f"aborted-by-{who}"
        assert close["errno"] == "ECONNRESET"
        assert close["bytes"] == {"to_producer": 5, "to_consumer": 7}
        assert relay.status()["connections"]["aborted"] == 1


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_a_reset_in_mid_stream_is_no_end_of_file(
    gateway: Gateway, apps: Applications, mode: str, who: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    sent = Payload(3, 8_000_000)
    reading = apps.task(lambda: receive_until_broken(other))
    send(one, sent)
    reset(one)
    received, end = reading.result()
    assert end == BROKEN
    assert sent.bytes().startswith(received)


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_data_sent_together_with_a_reset_is_delivered_first(
    gateway: Gateway, apps: Applications, mode: str, who: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    last_words = Payload(4, 30_000)
    send(one, last_words)
    # Acknowledged by the relay's kernel: what a reset would have thrown away in ours is gone from here.
    eventually(lambda: unsent(one) == 0)
    reset(one)
    received, end = receive_until_broken(other)
    assert (digest(received), end) == (last_words.digest(), BROKEN)


def unsent(connection: socket.socket) -> int:
    """Bytes that the peer's kernel has not acknowledged yet."""
    answer = array.array("i", [0])
    fcntl.ioctl(connection, termios.TIOCOUTQ, answer)
    return answer[0]


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_a_reset_after_a_half_close_reaches_the_other_application(
    gateway: Gateway, apps: Applications, mode: str, who: str
) -> None:
    """The direction that has ended cannot carry the news; the other one waits and must hear it all the same."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    send_and_end(one, Payload(5, 1000))
    assert receive(other) == Payload(5, 1000).digest()
    reset(one)

    # What a direct connection shows: EPIPE, because our end had read the end of file before.
    pending = eventually(lambda: other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    assert pending in {errno.EPIPE, errno.ECONNRESET}
    for relay in pair:
        close = relay.wait_close()
        assert close["reason"] == f"aborted-by-{who}"


@pytest.mark.parametrize("victim", ["PROD", "CONS"])
def test_a_killed_relay_is_a_reset_for_both_applications(
    gateway: Gateway, apps: Applications, mode: str, victim: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    endless = Payload(6, 1 << 40)
    both = [
        (apps.task(partial(sends, application, endless)), apps.task(partial(drains, application)))
        for application in (consumer, producer)
    ]
    eventually(lambda: all(count > 1_000_000 for count in pair.cons.status()["bytes"].values()))
    (pair.prod if victim == "PROD" else pair.cons).kill()
    for sending, reading in both:
        # The kernel reports a reset once, to whichever call comes first; the other sees EPIPE or nothing more.
        assert "ECONNRESET" in {sending.result(), reading.result()}


def sends(connection: socket.socket, payload: Payload) -> str:
    """The name of the error that ends it."""
    try:
        send(connection, payload)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def drains(connection: socket.socket) -> str:
    """The name of the error that ends it; nothing for an end of file."""
    try:
        while connection.recv(1 << 20):
            pass
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


@pytest.mark.parametrize("victim", ["PROD", "CONS"])
def test_a_killed_relay_is_a_reset_also_while_nothing_moves(
    gateway: Gateway, apps: Applications, mode: str, victim: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.through(server, pair.cons)
    producer.sendall(b"half of a frame")
    assert receive_exactly(consumer, 15) == b"half of a frame"
    (pair.prod if victim == "PROD" else pair.cons).kill()
    assert receive_until_broken(consumer) == (b"", BROKEN)
    assert receive_until_broken(producer) == (b"", BROKEN)


def test_a_fin_on_the_wan_without_close_notify_is_an_abort(
    gateway: Gateway, apps: Applications, tap: Tap
) -> None:
    server = apps.listen()
    pair = gateway.pair("tls", [server.getsockname()], via=tap)
    consumer, producer = apps.through(server, pair.cons)
    producer.sendall(b"half of a frame")
    assert receive_exactly(consumer, 15) == b"half of a frame"
    consumer.sendall(b"half of a request")
    assert receive_exactly(producer, 17) == b"half of a request"
    tap.cut_with_fin()
    assert receive_until_broken(consumer) == (b"", BROKEN)
    assert receive_until_broken(producer) == (b"", BROKEN)
    for relay in pair:
        close = relay.wait_close()
        assert close["reason"] != "closed"


def test_an_end_in_order_passes_through_whatever_stands_on_the_wan(
    gateway: Gateway, apps: Applications, tap: Tap, mode: str
) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    consumer, producer = apps.through(server, pair.cons)
    apps.exchange(consumer, producer, Payload(1, 2_000_000), Payload(2, 3_000_000))
    pair.wait_closed(1)
    for relay in pair:
        assert [close["reason"] for close in relay.events("close")] == ["closed"]


def test_the_first_error_is_the_one_reported_and_ends_both_directions(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """The consumer's reset breaks the reading and the writing direction; one close, one reason, exact counts."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    first = Payload(7, 1_000_000)
    sender = apps.task(lambda: send(producer, first))
    assert digest(receive_exactly(consumer, first.size)) == first.digest()
    sender.result()
    consumer.sendall(b"x" * 1000)
    receive_exactly(producer, 1000)
    reset(consumer)
    assert receive_until_broken(producer)[1] == BROKEN
    for relay in pair:
        close = relay.wait_close()
        assert (close["reason"], close["errno"]) == ("aborted-by-consumer", "ECONNRESET")
        assert close["bytes"] == {"to_consumer": first.size + 1, "to_producer": 1001}


def test_a_killed_application_looks_like_on_a_direct_connection(
    gateway: Gateway, apps: Applications, mode: str
) -> None:
    """Its kernel sends FIN, and RST to what still comes: the relay passes on both."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    producer.close()  # the child has the only descriptor now
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert receive_until_broken(consumer) == (b"", "eof")

    def write_until_broken() -> str:
        try:
            consumer.sendall(b"?")
        except OSError as error:
            return type(error).__name__
        return ""

    assert eventually(write_until_broken) in {"BrokenPipeError", "ConnectionResetError"}
