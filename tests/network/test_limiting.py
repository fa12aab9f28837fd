"""Which leg limits: each made the narrow one in turn, and the status names it, whichever way the bytes go.

The same over splice, mode `auth`, is in test_control_plane.py.
"""

import pytest
from relay.gateway import Document

from scistream_flows.models import Limiting
from scistream_flows.stream import limiting_leg

from .narrow import LIMITS, assert_named
from .sites import Facilities

pytestmark = pytest.mark.net


def limits(facilities: Facilities, mode: str, what: str, direction: str, delay_s: float = 0) -> None:
    if delay_s:
        facilities.network.wan.delay(delay_s)
    server = facilities.listen()
    pair = facilities.pair(mode, server.getsockname())
    consumer, producer = facilities.established(server, pair)

    def read(status: Document) -> Limiting | None:
        return None if status["limiting"] is None else Limiting.model_validate(status["limiting"])

    assert_named(
        lambda: limiting_leg(read(pair.prod.status()), read(pair.cons.status())),  # as `Stream.status` does
        what,
        direction,
        network=facilities.network,
        apps=facilities.apps,
        consumer=consumer,
        producer=producer,
    )


@pytest.mark.parametrize("direction", ["to_consumer", "to_producer"])
@pytest.mark.parametrize("what", LIMITS)
def test_the_status_names_the_narrow_place(facilities: Facilities, what: str, direction: str) -> None:
    limits(facilities, "tls", what, direction)


@pytest.mark.parametrize("what", ["wan", "sink application"])
def test_the_status_names_the_narrow_place_when_the_wan_is_long(facilities: Facilities, what: str) -> None:
    limits(facilities, "none", what, "to_consumer", delay_s=0.02)
