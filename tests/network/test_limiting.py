"""Which leg limits: each made the narrow one in turn, and the status names it, whichever way the bytes go."""

import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from relay.gateway import Document, Pair, eventually

from scistream_flows.models import Limiting
from scistream_flows.stream import limiting_leg

from .sites import Facilities

pytestmark = pytest.mark.net

MBITS_PER_S = 40
CHUNK_BYTES = 1 << 16
# What is narrow on the way from the source to the sink, and how the status may call it, with the two sides' names. A
# relay that is starved need not know whether by the network before it or by the application.
LIMITS = {
    "source application": ["{source}_application"],
    "source lan": ["{source}_lan"],
    "wan": ["wan"],
    "sink lan": ["{sink}_lan"],
    "sink application": ["{sink}_application"],
}


def verdict(pair: Pair) -> Limiting | None:
    """What both relays together say, as `Stream.status` does."""

    def read(status: Document) -> Limiting | None:
        return None if status["limiting"] is None else Limiting.model_validate(status["limiting"])

    return limiting_leg(read(pair.prod.status()), read(pair.cons.status()))


def limits(facilities: Facilities, mode: str, what: str, direction: str, delay_s: float = 0) -> None:
    """Runs a stream with one narrow place, and waits for the verdict to be that one and to stay."""
    network, apps = facilities.network, facilities.apps
    source, sink = ("producer", "consumer") if direction == "to_consumer" else ("consumer", "producer")
    legs = {"producer lan": network.lan_a, "wan": network.wan, "consumer lan": network.lan_b}
    if delay_s:
        network.wan.delay(delay_s)
    server = facilities.listen()
    pair = facilities.pair(mode, server.getsockname())
    consumer, producer = facilities.established(server, pair)
    sends, reads = (producer, consumer) if direction == "to_consumer" else (consumer, producer)
    place = what.replace("source", source).replace("sink", sink)
    if place in legs:
        legs[place].throttle(MBITS_PER_S)
    pause_s = CHUNK_BYTES * 8 / MBITS_PER_S / 1e6
    chunk = bytes(CHUNK_BYTES)

    def repeat(step: Callable[[], object], *, slow: bool) -> None:
        with suppress(OSError):  # the end of the test
            while step() != b"":
                time.sleep(pause_s if slow else 0)

    apps.task(lambda: repeat(lambda: sends.sendall(chunk), slow=what == "source application"))
    apps.task(lambda: repeat(lambda: reads.recv(CHUNK_BYTES), slow=what == "sink application"))
    wanted = [(name.format(source=source, sink=sink), direction) for name in LIMITS[what]]
    seen: list[tuple[str | None, str | None]] = []

    def stays() -> bool:
        found = verdict(pair)
        seen.append((found.leg, found.direction) if found else (None, None))
        return len(seen) >= 4 and all(one in wanted for one in seen[-4:])

    try:
        eventually(stays, within_s=8, every_s=0.3)
    except AssertionError:
        raise AssertionError(f"not {wanted} but {seen[-12:]}") from None


@pytest.mark.parametrize("direction", ["to_consumer", "to_producer"])
@pytest.mark.parametrize("what", LIMITS)
def test_the_status_names_the_narrow_place(facilities: Facilities, what: str, direction: str) -> None:
    limits(facilities, "tls", what, direction)


@pytest.mark.parametrize("what", LIMITS)
def test_the_status_names_the_narrow_place_when_the_kernel_carries(facilities: Facilities, what: str) -> None:
    limits(facilities, "auth", what, "to_consumer")


@pytest.mark.parametrize("what", ["wan", "sink application"])
def test_the_status_names_the_narrow_place_when_the_wan_is_long(facilities: Facilities, what: str) -> None:
    limits(facilities, "none", what, "to_consumer", delay_s=0.02)
