"""What the five actions do: start, connect, monitor, status, release.

An operation knows the verbs of S2CS and nothing of HTTP. Its `step` is done once for `run` and again at every look at
an action that is still ACTIVE; it may be repeated at any time, also after a crash in the middle of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scistream_flows.errors import PolicyDenied
from scistream_flows.models import (
    LeaseS,
    Offer,
    Peer,
    Release,
    Renewal,
    Request,
    Role,
    Status,
    StatusQuery,
    Targets,
    Uid,
    Update,
)
from scistream_flows.s2cs import S2CS

from .records import Outcome

LEASE_S: Final = 900
"""The lease of a stream that a flow starts. The hosted Flows service looks at an action at intervals that double up to
600 s; each look renews the lease, so it must be longer than that."""

PROBE_GRACE_S: Final = 0.4
"""A probe takes some tens of milliseconds: so long `connect` looks for it before it answers ACTIVE."""

_STREAM_ID = "Names the stream, at both facilities; in a flow, take the id of the run: $._context.run_id"

I = TypeVar("I", bound=BaseModel)  # noqa: E741 - the input of an action


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StartInput(Request):
    """Open one side of a stream.

    The fields are those of the document `Request`; `stream_id` is its `uid`, `producer` its `offer`.
    """

    model_config = ConfigDict(title="start")

    uid: Uid = Field(alias="stream_id", description=_STREAM_ID)
    offer: Offer | None = Field(
        default=None, alias="producer", description="role CONS: `details.offer` of PROD's start"
    )
    lease_s: LeaseS = Field(
        default=LEASE_S,
        description="The relay ends when nothing renewed it for so many seconds: neither bytes nor a look at"
        " `connect` or `monitor`. It must be longer than the interval between two looks.",
    )

    @model_validator(mode="after")
    def _fits_its_role(self) -> StartInput:
        try:
            super()._fits_its_role()  # type: ignore[operator]  # a method at run time
        except ValueError as wrong:
            raise ValueError(str(wrong).replace("offer", "producer", 1)) from None
        return self


class _OfStream(_Input):
    stream_id: Uid = Field(description=_STREAM_ID)


class ConnectInput(_OfStream):
    """Let PROD's relay admit the relay of CONS, and wait until the way through both is proven."""

    model_config = ConfigDict(title="connect")

    role: Literal["PROD"] = "PROD"
    consumer: Offer = Field(description="`details.offer` of CONS's start")
    targets: Targets | None = Field(
        default=None, description="Where the listeners lead, if start did not say it"
    )


class Until(_Input):
    """When to stop watching. Of several, the first one counts; a stream that is over always ends it."""

    closed: bool = Field(
        default=True, description="When the stream has finished; what is over cannot be watched on"
    )
    idle_s: float | None = Field(
        default=None,
        gt=0,
        le=31_536_000,
        description="When no byte has moved for so long, after the first one",
    )
    bytes: int | None = Field(
        default=None, ge=1, le=1 << 62, description="When the stream has carried so many, in both directions"
    )
    duration_s: float | None = Field(default=None, gt=0, le=31_536_000, description="After so many seconds")


class MonitorInput(_OfStream):
    """Watch a stream, and keep its lease alive at every look."""

    model_config = ConfigDict(title="monitor")

    role: Role
    lease_s: LeaseS | None = Field(
        default=None, description="Renew the lease by so many seconds; by default those of start"
    )
    until: Until = Until()


class StatusInput(_OfStream):
    """See one side of a stream. Looking renews nothing."""

    model_config = ConfigDict(title="status")

    role: Role


class ReleaseInput(_OfStream):
    """End one side of a stream. Repeating it, or releasing what never was, is no error."""

    model_config = ConfigDict(title="release")

    role: Role


@dataclass(frozen=True, kw_only=True)
class Call(Generic[I]):
    """What a step is done with.

    Attributes:
        service: The facility.
        input: What was asked for.
        caller: The URNs of the one who asked, the effective one first.
        managers: URNs that get the owner's rights on a stream that is opened.
        monitors: URNs that may see it.
        elapsed_s: Since the action began, seconds.
        memory: Of the step before; None at the first.
    """

    service: S2CS
    input: I
    caller: Sequence[str]
    managers: Sequence[str]
    monitors: Sequence[str]
    elapsed_s: float
    memory: Mapping[str, Any] | None


