"""A stream with one narrow place, and what the status says of it."""

import time
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Final

from relay.apps import Applications
from relay.gateway import eventually

from scistream_flows.models import Limiting

from .topology import Network

MBITS_PER_S: Final = 40
CHUNK_BYTES: Final = 1 << 16
# What is narrow on the way from the source to the sink, and how the status may call it, with the two sides' names. A
# relay that is starved need not know whether by the network before it or by the application.
LIMITS: Final = {
    "source application": ["{source}_application"],
    "source lan": ["{source}_lan"],
    "wan": ["wan"],
    "sink lan": ["{sink}_lan"],
    "sink application": ["{sink}_application"],
}


def assert_named(
    verdict: Callable[[], Limiting | None],
    what: str,
    direction: str,
    *,
    network: Network,
    apps: Applications,
    consumer: socket,
    producer: socket,
) -> None:
    """Makes one place narrow, sends without an end, and waits for the verdict to name that place and to stay."""
    source, sink = ("producer", "consumer") if direction == "to_consumer" else ("consumer", "producer")
    legs = {"producer lan": network.lan_a, "wan": network.wan, "consumer lan": network.lan_b}
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
        found = verdict()
        seen.append((found.leg, found.direction) if found else (None, None))
        return len(seen) >= 4 and all(one in wanted for one in seen[-4:])

    try:
        eventually(stays, within_s=8, every_s=0.3)
    except AssertionError:
        raise AssertionError(f"not {wanted} but {seen[-12:]}") from None
