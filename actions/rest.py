"""The verbs of a facility as plain REST, for Registered APIs and scripts: `/streams`, thin over S2CS."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Final, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import HTTPConnection

from scistream_flows.errors import PROTOCOL, BadRequest, Busy, Unauthenticated
from scistream_flows.models import (
    DAY_S,
    UID_PATTERN,
    URN_PATTERN,
    GatewayListing,
    Hello,
    LeaseS,
    Listing,
    ListQuery,
    Networks,
    Offer,
    Peer,
    RateMbits,
    Release,
    Released,
    Renewal,
    Request,
    Role,
    Status,
    StatusQuery,
    Target,
    Targets,
    Ticket,
    TicketHello,
    TicketRequest,
    Update,
    read,
)
from scistream_flows.s2cs import S2CS

from .admission import Admission, Authorization
from .auth import Authenticator
from .lifecycle import identify, may_withhold_groups
from .provider import ERRORS

AT_ONCE: Final = 24
"""Verbs at a time: a gateway that hangs must not take all threads from the actions."""

TICKETS_AT_ONCE: Final = 8
"""Hellos by ticket at a time: whoever has none can keep at most so many threads."""

Uid = Annotated[str, Path(pattern=UID_PATTERN, description="The name of the stream")]
Side = Annotated[Role, Path(description="PROD beside the application that listens, CONS beside the other")]
Owner = Annotated[
    str | None,
    Query(pattern=URN_PATTERN, description="Whose, where several share streams of one name with you"),
]

A = TypeVar("A", bound=BaseModel)
M = TypeVar("M", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    protocol: Literal[1] = PROTOCOL


class Change(_Body):
    """What to change; what is left out stays."""

    peers: Annotated[list[Peer], Field(max_length=256)] | None = None
    targets: Annotated[list[Target], Field(min_length=1, max_length=256)] | None = None
    consumers: Networks | None = None
    rate_mbits_per_s: RateMbits | None = None


class Arrival(_Body):
    """Where the application is: PROD its `targets`, CONS the `consumers` that may connect."""

    targets: Targets = []
    consumers: Networks = []


class Wish(_Body):
    """Where and how long the ticket is to count: within the networks of the policy, and an hour, if nothing is said."""

    networks: Networks = []
    expires_s: Annotated[int, Field(ge=1, le=30 * DAY_S)] | None = None


class Extension(_Body):
    """Renew by the seconds of the request, or by `lease_s`."""

    lease_s: LeaseS | None = None


class Shown(BaseModel):
    """Which streams to list: also those that ended within a day; everybody's, for administrators."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_ended: bool = False
    all_owners: bool = False


_QUERY: Final = ("owner", *Shown.model_fields)


class _Asking:
    """Does verbs for whoever calls."""

    def __init__(self, service: S2CS, auth: Authenticator) -> None:
        self._service = service
        self._auth = auth
        self._places = threading.BoundedSemaphore(AT_ONCE)

    def __call__(self, authorization: str | None, verb: Callable[..., A], document: BaseModel) -> A:
        """What the verb answers to the caller."""
        groups = self._service.names_groups(getattr(document, "uid", None))
        facility = self._service.config
        withheld = may_withhold_groups(facility, opens=isinstance(document, Request))
        identity = identify(self._auth, authorization, groups=groups, withheld=withheld)
        with _place(self._places, facility.name, AT_ONCE):
            return verb(document, owner=identity.urns)


@contextlib.contextmanager
def _place(places: threading.BoundedSemaphore, facility: str, at_once: int) -> Iterator[None]:
    if not places.acquire(timeout=1):
        raise Busy(
            f"facility {facility} is doing {at_once} requests already",
            which=facility,
            hint="Try again in a moment; if it lasts, look for a gateway that hangs",
        )
    try:
        yield
    finally:
        places.release()


def _known_query(http: HTTPConnection) -> None:
    """Refuse what no operation here has, such as a mistyped `owner`: as in bodies, it must not be overlooked.

    Raises:
        BadRequest: When there is such a field.
    """
    for name in http.query_params:
        if name not in _QUERY:
            raise BadRequest(
                f"there is no field {name[:64]!r} in the query",
                which="query",
                hint=f"Those there are: {', '.join(_QUERY)}",
            )


def routes(service: S2CS, *, admission: Admission, base_url: str) -> APIRouter:
    """The routes of a facility's streams, which is reached at `base_url` unless its configuration says where."""
    everything = APIRouter()
    as_caller = _Asking(service, admission.auth)
    everything.include_router(_streams(service, as_caller, admission=admission, base_url=base_url))
    everything.include_router(_gateways(service, as_caller, admission=admission))
    everything.include_router(_tickets(service, admission=admission))
    return everything


