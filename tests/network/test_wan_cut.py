"""The WAN goes silent in mid-stream: everything is swallowed, and no link goes down."""

import socket
import time

import pytest
from relay.apps import Payload, digest, receive_until_broken, send
from relay.gateway import Pair, eventually

from .sites import Facilities
from .topology import Family

pytestmark = pytest.mark.net

BROKEN = "ConnectionResetError"


def started(
    facilities: Facilities, mode: str, family: Family = "IPv4", **changes: object
) -> tuple[Pair, socket.socket, socket.socket]:
    """A stream over which bytes have gone: the pair, the consumer's end and the producer's end."""
    server = facilities.listen(family)
    pair = facilities.pair(mode, server.getsockname(), family, **changes)
    return pair, *facilities.established(server, pair)


def test_a_cut_that_lasts_ends_both_applications_with_an_abort_and_the_record_says_why(
    facilities: Facilities, mode: str, family: Family
) -> None:
    pair, consumer, producer = started(
        facilities, mode, family, until="closed", linger_s=0.2, user_timeout_s=1
    )
    facilities.network.wan.cut()
    consumer.sendall(b"nobody will read this")
    producer.sendall(b"nor this")
    assert receive_until_broken(consumer) == (b"", BROKEN)
    assert receive_until_broken(producer) == (b"", BROKEN)
    for relay in pair:
        end = relay.wait_end()
        assert (end["state"], end["reason"]) == ("FAILED", "relay_lost")
        assert end["message"] == "ETIMEDOUT"


@pytest.mark.parametrize("receiver", ["consumer", "producer"])
def test_a_cut_that_lasts_ends_also_an_application_that_only_receives(
    facilities: Facilities, receiver: str
) -> None:
    _, consumer, producer = started(facilities, "tls", user_timeout_s=1)
    time.sleep(0.3)  # until everything is acknowledged
    facilities.network.wan.cut()
    end = consumer if receiver == "consumer" else producer
    end.settimeout(6)
    assert receive_until_broken(end) == (b"", BROKEN)


def test_a_cut_that_is_mended_in_time_loses_nothing(facilities: Facilities, mode: str) -> None:
    network = facilities.network
    network.wan.throttle(80)
    pair, consumer, producer = started(facilities, mode, user_timeout_s=60)
    there, back = Payload(1, 5_000_000), Payload(2, 5_000_000)
    exchanging = facilities.apps.task(lambda: facilities.apps.exchange(consumer, producer, there, back))
    eventually(lambda: pair.cons.status()["bytes"]["to_consumer"] > 500_000)
    network.wan.cut()
    with pytest.raises(AssertionError):  # it stands still
        exchanging.result(within_s=1)
    network.wan.restore()
    exchanging.result()
    pair.wait_closed(1)


@pytest.mark.parametrize(
    ("mode", "sender"), [("tls", "producer"), ("auth", "consumer"), ("none", "producer")]
)
def test_what_was_delivered_before_the_cut_is_the_beginning_of_what_was_sent(
    facilities: Facilities, mode: str, sender: str
) -> None:
    facilities.network.wan.throttle(80)
    pair, consumer, producer = started(facilities, mode, user_timeout_s=1)
    one, other = (consumer, producer) if sender == "consumer" else (producer, consumer)
    near, far = pair if sender == "producer" else reversed(tuple(pair))
    more_than_all_buffers = Payload(3, 200_000_000)

    def sends() -> str:
        try:
            send(one, more_than_all_buffers)
        except OSError as error:
            return type(error).__name__
        return "everything was taken"

    sending = facilities.apps.task(sends)
    receiving = facilities.apps.task(lambda: receive_until_broken(other))
    direction = "to_producer" if sender == "consumer" else "to_consumer"
    eventually(lambda: far.status()["bytes"][direction] > 500_000)
    facilities.network.wan.cut()
    assert sending.result() in (BROKEN, "BrokenPipeError")
    assert near.wait_close()["reason"] == "peer"
    far.stop()
    received, end = receiving.result()
    assert end == BROKEN
    assert digest(received) == Payload(3, len(received)).digest()
