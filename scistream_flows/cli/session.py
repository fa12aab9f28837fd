"""The sides of one stream, asked for one after the other: maybe by two people, maybe on two machines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from scistream_flows.cli.ledger import Entry, Ledger, Place
from scistream_flows.cli.pin import Named, offer_at, peers_of
from scistream_flows.cli.place import connect
from scistream_flows.errors import (
    PROTOCOL,
    NotFound,
    PolicyDenied,
    ScistreamError,
    StreamFailed,
    WaitTimeout,
)
from scistream_flows.facility import Facility
from scistream_flows.models import (
    Hello,
    Offer,
    Peer,
    Release,
    Released,
    Renewal,
    Request,
    Role,
    Status,
    StatusQuery,
    Update,
    read,
)
from scistream_flows.stream import ROLES

FIRST_POLL_S: Final = 0.05
LONGEST_POLL_S: Final = 1.0

# What we ask for when nobody has said otherwise gives way to a facility that allows less.
_GIVES_WAY: Final = ("lease_s", "lifetime_s", "hello_timeout_s")


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """CONS's side as it was opened; `told` is whether PROD was told of its relays."""

    offer: Offer
    prod: Offer
    told: bool
    refusal: str = ""

    @property
    def peers(self) -> Sequence[Peer]:
        """Its relays, as PROD has to be told of them."""
        return peers_of(self.offer)


class Session:
    """One stream of this user."""

    def __init__(self, uid: str, *, ledger: Ledger | None = None) -> None:
        self.uid = uid
        self._ledger = ledger or Ledger()

    # --- opening

    @contextlib.contextmanager
    def producer(
        self, where: Place, *, wish: Mapping[str, Any], targets: Sequence[str], chosen: Collection[str]
    ) -> Iterator[tuple[Facility, Offer]]:
        """PROD's side, opened; it is released again when the block raises, unless it was open before.

        Args:
            where: The facility.
            wish: The fields of the request that both sides have.
            targets: Where the application listens; empty waits for a hello.
            chosen: The names of the fields that the user has chosen.
        """
        document = {**wish, "uid": self.uid, "role": "PROD", "targets": list(targets)}
        with self._opened(where, document, chosen) as opened:
            yield opened

    @contextlib.contextmanager
    def consumer(
        self,
        where: Place,
        *,
        listeners: Sequence[Named],
        wish: Mapping[str, Any],
        chosen: Collection[str],
        consumers: Sequence[str],
        says_hello: bool,
    ) -> Iterator[tuple[Facility, Consumer]]:
        """CONS's side, opened; PROD is told of it where this user knows how. It is released when the block raises.

        Args:
            where: The facility.
            listeners: Those of PROD.
            wish: The fields of the request that both sides have.
            chosen: The names of the fields that the user has chosen.
            consumers: Networks that may connect.
            says_hello: Let in where this call comes from, too.
        """
        record = self._ledger.find(self.uid)
        known = record.sides.get("PROD") if record else None
        mode = wish["mode"] if "mode" in chosen or known is None else known.offer.mode
        prod = offer_at(listeners, uid=self.uid, mode=mode, known=known.offer if known else None)
        document = {
            **wish,
            "uid": self.uid,
            "role": "CONS",
            "mode": mode,
            "consumers": list(consumers),
            "offer": prod.model_dump(mode="json"),
        }
        with self._opened(where, document, chosen) as (facility, offer):
            refusal = _hello(facility, self.uid) if says_hello else ""
            if known is not None:
                self._tell(known.place, peers_of(offer))
            yield facility, Consumer(offer=offer, prod=prod, told=known is not None, refusal=refusal)

    def update(self, peers: Sequence[Peer], *, where: Place | None = None) -> Status:
        """Tell PROD of the relays of CONS.

        Raises:
            NotFound: When there is no such stream.
        """
        return self._tell(where or self._place("PROD"), peers)

    def _tell(self, where: Place, peers: Sequence[Peer]) -> Status:
        with contextlib.closing(connect(where)) as facility:
            return facility.update(Update(uid=self.uid, role="PROD", peers=list(peers)))

    @contextlib.contextmanager
    def _opened(
        self, where: Place, document: Mapping[str, Any], chosen: Collection[str]
    ) -> Iterator[tuple[Facility, Offer]]:
        role: Role = document["role"]
        record = self._ledger.find(self.uid)
        known = record.sides.get(role) if record else None
        offer: Offer | None = None
        with contextlib.closing(connect(where)) as facility:
            try:
                offer = _requested(facility, document, chosen)
                self._ledger.keep(self.uid, role, Entry(place=where, offer=offer))
                yield facility, offer
            except BaseException as wrong:
                said_no = isinstance(wrong, ScistreamError) and offer is None
                # who reads no further, such as `| head -2`, has read what he wanted
                read_enough = isinstance(wrong, BrokenPipeError)
                if not said_no and not read_enough and not _was_there(known, offer):
                    # what cannot be reached now, its lease ends
                    with contextlib.suppress(ScistreamError):
                        facility.release(Release(uid=self.uid, role=role))
                        self._ledger.forget(self.uid, role)
                raise

    # --- later

    def places(self, where: Place | None = None) -> Mapping[Role, Place]:
        """Where the sides are: at the place that is named, or where this user has opened them.

        Raises:
            NotFound: When neither is known.
        """
        if where is not None:
            return dict.fromkeys(ROLES, where)
        record = self._ledger.find(self.uid)
        if record is None:
            raise NotFound(
                f"this user has opened no stream {self.uid!r} here",
                which=self.uid,
                hint="Name its facility with --s2cs",
            )
        return {role: record.sides[role].place for role in ROLES if role in record.sides}

    def _place(self, role: Role) -> Place:
        place = self.places().get(role)
        if place is None:
            raise NotFound(
                f"this user has not opened the {role} side of {self.uid!r} here",
                which=self.uid,
                hint="Name its facility with --s2cs",
            )
        return place

    def release(self, where: Place | None, *, roles: Sequence[Role]) -> list[Released]:
        """End the sides, all of them even if one fails.

        Raises:
            ScistreamError: Why the first one could not be ended.
        """
        released: list[Released] = []
        failure: ScistreamError | None = None
        for role, place in self.places(where).items():
            if role not in roles:
                continue
            try:
                with contextlib.closing(connect(place)) as facility:
                    released.append(facility.release(Release(uid=self.uid, role=role)))
                record = self._ledger.find(self.uid)
                known = record.sides.get(role) if record else None
                if known is not None and (where is None or known.place.address == place.address):
                    self._ledger.forget(self.uid, role)
            except ScistreamError as wrong:
                failure = failure or wrong
        if failure is not None:
            raise failure
        return released


