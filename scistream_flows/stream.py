"""Open a stream between two facilities, keep it, see it, end it.

There is one implementation, synchronous; the asynchronous door runs it in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

from scistream_flows.errors import (
    PROTOCOL,
    FacilityUnreachable,
    GatewayUnreachable,
    NotFound,
    ScistreamError,
    StreamFailed,
    StreamNotReady,
    WaitTimeout,
)
from scistream_flows.facility import Facility, connect_facility
from scistream_flows.models import (
    Counts,
    Hello,
    Limiting,
    Mode,
    Offer,
    Peer,
    Probe,
    Rates,
    Reason,
    Release,
    Renewal,
    Request,
    Role,
    Status,
    StatusQuery,
    Ticket,
    TicketRequest,
    Update,
    read,
)

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

log = logging.getLogger(__name__)

FIRST_POLL_S: Final = 0.01
LONGEST_POLL_S: Final = 0.25
SAY_WHY_AFTER_S: Final = 3.0
ROLES: Final[tuple[Role, ...]] = ("PROD", "CONS")

OnProgress: TypeAlias = "Callable[[Progress], object]"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of opening a stream.

    Attributes:
        step: `request-prod`, `request-cons`, `connect`, `probe` (repeated), `ready`.
        elapsed_s: Seconds since the beginning.
        status: The latest status of CONS while probing.
    """

    step: str
    elapsed_s: float
    status: Status | None = None


@dataclass(frozen=True, kw_only=True)
class StreamStatus:
    """Both sides at one moment.

    Attributes:
        uid: The stream's name.
        prod: The producer's side.
        cons: The consumer's side.
        bytes: Payload delivered: per direction, as the relay nearest to the receiver counts.
        bits_per_s: The same as a rate.
        limiting: The leg that limits, from both relays' verdicts; None while nothing moves.
    """

    uid: str
    prod: Status
    cons: Status
    bytes: Counts
    bits_per_s: Rates
    limiting: Limiting | None

    @property
    def ready(self) -> bool:
        """Whether both sides are proven."""
        return self.prod.ready and self.cons.ready

    @property
    def ended(self) -> bool:
        """Whether both sides are over."""
        return self.prod.ended and self.cons.ended


@dataclass(frozen=True, kw_only=True)
class StreamEnd:
    """How both sides of a stream ended."""

    uid: str
    prod: Status
    cons: Status

    @property
    def reasons(self) -> dict[Role, Reason | None]:
        """The typed reason per role."""
        return {"PROD": self.prod.reason, "CONS": self.cons.reason}

    @property
    def in_order(self) -> bool:
        """Whether neither side failed."""
        return "FAILED" not in (self.prod.state, self.cons.state)

    def check(self) -> StreamEnd:
        """Answer itself when the stream ended in order.

        Raises:
            StreamFailed: With the reason of the side that failed.
        """
        for side in (self.prod, self.cons):
            if side.state == "FAILED":
                raise StreamFailed(
                    f"stream {self.uid!r} failed at {side.role}: {side.reason}"
                    + (f" ({side.message})" if side.message else ""),
                    which=self.uid,
                    hint="What was delivered may be incomplete",
                    role=side.role,
                    reason=side.reason,
                )
        return self


