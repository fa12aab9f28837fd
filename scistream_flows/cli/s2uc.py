"""The command `s2uc`: streams from the command line, as users of SciStream 1.x know it, and what that could not do.

stdout is data, stderr is words; it exits with 0 when done, 1 on our errors, 2 on wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import click
from click.core import ParameterSource

from scistream_flows import __version__
from scistream_flows.cli.answer import FORMS, Answer, Form
from scistream_flows.cli.console import (
    SETTINGS,
    Span,
    completion,
    interrupted_by_sigterm,
    plain,
    progress,
    put,
    put_document,
    run,
    say,
    show_debugging,
)
from scistream_flows.cli.ledger import Ledger, Place
from scistream_flows.cli.listing import end_in_words, put_streams
from scistream_flows.cli.login import CLIENT_VARIABLE, Logins, ask_for_code, masked
from scistream_flows.cli.pin import peer_in_words, pinned, read_peer, read_places
from scistream_flows.cli.place import addresses_in, connect, place
from scistream_flows.cli.session import Session, Sight, await_hello, pauses, targets_of
from scistream_flows.errors import NotFound, ScistreamError, StreamNotReady, Unauthenticated
from scistream_flows.models import DAY_S, UID_PATTERN, ListQuery, Role, Status
from scistream_flows.stream import ROLES

MOCK_UID: Final = "4f8583bc-a4d3-11ee-9fd6-034d1fcbd7c3"
MOCK_HOST: Final = "mock"
MOCK_PORT: Final = 5100
HELLO_TIMEOUT_S: Final = 180
LEASE_S: Final = 3600

C = TypeVar("C", bound=Callable[..., Any])


class StreamName(click.ParamType):
    """The uid of a stream."""

    name = "uid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The uid that `value` is."""
        if not re.fullmatch(UID_PATTERN, str(value)):
            self.fail(
                f"{value!r} is no uid: letters, digits, '_', '-' and '.', 64 at most, the first a letter or digit",
                param,
                ctx,
            )
        return str(value)


class Asked:
    """What every command takes."""

    debug: bool = False


class Commands(click.Group):
    """Commands that are known under another name, too."""

    ALIASES: Final[Mapping[str, str]] = {"check-status": "status"}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        return super().get_command(ctx, self.ALIASES.get(cmd_name, cmd_name))


@click.group(cls=Commands, context_settings=dict(SETTINGS))
@click.option("--debug", is_flag=True, help="Log what is done, and show where an error comes from.")
@click.version_option(__version__, "--version", "-v", message="%(prog)s, version %(version)s")
@click.pass_obj
def s2uc(asked: Asked, *, debug: bool) -> None:
    """Open, see and end streams between facilities."""
    asked.debug = debug
    if debug:
        show_debugging()


def main() -> NoReturn:
    """The entry point."""
    interrupted_by_sigterm()
    run(s2uc, name="s2uc", asked=Asked())


s2uc.add_command(completion(s2uc, name="s2uc"))


# --- options


def _options(*options: Callable[[C], C]) -> Callable[[C], C]:
    def add(command: C) -> C:
        for one in reversed(options):
            command = one(command)
        return command

    return add


_form = click.option(
    "--format",
    "form",
    type=click.Choice(FORMS),
    default="default",
    show_default=True,
    envvar="S2UC_FORMAT",
    show_envvar=True,
    help="legacy-1.2: all on stdout, in the words of SciStream 1.2; json: one document.",
)


def _s2cs(default: str | None) -> Callable[[C], C]:
    told = "localhost:5000" if default is None else default
    return _options(
        click.option(
            "--s2cs",
            metavar="ADDRESS",
            default=default,
            show_default=default is not None,
            help="The facility: HOST:PORT, https://…, local:NAME or compute:UUID."
            + ("" if default else f"  [default: where the stream was opened, else {told}]"),
        ),
        click.option(
            "--scope", default="", metavar="SCOPE", help="Its scope, where not the one of the login is meant."
        ),
        click.option(
            "--server-cert",
            "--server-crt",
            metavar="FILE",
            help="Certificates to verify it with, PEM.  [default: server.crt if it is there, else the system's]",
        ),
    )


_wish = _options(
    click.option(
        "--num-conn",
        type=click.IntRange(1, 256),
        default=5,
        show_default=True,
        help="Listeners on this side.",
    ),
    click.option(
        "--rate",
        type=click.IntRange(0, 10_000_000),
        default=10_000,
        show_default=True,
        metavar="MBIT/S",
        help="Payload per direction at most; given here, it is reserved. 0: as much as there is.",
    ),
    click.option("--mode", type=click.Choice(["tls", "auth", "none"]), default="tls", show_default=True),
    click.option(
        "--gateways", type=click.IntRange(1, 16), default=1, show_default=True, help="Gateways that carry it."
    ),
    click.option(
        "--lease-s",
        type=Span(),
        default=LEASE_S,
        metavar="TIME",
        help="It ends when nothing moves, and nothing renews it, for so long.  [default: 1h]",
    ),
    click.option(
        "--lifetime-s", type=Span(), default=DAY_S, metavar="TIME", help="Its hard end.  [default: 1d]"
    ),
    click.option(
        "--hello-timeout-s",
        type=Span(),
        default=LEASE_S,
        metavar="TIME",
        help="It has to be ready by then.  [default: 1h; prod-req waits 180s for a hello]",
    ),
    click.option(
        "--probe",
        type=click.Choice(["target", "path"]),
        default="target",
        show_default=True,
        help="How far READY is proven.",
    ),
)