def _tickets(service: S2CS, *, admission: Admission) -> APIRouter:
    """What is asked for with a ticket, and no other proof."""
    router = APIRouter(tags=["tickets"], responses=ERRORS)
    places = threading.BoundedSemaphore(TICKETS_AT_ONCE)

    @router.post("/hello", operation_id="hello_by_ticket", response_model_exclude_none=True)
    def hello_by_ticket(hello: TicketHello, http: HTTPConnection) -> Offer:
        """The application says where it is: at PROD its targets, at CONS the address that it calls from."""
        admission.admit_stranger(http)
        with _place(places, service.config.name, TICKETS_AT_ONCE):
            try:
                return service.hello_by_ticket(hello, caller_address=http.client.host if http.client else "")
            except Unauthenticated:
                admission.count_stranger(http)
                raise

    return router


def _gateways(service: S2CS, as_caller: _Asking, *, admission: Admission) -> APIRouter:
    known = [*admission.dependencies(), Depends(_known_query)]
    router = APIRouter(tags=["gateways"], responses=ERRORS, dependencies=known)

    def load(_: ListQuery, *, owner: Sequence[str]) -> GatewayListing:
        return service.load(owner=owner)

    @router.get("/gateways", operation_id="list_gateways", response_model_exclude_none=True)
    def list_gateways(authorization: Authorization) -> GatewayListing:
        """The gateways with what is booked of them: to administrators all, to others their own share."""
        return as_caller(authorization, load, ListQuery())

    return router


def _streams(service: S2CS, as_caller: _Asking, *, admission: Admission, base_url: str) -> APIRouter:
    known = [*admission.dependencies(), Depends(_known_query)]
    router = APIRouter(prefix="/streams", tags=["streams"], responses=ERRORS, dependencies=known)

    @router.post("", operation_id="request_stream", response_model_exclude_none=True)
    def request(document: Request, authorization: Authorization) -> Offer:
        """Open one side. The same request again answers the same offer, and renews the lease."""
        admission.among(authorization, admission.auth.config.runnable_by)
        return as_caller(authorization, service.request, document)

    @router.get("", operation_id="list_streams", response_model_exclude_none=True)
    def list_streams(
        authorization: Authorization,
        query: Annotated[Shown, Query()],
    ) -> Listing:
        """The streams that the caller owns, manages or monitors."""
        return as_caller(authorization, service.list, ListQuery(**vars(query)))

    @router.get("/{uid}/{role}", operation_id="stream_status", response_model_exclude_none=True)
    def status(uid: Uid, role: Side, authorization: Authorization, owner: Owner = None) -> Status:
        """The state of one side, also for a day after its end. Looking renews nothing."""
        return as_caller(authorization, service.status, StatusQuery(uid=uid, role=role, owner=owner))

    @router.patch("/{uid}/{role}", operation_id="update_stream", response_model_exclude_none=True)
    def update(
        uid: Uid, role: Side, change: Change, authorization: Authorization, owner: Owner = None
    ) -> Status:
        """Change peers, targets, consumers or the rate of a running side."""
        return as_caller(authorization, service.update, _document(Update, uid, role, owner, change))

    @router.post("/{uid}/{role}/hello", operation_id="hello_stream", response_model_exclude_none=True)
    def hello(
        uid: Uid,
        role: Side,
        arrival: Arrival,
        authorization: Authorization,
        http: HTTPConnection,
        owner: Owner = None,
    ) -> Offer:
        """The application says where it is; answers the offer. At CONS without `consumers`: where it calls from."""
        from_here = http.client.host if http.client and role == "CONS" and not arrival.consumers else None
        say = partial(service.hello, caller_address=from_here)
        return as_caller(authorization, say, _document(Hello, uid, role, owner, arrival))

    @router.post("/{uid}/{role}/ticket", operation_id="ticket_of_stream", response_model_exclude_none=True)
    def ticket(
        uid: Uid,
        role: Side,
        authorization: Authorization,
        wish: Wish = Wish(),  # noqa: B008 - frozen
        owner: Owner = None,
    ) -> Ticket:
        """A ticket for one hello, for an application whose node is not known before, and has no token."""
        made = as_caller(authorization, service.ticket, _document(TicketRequest, uid, role, owner, wish))
        return made if made.url else made.model_copy(update={"url": base_url})

    @router.post("/{uid}/{role}/renew", operation_id="renew_stream", response_model_exclude_none=True)
    def renew(
        uid: Uid,
        role: Side,
        authorization: Authorization,
        extension: Extension = Extension(),  # noqa: B008 - frozen
        owner: Owner = None,
    ) -> Status:
        """Renew the lease; on a side that has ended, answer how it ended."""
        return as_caller(authorization, service.renew, _document(Renewal, uid, role, owner, extension))

    @router.delete("/{uid}/{role}", operation_id="release_stream", response_model_exclude_none=True)
    def release(uid: Uid, role: Side, authorization: Authorization, owner: Owner = None) -> Released:
        """End one side. Repeating it, or releasing what never was, is no error."""
        return as_caller(authorization, service.release, Release(uid=uid, role=role, owner=owner))

    return router


def _document(model: type[M], uid: str, role: Role, owner: str | None, body: BaseModel) -> M:
    """The document of a verb, checked as a whole: what fits the role is not seen in the body alone."""
    fields = body.model_dump(mode="json", exclude_unset=True)
    return read(model, {**fields, "protocol": PROTOCOL, "uid": uid, "role": role, "owner": owner})
