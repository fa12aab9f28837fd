"""What breaks between the parts: a reset, half an end, or nothing at all any more, on each leg."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from typing import Final

import pytest
from network.sites import Facilities
from relay.apps import (
    Applications,
    Payload,
    Tap,
    digest,
    receive,
    receive_until_broken,
    reset,
    send,
    send_and_end,
)
from relay.gateway import Gateway, Pair, eventually

from .report import Record

BROKEN: Final = ("ConnectionResetError", "BrokenPipeError")
LEGS: Final = ("lan-a", "wan", "lan-b")
USER_TIMEOUT_S: Final = 2


def started(facilities: Facilities, mode: str) -> tuple[Pair, socket.socket, socket.socket]:
    """A stream over which a byte has gone each way: the pair, the consumer's end and the producer's end."""
    server = facilities.listen()
    pair = facilities.pair(
        mode, server.getsockname(), user_timeout_s=USER_TIMEOUT_S, until="closed", linger_s=0
    )
    return pair, *facilities.established(server, pair)


def sends_until_broken(connection: socket.socket, payload: Payload) -> str:
    """The name of the error that ends it."""
    try:
        send(connection, payload)
    except OSError as error:
        return type(error).__name__
    return ""


@pytest.mark.net
@pytest.mark.chaos
@pytest.mark.parametrize("moving", ["streaming", "idle"])
@pytest.mark.parametrize("leg", LEGS)
def test_a_leg_that_swallows_everything_ends_in_an_abort_on_both_sides(
    facilities: Facilities, record: Record, chance: random.Random, mode: str, leg: str, moving: str
) -> None:
    """No FIN comes, no link goes down: who can still be reached sees a reset, never an end; both records say why."""
    pair, consumer, producer = started(facilities, mode)
    payload = Payload(chance.randrange(1, 1 << 30), 400_000_000)
    received = facilities.apps.task(lambda: receive_until_broken(consumer))
    heard = facilities.apps.task(lambda: receive_until_broken(producer))
    if moving == "streaming":
        facilities.network.wan.throttle(200)

        sending = facilities.apps.task(lambda: sends_until_broken(producer, payload))
        eventually(lambda: pair.cons.status()["bytes"]["to_consumer"] > chance.randrange(200_000, 4_000_000))
    else:
        time.sleep(0.3)  # until everything is acknowledged
    record.struck()
    facilities.network.leg(leg).cut()
    ends = [relay.wait_end(within_s=40) for relay in pair]
    record.detected()
    for end in ends:
        assert end["state"] == "FAILED", end
        assert end["reason"] in ("relay_lost", "aborted_by_producer", "aborted_by_consumer"), end
    facilities.network.restore()  # or the applications beyond the leg would wait for their own kernels
    if leg != "lan-b":
        beginning, how = received.result()
        assert how in BROKEN
        assert digest(beginning) == Payload(payload.seed, len(beginning)).digest()
    if leg != "lan-a":
        # the kernel reports a reset once, to whichever call comes first
        assert {heard.result()[1], sending.result() if moving == "streaming" else ""} & {*BROKEN}
    for one in (consumer, producer):
        with contextlib.suppress(OSError):
            reset(one)


@pytest.mark.net
@pytest.mark.chaos
@pytest.mark.parametrize("leg", LEGS)
def test_a_leg_that_swallows_everything_for_a_while_loses_nothing(
    facilities: Facilities, record: Record, chance: random.Random, mode: str, leg: str
) -> None:
    """A pause within the time-out is a pause: every byte arrives, in both directions."""
    server = facilities.listen()
    pair = facilities.pair(mode, server.getsockname(), user_timeout_s=30)
    consumer, producer = facilities.established(server, pair)
    facilities.network.wan.throttle(80)
    there, back = (Payload(chance.randrange(1, 1 << 30), 4_000_000) for _ in range(2))
    exchanging = facilities.apps.task(lambda: facilities.apps.exchange(consumer, producer, there, back))
    eventually(lambda: pair.cons.status()["bytes"]["to_consumer"] > 300_000)
    record.struck()
    facilities.network.leg(leg).cut()
    time.sleep(chance.uniform(0.3, 1.5))
    with record.recovering():
        facilities.network.leg(leg).restore()
        exchanging.result()
    pair.wait_closed(1)


@pytest.mark.chaos
@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_a_reset_by_an_application_is_a_reset_for_the_other(
    gateway: Gateway, apps: Applications, record: Record, chance: random.Random, mode: str, who: str
) -> None:
    """What was delivered is the beginning; the end is a reset, on both sides of the relays; others go on."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    others = apps.established(server, pair.cons)
    consumer, producer = apps.established(server, pair.cons)
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    sent = Payload(chance.randrange(1, 1 << 30), chance.randrange(1_000_000, 20_000_000))
    reading = apps.task(lambda: receive_until_broken(other))
    send(one, sent)
    record.struck()
    reset(one)
    beginning, how = reading.result()
    record.detected()
    assert how in BROKEN
    assert digest(beginning) == Payload(sent.seed, len(beginning)).digest()
    for relay in pair:
        close = relay.wait_close()
        assert close["reason"] == f"aborted-by-{who}"
    apps.exchange(*others, Payload(1, 1_000_000), Payload(2, 1_000_000))


@pytest.mark.chaos
def test_a_reset_on_the_wan_is_a_reset_for_both_applications(
    gateway: Gateway, apps: Applications, tap: Tap, record: Record, chance: random.Random, mode: str
) -> None:
    """A middlebox that gives up a connection truncates it for both, and both see it."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()], via=tap)
    consumer, producer = apps.established(server, pair.cons)
    sent = Payload(chance.randrange(1, 1 << 30), 400_000_000)
    reading = apps.task(lambda: receive_until_broken(consumer))
    hearing = apps.task(lambda: receive_until_broken(producer))

    sending = apps.task(lambda: sends_until_broken(producer, sent))
    eventually(lambda: pair.cons.status()["bytes"]["to_consumer"] > 1_000_000)
    record.struck()
    for end in tap.legs[-1]:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RD)  # its pump may be reading it
        with contextlib.suppress(OSError):
            reset(end)
    beginning, how = reading.result()
    assert how in BROKEN
    # the kernel reports a reset once, to whichever call comes first
    assert {hearing.result()[1], sending.result()} & {*BROKEN}
    record.detected()
    assert digest(beginning) == Payload(sent.seed, len(beginning)).digest()
    for relay in pair:
        assert relay.wait_close()["reason"] != "closed"


@pytest.mark.chaos
@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_half_an_end_leaves_the_other_half_whole(
    gateway: Gateway, apps: Applications, chance: random.Random, mode: str, who: str
) -> None:
    """One has said all; what the other still says arrives, whole, and the stream ends in order."""
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    one, other = (producer, consumer) if who == "producer" else (consumer, producer)
    question = Payload(chance.randrange(1, 1 << 30), chance.randrange(1, 3_000_000))
    answer = Payload(chance.randrange(1, 1 << 30), chance.randrange(1, 20_000_000))
    asking = apps.task(lambda: send_and_end(one, question))
    assert receive(other) == question.digest()
    asking.result()
    time.sleep(chance.uniform(0, 0.5))
    answering = apps.task(lambda: send_and_end(other, answer))
    assert receive(one) == answer.digest()
    answering.result()
    pair.wait_closed(1)
    assert [close["reason"] for relay in pair for close in relay.events("close")] == ["closed", "closed"]