class Stream:
    """An open stream. As a context manager it renews its lease while the block runs, and releases both sides after it.

    Without `with`, call `renew` more often than every `lease_s` seconds unless data flows, and `release` at the end.
    """

    def __init__(
        self,
        *,
        uid: str,
        facilities: dict[Role, Facility],
        offers: dict[Role, Offer],
        lease_s: int,
        linger_s: int,
        closing: contextlib.ExitStack,
    ) -> None:
        self._facilities = facilities
        self._lease_s = lease_s
        self._linger_s = linger_s
        self._closing = closing
        self._block_left = threading.Event()
        self._renewer: threading.Thread | None = None
        self.uid = uid
        self.offers = offers

    @property
    def listeners(self) -> list[str]:
        """Where the consumer's application connects, IP and port of each listener of the stream."""
        return self.offers["CONS"].addresses

    @property
    def mode(self) -> Mode:
        """The protection on the WAN."""
        return self.offers["CONS"].mode

    def status(self) -> StreamStatus:
        """Both sides now.

        Raises:
            NotFound: The stream ended long ago, and is forgotten.
        """
        prod, cons = (self._side(role) for role in ROLES)
        return StreamStatus(
            uid=self.uid,
            prod=prod,
            cons=cons,
            bytes=Counts(to_consumer=cons.bytes.to_consumer, to_producer=prod.bytes.to_producer),
            bits_per_s=Rates(
                to_consumer=cons.bits_per_s.to_consumer, to_producer=prod.bits_per_s.to_producer
            ),
            limiting=limiting_leg(prod.limiting, cons.limiting),
        )

    def ticket(self, role: Role, *, networks: Sequence[str] = (), expires_s: int | None = None) -> Ticket:
        """A ticket for an application whose node is not known yet: it says hello with it, by `say_hello`, once.

        It is a secret, until it is used: who has it, and is within its networks, can take the application's place.

        Args:
            role: `CONS` for the application that connects, `PROD` for the one that listens.
            networks: Where it may be used, such as those of a cluster's nodes. Empty: all that the policy has for it.
            expires_s: Seconds for which it counts; by default an hour, or what the policy allows of it.

        Raises:
            NotFound: The stream has ended.
            PolicyDenied: What is asked for is not within the policy.
        """
        wish = {
            "protocol": PROTOCOL,
            "uid": self.uid,
            "role": role,
            "networks": list(networks),
            "expires_s": expires_s,
        }
        return self._facilities[role].ticket(read(TicketRequest, wish))

    def hello(self, role: Role, *, targets: Sequence[str] = (), consumers: Sequence[str] = ()) -> Offer:
        """Say where an application is: of PROD its `targets`, of CONS networks that may connect in addition.

        Raises:
            NotFound: The stream has ended.
            PolicyDenied: The facility's allow-lists do not have it.
        """
        said = {"protocol": PROTOCOL, "uid": self.uid, "role": role}
        lists = {"targets": list(targets), "consumers": list(consumers)}
        return self._facilities[role].hello(read(Hello, {**said, **lists}))

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until both sides are READY: after `open_stream` without targets, somebody has to say hello at PROD.

        Raises:
            StreamNotReady: With `leg` and `reason`. The stream goes on, until its `hello_timeout_s`.
        """
        _until_ready(self.uid, self._facilities, time.monotonic() + timeout_s, lambda _: None)

    def renew(self) -> None:
        """Renew the lease of both sides by the `lease_s` seconds of the request."""
        for role in ROLES:
            self._facilities[role].renew(Renewal(uid=self.uid, role=role))

    def wait(self, timeout_s: float | None = None) -> StreamEnd:
        """Wait until the stream has ended; the lease is renewed meanwhile.

        When one side has ended and the other does not follow, the other is released: half a stream is none.

        Args:
            timeout_s: Seconds to wait; None waits as long as the stream lives.

        Raises:
            WaitTimeout: The stream goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        renew_at = time.monotonic() + self._lease_s / 3
        give_up_at: float | None = None
        for pause_s in _pauses():
            sides = {role: self._side(role) for role in ROLES}
            now = time.monotonic()
            if all(side.ended for side in sides.values()):
                return StreamEnd(uid=self.uid, prod=sides["PROD"], cons=sides["CONS"])
            if any(side.ended for side in sides.values()) and give_up_at is None:
                failed = any(side.state == "FAILED" for side in sides.values())
                give_up_at = now + (1.0 if failed else self._linger_s + 5.0)
            if give_up_at is not None and now >= give_up_at:
                return self.release()
            if deadline is not None and now >= deadline:
                raise WaitTimeout(
                    f"stream {self.uid!r} has not ended within {timeout_s:g} s",
                    which=self.uid,
                    hint="Wait longer, or release it",
                )
            if self._renewer is None and give_up_at is None and now >= renew_at:
                self.renew()
                renew_at = now + self._lease_s / 3
            time.sleep(pause_s if deadline is None else max(0.0, min(pause_s, deadline - now)))
        raise AssertionError("unreachable")

    def release(self) -> StreamEnd:
        """End both sides, leaving no relay. Repeating it is no error.

        Raises:
            ScistreamError: When a side could not be released; the other one is. Its relay ends by its lease.
        """
        ends = _release(self.uid, self._facilities)
        for role in ROLES:
            end = ends[role]
            if isinstance(end, BaseException):
                raise end
        prod, cons = (ends[role] for role in ROLES)
        if not isinstance(prod, Status) or not isinstance(cons, Status):
            raise NotFound(f"stream {self.uid!r} ended long ago and is forgotten", which=self.uid)
        return StreamEnd(uid=self.uid, prod=prod, cons=cons)

    def close(self) -> None:
        """Give back the connections to facilities that `open_stream` made. The stream lives on."""
        self._closing.close()

    def __enter__(self) -> Stream:
        self._block_left.clear()
        self._renewer = threading.Thread(target=self._keep_renewing, name=f"renew {self.uid}", daemon=True)
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block_left.set()
        try:
            self.release()
        except NotFound:
            log.debug("stream %s was forgotten before it was released", self.uid)
        except ScistreamError as wrong:
            if error is None:
                raise
            log.warning("after %r: %s", error, wrong)  # the block's own error is the one to see
        finally:
            if self._renewer is not None:
                self._renewer.join()
                self._renewer = None
            self.close()

    def _keep_renewing(self) -> None:
        while not self._block_left.wait(self._lease_s / 3):
            self._renew_or_warn()

    def _renew_or_warn(self) -> None:
        try:
            self.renew()
        except ScistreamError as wrong:  # the next turn tries again
            log.warning("stream %s was not renewed: %s", self.uid, wrong)

    def _side(self, role: Role) -> Status:
        return self._facilities[role].status(StatusQuery(uid=self.uid, role=role))


