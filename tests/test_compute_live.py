"""A facility behind a Globus Compute endpoint that really runs, through the service itself. Not run by default.

Whoever runs it needs a login that `globus_compute_sdk.Client` finds, and an endpoint as `s2cs init --compute` makes
one. One side of a stream is opened there, and released; no data flow.
"""

from __future__ import annotations

import contextlib
import gc
import os
import uuid
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scistream_flows.facility import ComputeFacility

ENDPOINT = os.environ.get("SCISTREAM_LIVE_ENDPOINT", "")
# the facility's policy has to allow it; nothing connects to it
TARGET = os.environ.get("SCISTREAM_LIVE_TARGET", "127.0.0.1:9")

pytestmark = [
    pytest.mark.skipif(
        not ENDPOINT,
        reason="nothing was tried against Globus Compute: log in to it, then"
        " SCISTREAM_LIVE_ENDPOINT=UUID python -m pytest tests/test_compute_live.py",
    ),
    pytest.mark.timeout(900),
    # The SDK leaves a pair of sockets, by which pika wakes its loop, to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture
def live() -> Iterator[ComputeFacility]:
    """The facility behind the endpoint."""
    from scistream_flows.facility import ComputeFacility

    with ComputeFacility(ENDPOINT, deadline_s=180) as facility:
        yield facility
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_one_side_of_a_stream_is_opened_seen_and_released_at_a_live_endpoint(live: ComputeFacility) -> None:
    from scistream_flows.models import Release, Request, StatusQuery

    uid = f"live-{uuid.uuid4().hex}"
    wanted = Request(uid=uid, role="PROD", targets=[TARGET], lease_s=300)
    with contextlib.ExitStack() as stack:
        stack.callback(live.release, Release(uid=uid, role="PROD"))  # whatever came of it: it may be repeated
        offer = live.request(wanted)
        assert len(offer.relays) == 1
        assert live.request(wanted).relays == offer.relays
        assert live.status(StatusQuery(uid=uid, role="PROD")).state == "LISTENING"
        assert uid in [one.uid for one in live.list().streams]
        ended = live.release(Release(uid=uid, role="PROD")).end
        assert ended is not None
        assert (ended.state, ended.reason) == ("ENDED", "released")
        assert uid not in [one.uid for one in live.list().streams]
