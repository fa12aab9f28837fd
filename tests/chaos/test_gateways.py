"""Gateways behind SSH that vanish and return, and their sshd killed or frozen at each step of a stream."""

from __future__ import annotations

import random
import time
from typing import Any, Final

import pytest
from network.services import Node, Services
from relay.apps import Payload
from relay.gateway import eventually

from scistream_flows.errors import GatewayUnreachable, ScistreamError
from scistream_flows.stream import Progress

from .report import Record
from .scene import frozen

pytestmark = [pytest.mark.net, pytest.mark.chaos]

# Before which step of opening the fault happens.
STEPS: Final = {
    "nothing": "request-prod",
    "requested": "request-cons",
    "listening": "connect",
    "ready": "ready",
}


def strike(node: Node, how: str, chance: random.Random) -> None:
    """The sshd of a gateway is killed and comes back, or stands still for a while."""
    if how == "killed":
        node.server.kill()
        time.sleep(chance.uniform(0, 0.5))
        node.server.start()
        return
    assert node.server.process
    with frozen(node.server.process.pid, *node.server.every_session()):
        time.sleep(chance.uniform(0.5, 2))


@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.parametrize("step", [*STEPS, "streaming", "draining"])
def test_an_sshd_that_fails_for_a_moment_loses_no_stream(
    services: Services, record: Record, chance: random.Random, step: str, how: str
) -> None:
    """At whatever step: the stream opens, carries every byte, and is released; nothing stays on the gateways."""
    node = services.node(chance.choice(["a", "b"]))
    server = services.listen()

    def fault() -> None:
        record.struck()
        strike(node, how, chance)

    def tell(progress: Progress) -> None:
        if progress.step == STEPS.get(step):
            fault()

    stream = services.open(server, uid="s", on_progress=tell, until="released")
    ends = services.established(server, stream.listeners[0])
    there, back = (Payload(chance.randrange(1, 1 << 30), 4_000_000) for _ in range(2))
    if step == "streaming":
        services.network.wan.throttle(40)
        exchanging = services.apps.task(lambda: services.apps.exchange(*ends, there, back))
        fault()
        exchanging.result()
    elif step == "draining":
        services.apps.exchange(*ends, there, back)
        fault()
    else:
        services.apps.exchange(*ends, there, back)
    end = stream.release()
    record.recovered()
    assert end.reasons == {"PROD": "released", "CONS": "released"}
    services.wait_bare()


def test_a_gateway_that_nobody_can_ask_carries_on_and_is_found_again(
    services: Services, record: Record, chance: random.Random
) -> None:
    """Its control wire is cut: status is a typed error in bounded time, bytes go on; mended, all is found."""
    node = services.node(chance.choice(["a", "b"]))
    side = "a" if node is services.a else "b"
    changes: dict[str, Any] = {f"gateway_{side}": {"connect_timeout_s": 2}}
    services.configure(side, **changes)  # type: ignore[arg-type]
    server = services.listen()
    stream = services.open(server, uid="s", until="released", lease_s=300)
    ends = services.established(server, stream.listeners[0])
    record.struck()
    node.control.cut()
    with pytest.raises(GatewayUnreachable, match=node.host.name):
        stream.status()
    record.detected()
    services.apps.exchange(*ends, Payload(1, 2_000_000), Payload(2, 2_000_000))
    with record.recovering():
        services.network.restore()
        eventually(lambda: _state(stream), within_s=40, every_s=0.2)
    assert stream.release().reasons == {"PROD": "released", "CONS": "released"}


def _state(stream: Any) -> bool:
    try:
        return bool(stream.status().prod.state == "STREAMING")
    except ScistreamError:
        return False


def test_a_gateway_that_vanishes_and_returns_in_time_loses_nothing(
    services: Services, record: Record, chance: random.Random
) -> None:
    """As if all its wires were pulled for a second or two: every byte arrives."""
    node = services.node(chance.choice(["a", "b"]))
    server = services.listen()
    stream = services.open(server, uid="s", until="released", lease_s=300)
    ends = services.established(server, stream.listeners[0])
    services.network.wan.throttle(40)
    there, back = (Payload(chance.randrange(1, 1 << 30), 4_000_000) for _ in range(2))
    exchanging = services.apps.task(lambda: services.apps.exchange(*ends, there, back))
    record.struck()
    services.network.cut_off(node.host)
    time.sleep(chance.uniform(0.5, 2))
    with record.recovering():
        services.network.restore()
        exchanging.result()
    assert stream.release().in_order