def open_stream(
    producer: str | Facility,
    consumer: str | Facility,
    *,
    targets: Sequence[str],
    consumers: Sequence[str] = (),
    uid: str | None = None,
    mode: Mode = "tls",
    num_conn: int = 1,
    gateways: int = 1,
    rate_mbits_per_s: int = 0,
    lease_s: int = 60,
    lifetime_s: int = 86_400,
    hello_timeout_s: int = 180,
    ready_timeout_s: float = 60,
    until: Literal["closed", "released"] = "closed",
    linger_s: int = 5,
    probe: Literal["target", "path"] = "target",
    on_progress: OnProgress | None = None,
) -> Stream:
    """Open a stream and return when both sides are READY; without targets, when both relays know each other.

    Args:
        producer: The facility of the application that listens, such as `local:aps`.
        consumer: The facility of the application that connects.
        targets: `host:port` of the listening application as its facility sees it; `[IPv6]:port` for IPv6. Empty: it is
            not known yet. It says hello, with a `ticket` of the stream, and `wait_ready` waits for it.
        consumers: Networks of the connecting application; empty allows loopback at the consumer's gateway only.
        uid: The stream's name; by default a new random one.
        mode: `tls`, `auth` (proven peers, clear text) or `none`.
        num_conn: Listeners per side, 1 to 256.
        gateways: Gateways per side that carry them, 1 to 16; listener i is on the (i mod gateways)-th.
        rate_mbits_per_s: Payload Mbit/s per direction, reserved; 0 is best effort.
        lease_s: Seconds after which a side ends that nothing renews.
        lifetime_s: The hard end, seconds.
        hello_timeout_s: Seconds until a relay must be ready, or it ends itself.
        ready_timeout_s: Seconds to wait here for READY.
        until: `closed` ends the stream after its last connection, `released` by `release` or lease only.
        linger_s: With `closed`: seconds without a connection until the stream has finished.
        probe: Whether READY is proven to the `target`, or on the `path` between the facilities only.
        on_progress: Called with each step, from this thread.

    Raises:
        StreamNotReady: With `leg` and `reason`; no relay is left.
        ScistreamError: What a facility refused, and why; no relay is left.
    """
    common = {
        "protocol": PROTOCOL,
        "uid": uid or f"stream-{secrets.token_hex(8)}",
        "mode": mode,
        "num_conn": num_conn,
        "gateways": gateways,
        "rate_mbits_per_s": rate_mbits_per_s,
        "lease_s": lease_s,
        "lifetime_s": lifetime_s,
        "hello_timeout_s": hello_timeout_s,
        "until": until,
        "linger_s": linger_s,
        "probe": probe,
    }
    prod_request = read(Request, {**common, "role": "PROD", "targets": list(targets)})
    began = time.monotonic()

    def tell(step: str, status: Status | None = None) -> None:
        if on_progress is not None:
            on_progress(Progress(step=step, elapsed_s=time.monotonic() - began, status=status))

    with contextlib.ExitStack() as closing:
        facilities: dict[Role, Facility] = {
            "PROD": _connected(producer, closing),
            "CONS": _connected(consumer, closing),
        }
        to_release: dict[Role, Facility] = {}
        try:
            tell("request-prod")
            prod = _request(prod_request, facilities, to_release)
            tell("request-cons")
            cons_request = read(
                Request,
                {
                    **common,
                    "role": "CONS",
                    "consumers": list(consumers),
                    "offer": prod.model_dump(mode="json"),
                },
            )
            cons = _request(cons_request, facilities, to_release)
            tell("connect")
            peers = [
                Peer(public_key=relay.public_key, source_addresses=relay.dial_addresses)
                for relay in cons.relays
            ]
            updated = facilities["PROD"].update(Update(uid=prod.uid, role="PROD", peers=peers))
            if prod_request.targets:
                deadline = began + ready_timeout_s
                _until_ready(
                    prod.uid, facilities, deadline, lambda status: tell("probe", status), prod=updated
                )
                tell("ready")
        except BaseException:
            for role, end in _release(prod_request.uid, to_release).items():
                if isinstance(end, Exception):
                    log.warning(
                        "stream %s: %s was not released, its lease ends it: %s", prod_request.uid, role, end
                    )
            raise
        return Stream(
            uid=prod.uid,
            facilities=facilities,
            offers={"PROD": prod, "CONS": cons},
            lease_s=lease_s,
            linger_s=linger_s,
            closing=closing.pop_all(),
        )