_application = _options(
    click.option("--remote-ip", default="localhost", show_default=True, metavar="HOST"),
    click.option(
        "--receiver-ports", default="5074,5075,5076,37000,47000", show_default=True, metavar="PORT,…"
    ),
)

_uid = click.option(
    "--uid", type=StreamName(), metavar="NAME", help="The stream's name.  [default: a new UUID]"
)
_mock = click.option(
    "--mock",
    is_flag=False,
    flag_value="True",
    default="False",
    type=click.BOOL,
    help="Answer as if, without any relay.",
)


def _where(options: Mapping[str, Any]) -> Place:
    return place(options["s2cs"], scope=options["scope"], server_cert=options["server_cert"])


def _where_given(options: Mapping[str, Any]) -> Place | None:
    """The facility that is named; None when none is."""
    if options["s2cs"] is None:
        return None
    return _where(options)


def _wishes(options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The fields of a request that both sides have, and the names of those that the user chose."""
    context = click.get_current_context()
    chosen = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    fields = {
        **{name: options[name] for name in ("num_conn", "gateways", "mode", "probe")},
        **{name: max(1, int(options[name])) for name in ("lease_s", "lifetime_s", "hello_timeout_s")},
        "rate_mbits_per_s": options["rate"],
        "reserve_rate": "rate" in chosen and options["rate"] > 0,
        "until": "released",
    }
    return fields, chosen


# --- login


@s2uc.command()
@click.option("--scope", default="", metavar="SCOPE", help="[default: the one that the facility tells]")
@click.option(
    "--s2cs",
    "--ip",
    default="localhost:5000",
    show_default=True,
    metavar="ADDRESS",
    help="The facility to which the scope is pinned: its token goes there only.",
)
@click.option(
    "--client-id",
    envvar=CLIENT_VARIABLE,
    show_envvar=True,
    metavar="UUID",
    help="The native application of Globus to log in with.",
)
def login(scope: str, s2cs: str, client_id: str | None) -> None:
    """Log in at Globus for a facility."""
    if Logins().log_in(s2cs, scope=scope or None, client_id=client_id, prompt=ask_for_code):
        say(f"Successfully logged in for {s2cs}!")
    else:
        put("You are already logged in, to try different credentials please log out!")


@s2uc.command("check-auth")
@click.option("--scope", default="", metavar="SCOPE", help="[default: the one that was pinned at login]")
@click.option("--s2cs", "--ip", metavar="ADDRESS", help="[default: every facility with a login]")
@click.option("--show-token", is_flag=True, help="Print the token itself. Whoever reads it is you.")
@_form
def check_auth(scope: str, s2cs: str | None, form: Form, *, show_token: bool) -> None:
    """Say for which facilities you are logged in."""
    logins = Logins()
    known = logins.pins()
    addresses = [s2cs] if s2cs else [one for one, pin in known.items() if not scope or scope in pin.scope]
    found = []
    for address in addresses:
        pin = logins.pin(address, scope or None)
        token = logins.token(address, scope or None)
        if pin is not None and token is not None:
            shown = token if show_token else masked(token)
            found.append({"address": address, "scope": pin.scope, "token": shown})
    if not found:
        raise Unauthenticated(
            f"you are not logged in{f' for {s2cs}' if s2cs else ''}",
            hint="s2uc login --s2cs ADDRESS. Development facilities need none",
        )
    if form == "json":
        put_document({"logins": found})
        return
    for one in found:
        say(one["address"])
        put(f"Access Token for scope '{one['scope']}': {one['token']}")


@s2uc.command()
def logout() -> None:
    """Revoke and forget the tokens of every login."""
    Logins().log_out()
    put("Successfully logged out!")


# --- requests


@s2uc.command("prod-req")
@_options(_s2cs("localhost:5000"), _wish, _uid, _mock, _form)
def prod_req(uid: str | None, form: Form, *, mock: bool, **options: Any) -> None:
    """Open PROD's side, and wait until its application says hello (appctrl).

    Prints where the other side finds it. What that needs to know of its keys is kept for `s2uc cons-req` of the same
    user; for another machine the line Pins has it.
    """
    _open_producer(uid, form, mock=mock, options=options, targets=())


@s2uc.command("inbound-request")
@_options(_s2cs("localhost:5000"), _wish, _application, _uid, _mock, _form)
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
    wish, chosen = _wishes(options)
    with (
        progress(f"asking {options['s2cs']}") as now,
        Session(uid).producer(_where(options), wish=wish, targets=targets, chosen=chosen) as (
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
    answer.listeners(
        offer.addresses,
        onwards=targets,
        lines={"Pins": [pinned(offer)]},
        more={"pins": pinned(offer), "offer": offer.model_dump(mode="json")},
    )
    answer.note(f"then, for the other side: s2uc outbound-request {uid} {','.join(offer.addresses)} --s2cs …")


@s2uc.command("cons-req")
@_options(
    click.argument("uid", type=StreamName()),
    click.argument("prod_lstn"),
    _s2cs("localhost:6000"),
    _wish,
    click.option("--consumer", "consumers", multiple=True, metavar="NETWORK", help="May connect. Repeat it."),
    click.option("--wait-s", type=Span(), metavar="TIME", help="Wait for READY; exit with 1 without it."),
    _form,
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


@s2uc.command("outbound-request")
@_options(
    click.argument("uid", type=StreamName()),
    click.argument("prod_lstn"),
    _s2cs("localhost:6000"),
    _wish,
    _application,
    click.option("--consumer", "consumers", multiple=True, metavar="NETWORK", help="May connect. Repeat it."),
    click.option("--wait-s", type=Span(), metavar="TIME", help="Wait for READY; exit with 1 without it."),
    _form,
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
    wish, chosen = _wishes(options)
    session = Session(uid)
    with (
        progress(f"asking {options['s2cs']}"),
        session.consumer(
            _where(options),
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
                answer.note("READY: a probe has gone through")
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


@s2uc.command()
@_options(
    click.argument("uid", type=StreamName()),
    click.option("--peer", "peers", multiple=True, required=True, metavar="PIN", help="Repeat it for more."),
    _s2cs(None),
    _form,
)
def update(uid: str, peers: Sequence[str], form: Form, **options: Any) -> None:
    """Admit the relays of CONS at PROD's side of the stream UID.

    For PROD's user, when the other side was opened on another machine: its request has printed the pins.
    """
    with progress(f"telling PROD of {uid}"):
        status = Session(uid).update([read_peer(one) for one in peers], where=_where_given(options))
    if form == "json":
        put_document(status.model_dump(mode="json"))
    else:
        put(f"{uid} (PROD) admits {len(peers)} relay{'s' if len(peers) > 1 else ''}")


_role = click.option(
    "--role", type=click.Choice(ROLES, case_sensitive=False), metavar="PROD|CONS", help="Only this side."
)


@s2uc.command()
@_options(click.argument("uid", type=StreamName()), _s2cs(None), _role, _form)
def release(uid: str, role: Role | None, form: Form, **options: Any) -> None:
    """End the stream UID: the sides that this user has opened, or those at --s2cs."""
    where = _where_given(options)
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


@s2uc.command()
@_options(click.argument("uid", type=StreamName()), _s2cs(None), _role, _form)
def status(uid: str, role: Role | None, form: Form, **options: Any) -> None:
    """Show the sides of the stream UID."""
    if uid == MOCK_UID and options["s2cs"] is None:
        put_document({"uid": uid, "mock": True, "streams": []}) if form == "json" else put(f"{uid} MOCK")
        return
    places = Session(uid).places(_where_given(options))
    with progress(f"asking for {uid}"), Sight(uid, _only(places, role)) as sight:
        sides = sight.look()
    _put_streams(list(sides.values()), form)


def _only(places: Mapping[Role, Place], role: Role | None) -> Mapping[Role, Place]:
    chosen = {one: where for one, where in places.items() if role in (None, one)}
    if not chosen:
        raise NotFound(f"this user has not opened the {role} side here", hint="Name its facility with --s2cs")
    return chosen


@s2uc.command("list")
@_options(_s2cs(None), click.option("--ended", is_flag=True, help="Also those of the last day."), _form)
def list_(form: Form, *, ended: bool, **options: Any) -> None:
    """Show your streams: at --s2cs, or at every facility where you have opened one."""
    where = _where_given(options)
    places = [where] if where else _known_places() or [place("localhost:5000")]
    found: list[Status] = []
    for number, one in enumerate(places, 1):
        with progress(f"asking {one.address} ({number} of {len(places)})"):
            facility = connect(one)
            try:
                found += facility.list(ListQuery(include_ended=ended)).streams
            finally:
                facility.close()
    if not found and form != "json":
        say(f"no streams at {', '.join(one.address for one in places)}")
        return
    _put_streams(found, form)


def _known_places() -> list[Place]:
    return list(dict.fromkeys(side.place for record in Ledger().all() for side in record.sides.values()))


def _put_streams(streams: Sequence[Status], form: Form) -> None:
    if form == "json":
        put_document({"streams": [one.model_dump(mode="json") for one in streams]})
    else:
        put_streams(streams)
