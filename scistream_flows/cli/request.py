"""The commands of `s2uc` that open and end sides of a stream, as SciStream 1.x has them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from scistream_flows.cli.answer import Answer, Form
from scistream_flows.cli.console import Span, plain, progress, put, put_document, say
from scistream_flows.cli.ledger import Ledger
from scistream_flows.cli.listing import end_in_words
from scistream_flows.cli.options import (
    Known,
    application_options,
    facility_options,
    format_option,
    given_place,
    mock_option,
    name_option,
    named_place,
    role_option,
    takes,
    wish_options,
    wishes,
)
from scistream_flows.cli.pin import peer_in_words, pinned, read_peer, read_places
from scistream_flows.cli.place import addresses_in, place
from scistream_flows.cli.session import Session, Sight, await_hello, pauses, targets_of
from scistream_flows.errors import ScistreamError, StreamNotReady
from scistream_flows.models import Role
from scistream_flows.stream import ROLES

MOCK_UID: Final = "4f8583bc-a4d3-11ee-9fd6-034d1fcbd7c3"
MOCK_HOST: Final = "mock"
MOCK_PORT: Final = 5100
HELLO_TIMEOUT_S: Final = 180


@click.command("prod-req")
@takes(facility_options("localhost:5000"), wish_options(), name_option, mock_option, format_option)
def prod_req(uid: str | None, form: Form, *, mock: bool, **options: Any) -> None:
    """Open PROD's side, and wait until its application says hello (appctrl).

    Prints where the other side finds it. What that needs to know of its keys is kept for `s2uc cons-req` of the same
    user; for another machine the line Pins has it.
    """
    _open_producer(uid, form, mock=mock, options=options, targets=())


@click.command("inbound-request")
@takes(
    facility_options("localhost:5000"),
    wish_options(),
    application_options,
    name_option,
    mock_option,
    format_option,
)
def inbound_request(
    remote_ip: str, receiver_ports: str, uid: str | None, form: Form, *, mock: bool, **options: Any
) -> None:
    """Open PROD's side for the application that listens at REMOTE_IP, at RECEIVER_PORTS."""
    targets = addresses_in(remote_ip, receiver_ports, at_most=options["num_conn"])
    _open_producer(uid, form, mock=mock, options=options, targets=targets)


def _open_producer(
    uid: str | None, form: Form, *, mock: bool, options: Mapping[str, Any], targets: Sequence[str]
) -> None:
    uid = MOCK_UID if mock else uid or str(uuid.uuid4())
    answer = Answer(form, uid=uid, address=options["s2cs"], role="PROD")
    if mock:
        _put_mock(answer, options["num_conn"], onwards=targets)
        return
    wish, chosen = wishes(options)
    with (
        progress(f"asking {options['s2cs']}") as now,
        Session(uid).producer(named_place(options), wish=wish, targets=targets, chosen=chosen) as (
            facility,
            offer,
        ),
    ):
        answer.opened()
        if not targets:
            answer.said(
                "waiting for hello message",
                f"waiting for hello message: appctrl create-appctrl {uid} {options['s2cs']} - PROD",
            )
            timeout_s = wish["hello_timeout_s"] if "hello_timeout_s" in chosen else HELLO_TIMEOUT_S
            status = await_hello(facility, uid, timeout_s=timeout_s, tell=now.says)
            targets = targets_of(status)
        else:
            answer.said("waiting for hello message")
            answer.said("sending for hello message")
            answer.said("Hello message sent successfully")
        # within the block: a side whose answer nobody can read is released
        answer.listeners(
            offer.addresses,
            onwards=targets,
            lines={"Pins": [pinned(offer)]},
            more={"pins": pinned(offer), "offer": offer.model_dump(mode="json")},
        )
    answer.note(f"then, for the other side: s2uc outbound-request {uid} {','.join(offer.addresses)} --s2cs …")


@click.command("cons-req")
@takes(
    click.argument("uid", type=Known()),
    click.argument("prod_lstn"),
    facility_options("localhost:6000"),
    wish_options(),
    click.option("--consumer", "consumers", multiple=True, metavar="NETWORK", help="May connect. Repeat it."),
    click.option("--wait-s", type=Span(), metavar="TIME", help="Wait for READY; exit with 1 without it."),
    format_option,
)
def cons_req(
    uid: str,
    prod_lstn: str,
    consumers: Sequence[str],
    wait_s: float | None,
    form: Form,
    **options: Any,
) -> None:
    """Open CONS's side of the stream UID to the listeners PROD_LSTN, IP:PORT[#PIN],…, of PROD's side.

    Says no hello: `appctrl create-appctrl UID S2CS - CONS` does, or --consumer names who may connect.
    """
    _open_consumer(uid, prod_lstn, consumers, wait_s, form, options=options, says_hello=False)


@click.command("outbound-request")
@takes(
    click.argument("uid", type=Known()),
    click.argument("prod_lstn"),
    facility_options("localhost:6000"),
    wish_options(),
    application_options,
    click.option("--consumer", "consumers", multiple=True, metavar="NETWORK", help="May connect. Repeat it."),
    click.option("--wait-s", type=Span(), metavar="TIME", help="Wait for READY; exit with 1 without it."),
    format_option,
)
def outbound_request(
    uid: str,
    prod_lstn: str,
    consumers: Sequence[str],
    wait_s: float | None,
    form: Form,
    remote_ip: str,
    receiver_ports: str,
    **options: Any,
) -> None:
    """Open CONS's side of the stream UID to the listeners PROD_LSTN, IP:PORT[#PIN],…, of PROD's side.

    The application connects to the listeners that are printed, from where this command runs, or from a --consumer.
    --remote-ip and --receiver-ports are taken as SciStream takes them: they change nothing on this side.
    """
    del remote_ip, receiver_ports
    _open_consumer(uid, prod_lstn, consumers, wait_s, form, options=options, says_hello=True)