class StreamOptions(TypedDict, total=False):
    """The keywords of `open_stream`."""

    targets: Required[Sequence[str]]
    consumers: Sequence[str]
    uid: str | None
    mode: Mode
    num_conn: int
    gateways: int
    rate_mbits_per_s: int
    lease_s: int
    lifetime_s: int
    hello_timeout_s: int
    ready_timeout_s: float
    until: Literal["closed", "released"]
    linger_s: int
    probe: Literal["target", "path"]
    on_progress: OnProgress | None


@contextlib.asynccontextmanager
async def aopen_stream(
    producer: str | Facility, consumer: str | Facility, **options: Unpack[StreamOptions]
) -> AsyncIterator[Stream]:
    """Open a stream without blocking the loop; a context manager that takes the keywords of `open_stream`.

    A cancellation releases both sides, while opening as well as in the block. The methods of `stream` are those of the
    synchronous door and block: call the long ones as `await asyncio.to_thread(stream.wait)`. `on_progress` is called
    from another thread.

    Raises:
        StreamNotReady: With `leg` and `reason`; no relay is left.
        ScistreamError: What a facility refused, and why; no relay is left.
    """
    # One thread for the whole life: what is submitted to it later runs after what came before, cancelled or not.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
    cancelled = threading.Event()
    context = contextvars.copy_context()
    context.run(_CANCELLED.set, cancelled)
    opening = executor.submit(partial(context.run, partial(open_stream, producer, consumer, **options)))
    try:
        try:
            stream = await asyncio.shield(asyncio.wrap_future(opening))
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.shield(asyncio.wrap_future(executor.submit(_drop, opening)))
            raise
        stream.__enter__()
        try:
            yield stream
        finally:
            leaving = executor.submit(stream.__exit__, *sys.exc_info())
            await asyncio.shield(asyncio.wrap_future(leaving))
    finally:
        executor.shutdown(wait=False)


# Set by the asynchronous door: opening stops at its next step.
_CANCELLED: ContextVar[threading.Event | None] = ContextVar("scistream_cancelled", default=None)


def limiting_leg(prod: Limiting | None, cons: Limiting | None) -> Limiting | None:
    """The leg that limits the stream, from the verdicts of its two relays; None when they do not tell.

    The relay that sends into the WAN sees its own side and the WAN, and knows only that the far side does not take
    more. The one that receives knows only that it is starved (`upstream`), but sees in its own side which part it is.
    """
    if prod is None or cons is None or prod.leg is None or cons.leg is None:
        only = prod if prod is not None and prod.leg is not None else cons
        return None if only is None or only.leg in (None, "upstream") else only
    to_consumer = "to_producer" not in (prod.direction, cons.direction)
    sender, receiver, far_side = (prod, cons, "consumer") if to_consumer else (cons, prod, "producer")
    if (
        receiver.leg == "upstream" and sender.leg == far_side
    ):  # each points at the other: it lies between them
        return sender.model_copy(update={"leg": "wan"})
    if receiver.leg == "upstream":
        return sender
    if sender.leg == far_side:
        return receiver
    return max(sender, receiver, key=lambda verdict: verdict.share or 0.0)


def _connected(facility: str | Facility, closing: contextlib.ExitStack) -> Facility:
    if not isinstance(facility, str):
        return facility
    connected = connect_facility(facility)
    closing.callback(connected.close)
    return connected


def _request(request: Request, facilities: dict[Role, Facility], to_release: dict[Role, Facility]) -> Offer:
    """Ask for one side. It is released later unless the facility said no: then a stream of this name is another one."""
    to_release[request.role] = facilities[request.role]
    try:
        return facilities[request.role].request(request)
    except (FacilityUnreachable, GatewayUnreachable):  # what was done is unknown
        raise
    except ScistreamError:
        del to_release[request.role]
        raise


