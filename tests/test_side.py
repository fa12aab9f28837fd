"""What the relays of a spread stream say, in sum: whether the side is over, why, and how far it has come."""

from __future__ import annotations

from typing import Any

import pytest

from scistream_flows import side
from scistream_flows.models import RelayStatus, Request
from scistream_flows.registry import Key, RelayRow, StreamRow

KEY = Key("urn:a", "s", "PROD")


def stream(count: int) -> StreamRow:
    rows = [
        RelayRow(
            relay_id=f"{number:032x}",
            gateway=f"gw{number}",
            indices=(number,),
            connections=64,
            reserved_mbits_per_s=0,
        )
        for number in range(count)
    ]
    request = Request(uid="s", role="PROD", num_conn=count, gateways=count)
    return StreamRow(id=1, key=KEY, phase="open", request=request, offer=None, relays=tuple(rows), ended=())


def report(said: str, number: int = 0) -> RelayStatus:
    """`STATE`, `STATE/reason`; with `+` it has carried bytes, with `*` a connection is open."""
    state, _, reason = said.rstrip("+*").partition("/")
    document: dict[str, Any] = {
        "protocol": 1,
        "relay_id": f"{number:032x}",
        "role": "PROD",
        "state": state,
        "reason": reason or None,
        "bytes": {"to_consumer": 5 if "+" in said else 0, "to_producer": 0},
        "connections": {"active": 1 if "*" in said else 0},
    }
    return RelayStatus.model_validate(document)


FINISHED, ABORTED, LOST = "ENDED/finished+", "FAILED/aborted_by_consumer+", "FAILED/relay_lost"


@pytest.mark.parametrize(
    ("said", "over", "state"),
    [
        # one relay: its end is the end
        (["READY"], False, "READY/None"),
        ([FINISHED], True, "ENDED/finished"),
        (["ENDED/lease_expired"], True, "ENDED/lease_expired"),
        (["ENDED/admin"], True, "ENDED/admin"),
        # the least advanced one counts, but a stream that streams, streams
        (["LISTENING", "READY"], False, "LISTENING/None"),
        (["WAITING_HELLO", "LISTENING"], False, "WAITING_HELLO/None"),
        (["READY", "STREAMING+*"], False, "STREAMING/None"),
        (["LISTENING", "STREAMING+*"], False, "LISTENING/None"),
        # each relay sees its own connections out
        ([FINISHED, FINISHED], True, "ENDED/finished"),
        ([FINISHED, "READY"], True, "ENDED/finished"),
        (["READY", FINISHED, "READY"], True, "ENDED/finished"),
        ([FINISHED, "STREAMING+*"], False, "STREAMING/None"),
        ([FINISHED, "STREAMING*"], False, "STREAMING/None"),
        ([FINISHED, "STREAMING+"], False, "STREAMING/None"),
        ([ABORTED, "STREAMING+*"], False, "STREAMING/None"),
        ([FINISHED, ABORTED], True, "FAILED/aborted_by_consumer"),
        (["READY", ABORTED], True, "FAILED/aborted_by_consumer"),
        # one that nothing went through, and that nobody renewed
        (["ENDED/lease_expired", "STREAMING+*"], False, "STREAMING/None"),
        (["ENDED/lease_expired+", "STREAMING+*"], True, "ENDED/lease_expired"),
        (["ENDED/lease_expired", "ENDED/lease_expired"], True, "ENDED/lease_expired"),
        # any other end is that of the side
        ([LOST, "STREAMING+*"], True, "FAILED/relay_lost"),
        (["STREAMING+*", FINISHED, LOST], True, "FAILED/relay_lost"),
        ([ABORTED, LOST], True, "FAILED/relay_lost"),
        (["ENDED/lifetime_reached+", "STREAMING+*"], True, "ENDED/lifetime_reached"),
        (["FAILED/hello_timeout", "LISTENING"], True, "FAILED/hello_timeout"),
        (["ENDED/admin", "STREAMING+*"], True, "ENDED/admin"),
        # of several ends the one that caused the others
        (["ENDED/admin", LOST], True, "FAILED/relay_lost"),
        (["ENDED/admin", "ENDED/lifetime_reached"], True, "ENDED/lifetime_reached"),
        ([FINISHED, "ENDED/released+"], True, "ENDED/released"),
        ([FINISHED, "ENDED/admin+"], True, "ENDED/admin"),
        # one that cannot be asked does not count as idle, nor as over
        (["REQUESTED"], False, "REQUESTED/None"),
        (["REQUESTED", "STREAMING+*"], False, "STREAMING/None"),
        (["REQUESTED", FINISHED], False, "REQUESTED/None"),
        (["REQUESTED", LOST], True, "FAILED/relay_lost"),
        ([], False, "REQUESTED/None"),
    ],
    ids=str,
)
def test_a_side_is_what_its_relays_say_together(said: list[str], *, over: bool, state: str) -> None:
    reports = [report(one, number) for number, one in enumerate(said)]
    assert side.is_over(reports) is over
    status = side.status(stream(len(said) or 1), reports)
    assert f"{status.state}/{status.reason}" == state
    assert status.bytes.to_consumer == 5 * sum("+" in one for one in said)
    assert status.connections.active == sum("*" in one for one in said)


@pytest.mark.parametrize(
    ("before", "after", "reasons"),
    [
        ([FINISHED, "READY"], [FINISHED, "ENDED/admin"], ["finished", "finished"]),
        ([FINISHED, "ENDED/lease_expired"], [FINISHED, "ENDED/lease_expired"], ["finished", "finished"]),
        # a connection that came in the last moment was cut: that is not hidden
        ([FINISHED, "READY"], [FINISHED, "ENDED/admin+"], ["finished", "admin"]),
        ([LOST, "READY"], [LOST, "ENDED/admin"], ["relay_lost", "admin"]),
        ([ABORTED, "READY"], [ABORTED, "ENDED/admin"], ["aborted_by_consumer", "finished"]),
    ],
    ids=str,
)
def test_relays_that_nothing_went_through_finish_with_the_others(
    before: list[str], after: list[str], reasons: list[str]
) -> None:
    ends = side.finished_together([report(one) for one in before], [report(one) for one in after])
    assert [end.reason for end in ends] == reasons


def test_what_cannot_be_asked_says_why() -> None:
    one = stream(2)
    reports = [side.unheard(one, one.relays[0], "gateway gw0 is away"), report("LISTENING", 1)]
    assert side.status(one, reports).message == "gateway gw0 is away"
