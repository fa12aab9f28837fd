"""The options that the commands of `s2uc` share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from scistream_flows.cli.answer import FORMS
from scistream_flows.cli.console import Span, StreamName, in_time
from scistream_flows.cli.ledger import Ledger, Place
from scistream_flows.cli.place import place
from scistream_flows.errors import ScistreamError
from scistream_flows.models import DAY_S
from scistream_flows.stream import ROLES

LEASE_S: Final = 3600

C = TypeVar("C", bound=Callable[..., Any])


class Known(StreamName):
    """The uid of a stream; a shell completes those that this user has opened."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The uids that begin like this."""
        del ctx, param
        known: list[str] = []
        with contextlib.suppress(ScistreamError, OSError):  # no place for words
            known = [record.uid for record in Ledger().all()]
        return [CompletionItem(uid) for uid in known if uid.startswith(incomplete)]


def takes(*options: Callable[[C], C]) -> Callable[[C], C]:
    """A decorator that gives a command these arguments and options, in this order."""

    def add(command: C) -> C:
        for one in reversed(options):
            command = one(command)
        return command

    return add


format_option = click.option(
    "--format",
    "form",
    type=click.Choice(FORMS),
    default="default",
    show_default=True,
    envvar="S2UC_FORMAT",
    show_envvar=True,
    help="legacy-1.2: all on stdout, in the words of SciStream 1.2; json: one document.",
)


def facility_options(default: str | None) -> Callable[[C], C]:
    """Which facility: at `default`, or with None where this user has opened the stream."""
    return takes(
        click.option(
            "--s2cs",
            metavar="ADDRESS",
            default=default,
            show_default=default is not None,
            help="The facility: HOST:PORT, https://…, local:NAME or compute:UUID."
            + ("" if default else "  [default: where the stream was opened]"),
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


def wish_options(*, lease_s: int = LEASE_S, num_conn: int = 5) -> Callable[[C], C]:
    """What both sides of a stream have in common."""
    return takes(
        click.option(
            "--num-conn",
            type=click.IntRange(1, 256),
            default=num_conn,
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
            "--gateways",
            type=click.IntRange(1, 16),
            default=1,
            show_default=True,
            help="Gateways that carry it.",
        ),
        click.option(
            "--lease-s",
            type=Span(),
            default=lease_s,
            metavar="TIME",
            help=f"It ends when nothing moves, and nothing renews it, for so long.  [default: {in_time(lease_s)}]",
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


application_options = takes(
    click.option("--remote-ip", default="localhost", show_default=True, metavar="HOST"),
    click.option(
        "--receiver-ports", default="5074,5075,5076,37000,47000", show_default=True, metavar="PORT,…"
    ),
)

name_option = click.option(
    "--uid", type=StreamName(), metavar="NAME", help="The stream's name.  [default: a new UUID]"
)
mock_option = click.option(
    "--mock",
    is_flag=False,
    flag_value="True",
    default="False",
    type=click.BOOL,
    help="Answer as if, without any relay.",
)


def named_place(options: Mapping[str, Any]) -> Place:
    """The facility that is named."""
    return place(options["s2cs"], scope=options["scope"], server_cert=options["server_cert"])


def given_place(options: Mapping[str, Any]) -> Place | None:
    """The facility that is named; None when none is."""
    if options["s2cs"] is None:
        return None
    return named_place(options)


def wishes(options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
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


role_option = click.option(
    "--role", type=click.Choice(ROLES, case_sensitive=False), metavar="PROD|CONS", help="Only this side."
)
