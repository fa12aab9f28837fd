"""One side of a stream, from what its relays say: whether it is over and why, its state, its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from scistream_flows.errors import ScistreamError
from scistream_flows.models import (
    Connections,
    Counts,
    Limiting,
    Rates,
    Reason,
    RelayStatus,
    State,
    Status,
)
from scistream_flows.registry import RelayRow, StreamRow

# How far a side has come; of several relays the least advanced one counts.
_PROGRESS: Final[tuple[State, ...]] = (
    "REQUESTED",
    "WAITING_HELLO",
    "LISTENING",
    "READY",
    "STREAMING",
    "DRAINING",
)

# So a relay with until="closed" ends that has seen all its own connections out.
_SEEN_OUT: Final[tuple[Reason, ...]] = ("finished", "aborted_by_producer", "aborted_by_consumer")


def lost(stream: StreamRow, row: RelayRow, gone: ScistreamError) -> RelayStatus:
    """What stands for the report of a relay that is gone without a word."""
    return RelayStatus(
        relay_id=row.relay_id, role=stream.key.role, state="FAILED", reason="relay_lost", message=gone.message
    )


def unheard(stream: StreamRow, row: RelayRow, message: str) -> RelayStatus:
    """What stands for the report of a relay that cannot be asked: all that is known is that it was requested."""
    return RelayStatus(relay_id=row.relay_id, role=stream.key.role, state="REQUESTED", message=message)


def is_unheard(report: RelayStatus) -> bool:
    """Whether a report is such a one; no relay says REQUESTED of itself."""
    return report.state == "REQUESTED"


def status(stream: StreamRow, reports: Sequence[RelayStatus]) -> Status:
    """One side: the sum over its relays. No report yet means that it is being opened."""
    request = stream.request
    leading = _leading(reports)
    silent = next((report.message for report in reports if is_unheard(report)), None)
    return Status(
        uid=request.uid,
        role=request.role,
        owner=stream.key.owner,
        mode=request.mode,
        state=leading.state if leading else "REQUESTED",
        reason=leading.reason if leading else None,
        message=(leading.message if leading else None) or silent,
        proof=leading.proof if leading else None,
        last_probe=leading.last_probe if leading else None,
        lease_remaining_s=_least(report.lease_remaining_s for report in reports),
        lifetime_remaining_s=_least(report.lifetime_remaining_s for report in reports),
        hello_remaining_s=_least(report.hello_remaining_s for report in reports),
        connections=Connections(
            **{
                name: sum(getattr(one.connections, name) for one in reports)
                for name in Connections.model_fields
            }
        ),
        bytes=Counts(
            **{name: sum(getattr(one.bytes, name) for one in reports) for name in Counts.model_fields}
        ),
        bits_per_s=Rates(
            **{name: sum(getattr(one.bits_per_s, name) for one in reports) for name in Rates.model_fields}
        ),
        limiting=_limiting(reports),
        listeners=stream.offer.addresses if stream.offer else [],
        relays=list(reports),
    )


def is_over(reports: Sequence[RelayStatus]) -> bool:
    """Whether a side has ended, by what its relays say.

    With until="closed" each relay ends by itself when its own connections have closed; the side goes on as long as
    another one carries, or has just carried, something. Any other end of a relay is the end of the side, but for one
    that nothing ever went through and nobody renewed.
    """
    ended = [report for report in reports if report.ended]
    spent = [report for report in ended if report.reason in _SEEN_OUT or _unused(report)]
    if len(spent) < len(ended):
        return True
    return bool(ended) and all(report.ended or _unused(report) for report in reports)


def finished_together(reports: Sequence[RelayStatus], ends: Sequence[RelayStatus]) -> Sequence[RelayStatus]:
    """How the relays of a side that is over ended: those that nothing went through have finished with the others.

    Args:
        reports: What each relay said before the rest was stopped.
        ends: How each ended.
    """
    if not any(end.reason in _SEEN_OUT for end in ends):
        return ends
    finished = {"state": "ENDED", "reason": "finished", "message": None}
    return [
        end.model_copy(update=finished) if _unused(report) and not _carried(end) else end
        for report, end in zip(reports, ends, strict=True)
    ]


def _unused(report: RelayStatus) -> bool:
    """Whether nothing went through a relay that runs, or has ended only because nobody renewed it."""
    return not is_unheard(report) and report.reason in (None, "lease_expired") and not _carried(report)


def _carried(report: RelayStatus) -> bool:
    return bool(report.connections.active or report.bytes.to_consumer or report.bytes.to_producer)


def _leading(reports: Sequence[RelayStatus]) -> RelayStatus | None:
    """The relay whose state is that of the side: once it is over the cause of that, else the least advanced one."""
    living = [report for report in reports if not report.ended]
    if not living or is_over(reports):
        ended = [report for report in reports if report.ended]
        return min(
            ended,
            # a relay that was lost is the cause; that its peer saw an abort, a consequence
            key=lambda one: (
                one.state != "FAILED",
                one.reason != "relay_lost",
                one.reason == "finished",
                one.reason == "admin",
            ),
            default=None,
        )
    living = [report for report in living if not is_unheard(report)] or living
    slowest = min(living, key=lambda report: _PROGRESS.index(report.state))
    streaming = [report for report in living if report.state == "STREAMING"]
    return streaming[0] if streaming and slowest.state == "READY" else slowest


def _limiting(reports: Sequence[RelayStatus]) -> Limiting | None:
    """The verdict of the relay that moves most."""
    known = [report for report in reports if report.limiting is not None]
    busiest = max(
        known, key=lambda one: one.bits_per_s.to_consumer + one.bits_per_s.to_producer, default=None
    )
    return busiest.limiting if busiest else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)
