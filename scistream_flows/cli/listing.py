"""Streams as rows of a table, the same in every command."""

from __future__ import annotations

from collections.abc import Sequence

from scistream_flows.cli.console import in_time, in_units, plain, put_table, say
from scistream_flows.models import Limiting, Status

HEADINGS = (
    *("UID", "ROLE", "STATE", "MODE", "TO CONSUMER", "TO PRODUCER", "CONNECTIONS", "LEASE", "LIMITED BY"),
    *("GATEWAYS", "OWNER"),
)


def put_streams(streams: Sequence[Status]) -> None:
    """A table of streams on stdout; what there is to say about one that goes on, on stderr."""
    put_table(
        HEADINGS, [_row(one) for one in sorted(streams, key=lambda one: (one.uid, one.owner, one.role))]
    )
    for one in streams:
        if one.message and not one.ended:
            say(plain(f"{one.uid} ({one.role}): {one.message}"))


def _row(status: Status) -> Sequence[str]:
    over = status.ended
    gateways = dict.fromkeys(relay.gateway for relay in status.relays if relay.gateway)
    return [
        status.uid,
        status.role,
        f"{status.state} {status.reason}" if status.reason else status.state,
        status.mode,
        "-" if over else in_units(status.bits_per_s.to_consumer, "bit/s"),
        "-" if over else in_units(status.bits_per_s.to_producer, "bit/s"),
        "-" if over else str(status.connections.active),
        "-" if over or status.lease_remaining_s is None else in_time(status.lease_remaining_s),
        "-" if over else leg_in_words(status.limiting) or "-",
        ",".join(gateways) or "-",
        status.owner,
    ]


def leg_in_words(limiting: Limiting | None) -> str:
    """The leg that limits, such as `consumer application`; empty when nothing tells."""
    return (limiting.leg or "").replace("_", " ") if limiting else ""


def end_in_words(status: Status) -> str:
    """How one side has ended, and what went through it."""
    there, back = status.bytes.to_consumer, status.bytes.to_producer
    return (
        f"{status.uid} ({status.role}) of {status.owner} has ended: {in_units(there, 'B')} to the consumer,"
        f" {in_units(back, 'B')} to the producer"
    )