class Operation(Generic[I]):
    """One of the actions.

    Attributes:
        name: Its place in the URL.
        title: For people.
        input: The model of its input.
        opens: Whether who runs it opens a stream, so that policy decides who may.
        patient: Whether it waits for a gateway that does not answer, rather than fail.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    input: type[I]
    opens: ClassVar[bool] = False
    patient: ClassVar[bool] = False

    def step(self, call: Call[I]) -> Outcome:
        """Go as far as it goes now. Raises the errors of S2CS."""
        raise NotImplementedError

    def withdraw(self, call: Call[I]) -> None:
        """Undo what was done, because the action was cancelled. By default there is nothing to undo."""


class Start(Operation[StartInput]):
    """Open one side; the result has the offer for the other one."""

    name = "start"
    title = "SciStream: open one side of a stream"
    input = StartInput
    opens = True

    def step(self, call: Call[StartInput]) -> Outcome:
        """Request the side; the same request again answers the same offer."""
        asked = call.input
        request = asked.model_dump(by_alias=False) | {
            "managers": [*asked.managers, *call.managers],
            "monitors": [*asked.monitors, *call.monitors],
        }
        offer = call.service.request(Request.model_validate(request), owner=call.caller)
        where = ", ".join(offer.addresses[:2]) + (" ..." if len(offer.addresses) > 2 else "")
        waits = asked.role == "PROD" and not asked.targets
        return Outcome(
            status="SUCCEEDED",
            display_status=f"listening at {where}",
            details={
                "stream_id": asked.uid,
                "role": asked.role,
                "state": "WAITING_HELLO" if waits else "LISTENING",
                "listeners": offer.addresses,
                "lease_remaining_s": offer.lease_remaining_s,
                "offer": offer.model_dump(mode="json"),
            },
        )

    def withdraw(self, call: Call[StartInput]) -> None:
        """Release what was opened."""
        mine = Release(uid=call.input.uid, role=call.input.role, owner=call.caller[0])
        call.service.release(mine, owner=call.caller)


class Connect(Operation[ConnectInput]):
    """Introduce CONS's relay to PROD's; ACTIVE until a probe has passed."""

    name = "connect"
    title = "SciStream: connect both sides of a stream"
    input = ConnectInput
    patient = True

    def step(self, call: Call[ConnectInput]) -> Outcome:
        """Update PROD once, then look how far it is. Each look renews the lease."""
        asked = call.input
        if call.memory is None:
            peers = [
                Peer(public_key=relay.public_key, source_addresses=relay.dial_addresses)
                for relay in asked.consumer.relays
            ]
            update = Update(uid=asked.stream_id, role="PROD", peers=peers, targets=asked.targets or None)
            status = call.service.update(update, owner=call.caller)
            deadline = time.monotonic() + PROBE_GRACE_S
            query = StatusQuery(uid=asked.stream_id, role="PROD")
            while not (status.ready or status.ended) and time.monotonic() < deadline:
                time.sleep(0.02)
                status = call.service.status(query, owner=call.caller)
        else:
            status = _renewed(call, asked.stream_id, asked.role)
        if status.ready:
            return Outcome(status="SUCCEEDED", display_status="connected", details=_snapshot(status))
        if status.ended:
            return _failed(status, "the stream has ended before it was connected")
        return Outcome(
            status="ACTIVE",
            display_status=_waits_for(status),
            details=_snapshot(status),
            memory={"connected": True},
        )


class Monitor(Operation[MonitorInput]):
    """Watch a stream; ACTIVE while it flows."""

    name = "monitor"
    title = "SciStream: monitor a stream"
    input = MonitorInput
    patient = True

    def step(self, call: Call[MonitorInput]) -> Outcome:
        """Renew the lease, and see whether what was asked for has come."""
        asked = call.input
        status = _renewed(call, asked.stream_id, asked.role, lease_s=asked.lease_s)
        memory = _movement(status, call.memory, now=time.time())
        details = _snapshot(status) | {"elapsed_s": round(call.elapsed_s, 3)}
        ended_by = _reached(asked.until, status, idle_s=memory["idle_s"], elapsed_s=call.elapsed_s)
        if ended_by is not None:
            return Outcome(
                status="SUCCEEDED",
                display_status=f"{ended_by}: {_amount(_total(status))}",
                details=details | {"ended_by": ended_by},
            )
        if status.ended:
            return _failed(
                status, "the stream has ended, but not in order", elapsed_s=round(call.elapsed_s, 3)
            )
        return Outcome(status="ACTIVE", display_status=_progress(status), details=details, memory=memory)


class Look(Operation[StatusInput]):
    """One look at a side, for flows that wait in a loop."""

    name = "status"
    title = "SciStream: status of a stream"
    input = StatusInput

    def step(self, call: Call[StatusInput]) -> Outcome:
        """See the side; a stream that has failed is a result, not a failure of the look."""
        query = StatusQuery(uid=call.input.stream_id, role=call.input.role)
        status = call.service.status(query, owner=call.caller)
        return Outcome(status="SUCCEEDED", display_status=_progress(status), details=_snapshot(status))


class End(Operation[ReleaseInput]):
    """End one side; a flow may do it without knowing how far it had come."""

    name = "release"
    title = "SciStream: release one side of a stream"
    input = ReleaseInput

    def step(self, call: Call[ReleaseInput]) -> Outcome:
        """Release the side, which nobody else is asked about."""
        asked = call.input
        released = call.service.release(Release(uid=asked.stream_id, role=asked.role), owner=call.caller)
        details: dict[str, Any] = {"stream_id": asked.stream_id, "role": asked.role, "released": True}
        if released.end is not None:
            details["final"] = _snapshot(released.end)
        said = f"released: {_amount(_total(released.end))}" if released.end else "nothing to release"
        return Outcome(status="SUCCEEDED", display_status=said, details=details)


OPERATIONS: Final[tuple[Operation[Any], ...]] = (Start(), Connect(), Monitor(), Look(), End())


# --- what is said of a stream


def _renewed(call: Call[Any], stream_id: str, role: Role, *, lease_s: int | None = None) -> Status:
    """The status, with the lease renewed; a caller who may only monitor the stream renews nothing."""
    try:
        return call.service.renew(Renewal(uid=stream_id, role=role, lease_s=lease_s), owner=call.caller)
    except PolicyDenied as denied:
        if denied.which == "lease_s":
            raise
    return call.service.status(StatusQuery(uid=stream_id, role=role), owner=call.caller)


def _snapshot(status: Status) -> dict[str, Any]:
    """The status in one level. No key is called like a method of a dict: expressions of flows could not read it."""
    limiting = status.limiting
    values = {
        "stream_id": status.uid,
        "role": status.role,
        "mode": status.mode,
        "state": status.state,
        "reason": status.reason,
        "message": status.message,
        "proof": status.proof,
        "bytes": _total(status),
        "bytes_to_consumer": status.bytes.to_consumer,
        "bytes_to_producer": status.bytes.to_producer,
        "bits_per_s": round(_rate(status)),
        "connections": status.connections.active,
        "connections_total": status.connections.total,
        "connections_refused": status.connections.refused,
        "connections_aborted": status.connections.aborted,
        "limiting": limiting.leg if limiting else None,
        "limiting_share": limiting.share if limiting else None,
        "lease_remaining_s": status.lease_remaining_s,
        "lifetime_remaining_s": status.lifetime_remaining_s,
        "hello_remaining_s": status.hello_remaining_s,
    }
    return {name: value for name, value in values.items() if value is not None}


def _failed(status: Status, what: str, **more: Any) -> Outcome:
    reason = status.reason or "failed"
    words = f"{what}: {reason}" + (f" ({status.message})" if status.message else "")
    last_probe = _probe(status)
    if last_probe:
        words += f"; the last probe said: {last_probe}"
    return Outcome(
        status="FAILED",
        display_status=f"failed: {reason}",
        details=_snapshot(status) | more | {"code": reason, "description": words},
    )


def _waits_for(status: Status) -> str:
    if status.state == "WAITING_HELLO":
        return "waiting for hello"
    return f"probing: {_probe(status)}" if _probe(status) else "waiting for the first probe"


def _probe(status: Status) -> str:
    probe = status.last_probe
    if probe is None or probe.result in (None, "ok"):
        return ""
    return " ".join(one for one in (probe.result, probe.errno, probe.address) if one)


def _progress(status: Status) -> str:
    said = f"{status.state.lower().replace('_', ' ')}: {_amount(_total(status))}"
    if status.ended:
        return f"{said}, {status.reason}"
    if _rate(status) > 0:
        said += f", {_amount(_rate(status) / 8)}/s"
        if status.limiting and status.limiting.leg:
            said += f", limited by {_LEGS.get(status.limiting.leg) or status.limiting.leg.replace('_', ' ')}"
    return said


_LEGS: Final = {
    "wan": "the WAN",
    "producer_lan": "the producer's LAN",
    "consumer_lan": "the consumer's LAN",
    "producer_application": "the producer",
    "consumer_application": "the consumer",
    "producer": "the producer's side",
    "consumer": "the consumer's side",
    "relay": "the relay",
    "upstream": "the other side",
}


def _amount(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _total(status: Status) -> int:
    return status.bytes.to_consumer + status.bytes.to_producer


def _rate(status: Status) -> float:
    return status.bits_per_s.to_consumer + status.bits_per_s.to_producer


# --- when a monitor has seen enough


def _movement(status: Status, memory: Mapping[str, Any] | None, *, now: float) -> dict[str, Any]:
    """How long nothing has moved, as far as the looks can tell: they see counts, not moments."""
    seen = memory or {}
    total = _total(status)
    moved = seen.get("bytes") != total or _rate(status) > 0
    still_since = now if moved else float(seen["still_since"])
    return {"bytes": total, "still_since": still_since, "idle_s": now - still_since if total else 0.0}


def _reached(until: Until, status: Status, *, idle_s: float, elapsed_s: float) -> str | None:
    """What ended the watch, or None while it goes on."""
    if status.state == "ENDED" and status.reason == "finished":
        return "closed"
    if until.bytes is not None and _total(status) >= until.bytes:
        return "bytes"
    if status.ended:
        return None
    if until.idle_s is not None and idle_s >= until.idle_s:
        return "idle"
    if until.duration_s is not None and elapsed_s >= until.duration_s:
        return "duration"
    return None