def _open_consumer(
    uid: str,
    prod_lstn: str,
    consumers: Sequence[str],
    wait_s: float | None,
    form: Form,
    *,
    options: Mapping[str, Any],
    says_hello: bool,
) -> None:
    answer = Answer(form, uid=uid, address=options["s2cs"], role="CONS")
    listeners = read_places(prod_lstn)
    onwards = [one.address for one in listeners]
    if uid == MOCK_UID and all(one.startswith(f"{MOCK_HOST}:") for one in onwards):
        _put_mock(answer, options["num_conn"], onwards=onwards)
        return
    wish, chosen = wishes(options)
    session = Session(uid)
    with (
        progress(f"asking {options['s2cs']}"),
        session.consumer(
            named_place(options),
            listeners=listeners,
            wish=wish,
            chosen=chosen,
            consumers=consumers,
            says_hello=says_hello,
        ) as (_, opened),
    ):
        answer.opened()
        if says_hello:
            answer.said("waiting for hello message")
            answer.said("sending for hello message")
            answer.said("Hello message sent successfully")
        peers = [peer_in_words(one) for one in opened.peers]
        answer.listeners(
            opened.offer.addresses,
            onwards=onwards,
            lines={} if opened.told else {"Peers": [" ".join(peers)]},
            more={
                "peers": peers,
                "told": opened.told,
                "offer": opened.offer.model_dump(mode="json"),
            },
        )
    if opened.refusal:
        answer.note(f"this machine may not connect: {opened.refusal}; name with --consumer who may")
    if not opened.told:
        pins = " ".join(f"--peer {one}" for one in peers)
        answer.note(f"PROD's user has to run, so that it is admitted: s2uc update {uid} {pins}")
    elif wait_s is not None:
        _await_ready(session, answer, wait_s)


def _await_ready(session: Session, answer: Answer, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with Sight(session.uid, session.places()) as sight, progress("waiting for READY"):
        for pause_s in pauses():
            sides = sight.look()
            if all(one.ready for one in sides.values()):
                proven = all(one.proof for one in sides.values() if one.role == "CONS")
                answer.note(
                    "READY: a probe has gone through" if proven else "READY, but nothing has proven it"
                )
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0 or any(one.ended for one in sides.values()):
                why = "; ".join(f"{role} is {one.state}" for role, one in sides.items())
                raise StreamNotReady(
                    f"stream {session.uid!r} is not ready: {why}",
                    which=session.uid,
                    hint=f"See `s2uc status {session.uid}`; it goes on to try",
                )
            time.sleep(min(pause_s, left_s))


def _put_mock(answer: Answer, num_conn: int, *, onwards: Sequence[str]) -> None:
    """What a request would answer; no facility is asked, and nobody serves these addresses."""
    answer.opened()
    answer.note("mock: no relay runs, the addresses are nobody's, and it never is READY")
    answer.said("Hello message sent successfully")
    listeners = [f"{MOCK_HOST}:{MOCK_PORT + number}" for number in range(num_conn)]
    answer.listeners(listeners, onwards=onwards, lines={}, more={"mock": True, "state": "MOCK"})


# --- what is open


@click.command()
@takes(
    click.argument("uid", type=Known()),
    click.option("--peer", "peers", multiple=True, required=True, metavar="PIN", help="Repeat it for more."),
    facility_options(None),
    format_option,
)
def update(uid: str, peers: Sequence[str], form: Form, **options: Any) -> None:
    """Admit the relays of CONS at PROD's side of the stream UID.

    For PROD's user, when the other side was opened on another machine: its request has printed the pins.
    """
    with progress(f"telling PROD of {uid}"):
        status = Session(uid).update([read_peer(one) for one in peers], where=given_place(options))
    if form == "json":
        put_document(status.model_dump(mode="json"))
    else:
        put(f"{uid} (PROD) admits {len(peers)} relay{'s' if len(peers) > 1 else ''}")


@click.command()
@takes(click.argument("uid", type=Known()), facility_options(None), role_option, format_option)
def release(uid: str, role: Role | None, form: Form, **options: Any) -> None:
    """End the stream UID: the sides that this user has opened, or those at --s2cs."""
    where = given_place(options)
    released = []
    if uid != MOCK_UID or where is not None:
        try:
            session = Session(uid)
            if where is None and Ledger().find(uid) is None:
                where = place("localhost:5000", scope=options["scope"], server_cert=options["server_cert"])
            with progress(f"releasing {uid}"):
                released = session.release(where, roles=[role] if role else ROLES)
        except ScistreamError as wrong:
            wrong.message = f"Error during release: {wrong.message}"
            wrong.args = (wrong.message,)
            raise
    ends = [one.end for one in released if one.end is not None]
    if form == "json":
        put_document({"uid": uid, "released": [one.model_dump(mode="json") for one in released]})
        return
    for end in ends:
        say(plain(end_in_words(end)))
    if not ends and uid != MOCK_UID:
        say(f"there was no stream {uid} to end")
    put("Release completed")
