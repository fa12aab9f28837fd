"""Hello from inside a job, on a node that nobody knew before it started: by a ticket, which its workflow handed on."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from scistream_flows.errors import (
    PROTOCOL,
    BadRequest,
    FacilityUnreachable,
    Unauthenticated,
    error_from_document,
)
from scistream_flows.models import Offer, Ticket, TicketHello, read

DEADLINE_S: Final = 60.0

ATicket: TypeAlias = "Ticket | Mapping[str, Any] | str"


def say_hello(
    ticket: ATicket | Sequence[ATicket],
    *,
    targets: Sequence[str] = (),
    url: str | None = None,
    ca_file: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> Offer:
    """Say where the application is; its address is the one that this call comes from. Repeating it is no error.

    At CONS, the application on this node may connect from now on; at PROD, the relay connects to `targets`.

    Args:
        ticket: What `Stream.ticket` answered, also as a mapping or JSON text. Of several, the first that counts here is
            used: a job that is tried again on another node needs one for each try.
        targets: PROD: `host:port` of the listening application, as the gateway reaches it.
        url: Where the facility's service is reached; by default what the ticket says.
        ca_file: Certificates of authorities to trust, PEM; by default those of `$REQUESTS_CA_BUNDLE`, or of certifi.
        deadline_s: For the answer, seconds.

    Returns:
        The offer; `addresses` of one at CONS are where the application connects.

    Raises:
        Unauthenticated: No ticket counts: expired, or used elsewhere.
        PolicyDenied: This node, or a target, is not within the ticket's networks.
        NotFound: The stream has ended.
        FacilityUnreachable: No answer came.
    """
    tickets = [ticket] if isinstance(ticket, Ticket | Mapping | str) else list(ticket)
    if not tickets:
        raise BadRequest("there is no ticket", which="ticket", hint="Stream.ticket makes one")
    until = time.monotonic() + deadline_s
    for one in tickets[:-1]:
        with contextlib.suppress(Unauthenticated):
            return _said(read(Ticket, one), targets, url, ca_file, until)
    return _said(read(Ticket, tickets[-1]), targets, url, ca_file, until)


def _said(
    ticket: Ticket, targets: Sequence[str], url: str | None, ca_file: str | None, until: float
) -> Offer:
    from scistream_flows.rest import RestService  # loads requests

    where = url or ticket.url
    if where is None:
        raise BadRequest(
            f"the ticket does not say where the service of facility {ticket.facility} is",
            which=ticket.facility,
            hint="Give url; its administrator publishes it with service.url in facility.toml",
        )
    hello = read(TicketHello, {"protocol": PROTOCOL, "ticket": ticket.ticket, "targets": list(targets)})
    service = RestService(
        where, authorizer=lambda _: None, ca_file=ca_file, deadline_s=max(0.1, until - time.monotonic())
    )
    try:
        said = service.answer("hello_by_ticket", json.loads(hello.model_dump_json()))
    finally:
        service.close()
    if not said["ok"]:
        raise error_from_document(said["error"])
    return read(Offer, dict(said["value"]), error=FacilityUnreachable)