def _until_ready(
    uid: str,
    facilities: dict[Role, Facility],
    deadline: float,
    tell: Callable[[Status], None],
    *,
    prod: Status | None = None,
) -> None:
    """Wait until both sides are READY. `prod` is known already; READY, it is asked again after a second only."""
    cancelled = _CANCELLED.get() or threading.Event()
    silent_until = time.monotonic() + SAY_WHY_AFTER_S
    said = ""
    probe: Probe | None = None
    asked_at = time.monotonic()
    for pause_s in _pauses():
        cons = facilities["CONS"].status(StatusQuery(uid=uid, role="CONS"))
        lately = time.monotonic() - asked_at < 1
        if prod is None or not (prod.ready and (cons.ready or lately)):
            prod = facilities["PROD"].status(StatusQuery(uid=uid, role="PROD"))
            asked_at = time.monotonic()
        probe = cons.last_probe or prod.last_probe or probe  # a side that has ended does not tell it any more
        tell(cons)
        if cons.ready and prod.ready:
            return
        left_s = deadline - time.monotonic()
        if cons.ended or prod.ended or left_s <= 0:
            raise _not_ready(uid, prod, cons, probe)
        if time.monotonic() >= silent_until and said != (why := _not_ready(uid, prod, cons, probe).message):
            # the application may only be late, so this is no error yet; but nobody should wait a minute to learn why
            log.warning("still waiting, %.0f s more: %s", left_s, why)
            said = why
        if cancelled.wait(min(pause_s, left_s)):
            raise StreamNotReady(
                f"opening stream {uid!r} was cancelled", which=uid, leg="", reason="cancelled"
            )


def _not_ready(uid: str, prod: Status, cons: Status, probe: Probe | None) -> StreamNotReady:
    result = (probe.result if probe else None) or "no-answer"
    errno = f" ({probe.errno})" if probe and probe.errno else ""
    dialled = f" at {probe.address}" if probe and probe.address else ""
    known = dict.fromkeys(target for relay in prod.relays for target in relay.targets)
    targets = ", ".join(known) or "none given"
    if "relay_lost" in (prod.reason, cons.reason):
        side, leg = (
            ("producer", "producer-lan") if prod.reason == "relay_lost" else ("consumer", "consumer-lan")
        )
        reason, words, hint = (
            "relay_lost",
            f"the {side}'s relay was killed",
            "Look at its gateway, and open again",
        )
    elif result == "unreachable" or "target_unreachable" in (prod.reason, cons.reason):
        leg, reason = "producer-lan", "unreachable"
        words = f"the producer's relay cannot connect to its target {targets}{errno}"
        hint = "Start the application that listens there, or correct targets"
    elif prod.state == "WAITING_HELLO":
        leg, reason, words = "producer-lan", "no-target", "no target was named"
        hint = "Give targets, or say hello at the producer's facility"
    elif (prod.ended or cons.ended) and not (
        probe and probe.result != "ok" and "hello_timeout" in (prod.reason, cons.reason)
    ):
        over = prod if prod.ended else cons
        leg = "producer-lan" if over is prod else "consumer-lan"
        reason, words = str(over.reason), f"{over.role} ended: {over.message or over.reason}"
        hint = "Open it again, with longer times if it ran out of them"
    else:
        leg, reason = "wan", result
        words = f"the consumer's relay cannot reach the producer's{dialled}: {result}{errno}"
        hint = "Look at firewall and advertised addresses between the two gateways"
    return StreamNotReady(
        f"stream {uid!r} is not ready: {words}",
        which=uid,
        hint=hint,
        leg=leg,
        reason=reason,
        errno=probe.errno if probe else None,
    )


def _release(uid: str, facilities: dict[Role, Facility]) -> dict[Role, Status | Exception | None]:
    """Release the sides at the same time; answers the end of each, or why it could not be released.

    In threads that are no daemons: a second Ctrl-C ends the waiting, not the releasing.
    """
    ends: dict[Role, Status | Exception | None] = {}

    def release(role: Role) -> None:
        try:
            ends[role] = facilities[role].release(Release(uid=uid, role=role)).end
        except Exception as wrong:  # noqa: BLE001 - handed to the caller
            ends[role] = wrong

    threads = [
        threading.Thread(target=release, args=(role,), name=f"release {uid} {role}") for role in facilities
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def _drop(opening: Future[Stream]) -> None:
    """Release what was opened although nobody waits for it any more."""
    if opening.exception() is None:
        opening.result().__exit__(None, None, None)


def _pauses() -> Iterator[float]:
    pause_s = FIRST_POLL_S
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, LONGEST_POLL_S)