class Sight:
    """The sides of a stream, seen again and again over the same connections."""

    def __init__(self, uid: str, places: Mapping[Role, Place]) -> None:
        self.uid = uid
        self._closing = contextlib.ExitStack()
        self._facilities: dict[Role, Facility] = {}
        try:
            by_place: dict[Place, Facility] = {}
            for role, where in places.items():
                if where not in by_place:
                    by_place[where] = connect(where)
                    self._closing.callback(by_place[where].close)
                self._facilities[role] = by_place[where]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sight:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._closing.close()

    def look(self) -> dict[Role, Status]:
        """Each side that is there.

        Raises:
            NotFound: When none is.
        """
        return self._each(lambda facility, role: facility.status(StatusQuery(uid=self.uid, role=role)))

    def renew(self, lease_s: int | None = None) -> dict[Role, Status]:
        """Renew the lease of each side that is there.

        Raises:
            NotFound: When none is.
        """
        return self._each(
            lambda facility, role: facility.renew(Renewal(uid=self.uid, role=role, lease_s=lease_s))
        )

    def _each(self, ask: Callable[[Facility, Role], Status]) -> dict[Role, Status]:
        answers = {role: _or_missing(facility, role, ask) for role, facility in self._facilities.items()}
        found = {role: one for role, one in answers.items() if isinstance(one, Status)}
        if not found:
            raise next(one for one in answers.values() if isinstance(one, NotFound))
        return found


def _or_missing(facility: Facility, role: Role, ask: Callable[[Facility, Role], Status]) -> Status | NotFound:
    try:
        return ask(facility, role)
    except NotFound as missing:
        return missing


def await_hello(facility: Facility, uid: str, *, timeout_s: float, tell: Callable[[str], object]) -> Status:
    """Wait until PROD's application has said where it is.

    Raises:
        WaitTimeout: It has not, in this time.
        StreamFailed: The stream has ended meanwhile.
    """
    deadline = time.monotonic() + timeout_s
    for pause_s in pauses():
        status = facility.status(StatusQuery(uid=uid, role="PROD"))
        if not status.ended and status.state not in ("REQUESTED", "WAITING_HELLO"):
            return status
        left_s = deadline - time.monotonic()
        if left_s <= 0 or status.reason == "hello_timeout":
            raise WaitTimeout(
                f"no hello has come for stream {uid!r} within {timeout_s:g} s",
                which=uid,
                hint=f"While this waits, run at the application: appctrl create-appctrl {uid} S2CS - PROD",
            )
        if status.ended:
            raise StreamFailed(
                f"stream {uid!r} has ended before a hello came: {status.reason}",
                which=uid,
                hint="Request it again",
                reason=status.reason,
            )
        tell(f"waiting for hello message, {left_s:.0f} s more")
        time.sleep(min(pause_s, left_s))
    raise AssertionError("unreachable")


def targets_of(status: Status) -> list[str]:
    """Where PROD's relays connect to."""
    return list(dict.fromkeys(target for relay in status.relays for target in relay.targets))


def pauses() -> Iterator[float]:
    """How long to wait between two looks: ever longer."""
    pause_s = FIRST_POLL_S
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, LONGEST_POLL_S)


def _was_there(known: Entry | None, offer: Offer | None) -> bool:
    """Whether a side was open before it was asked for; of one that has not been answered, whether it may have been."""
    if known is None or offer is None:
        return known is not None
    return [one.relay_id for one in known.offer.relays] == [one.relay_id for one in offer.relays]


def _requested(facility: Facility, document: Mapping[str, Any], chosen: Collection[str]) -> Offer:
    wish = {"protocol": PROTOCOL, **document}
    for _ in _GIVES_WAY:
        answer = _offer_or_limit(facility, wish, chosen)
        if isinstance(answer, Offer):
            return answer
        wish |= answer
    return facility.request(read(Request, wish))


def _offer_or_limit(
    facility: Facility, wish: Mapping[str, Any], chosen: Collection[str]
) -> Offer | dict[str, int]:
    """The offer; or the limit of the facility that our default is above."""
    try:
        return facility.request(read(Request, wish))
    except PolicyDenied as denied:
        name, limit = denied.which, denied.details.get("limit")
        if name not in _GIVES_WAY or name in chosen or not isinstance(limit, int):
            raise
        return {name: limit}


def _hello(facility: Facility, uid: str) -> str:
    """Say hello from here; why it was refused, if it was: another machine may be the one that connects."""
    try:
        facility.hello(Hello(uid=uid, role="CONS"))
    except PolicyDenied as denied:
        return denied.message
    return ""
