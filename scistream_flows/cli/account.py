"""The commands of `s2uc` about who you are: login, check-auth, logout."""

from __future__ import annotations

import click

from scistream_flows.cli.answer import Form
from scistream_flows.cli.console import put, put_document, say
from scistream_flows.cli.login import CLIENT_VARIABLE, Logins, ask_for_code, masked
from scistream_flows.cli.options import format_option
from scistream_flows.cli.place import place
from scistream_flows.errors import Unauthenticated


@click.command()
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
@click.option("--server-cert", "--server-crt", metavar="FILE", help="Certificates to verify it with, PEM.")
@format_option
def login(scope: str, s2cs: str, client_id: str | None, server_cert: str | None, form: Form) -> None:
    """Log in at Globus for a facility."""
    where = place(s2cs, scope=scope, server_cert=server_cert)
    done = Logins().log_in(
        s2cs, scope=where.scope, client_id=client_id, prompt=ask_for_code, ca_file=where.server_cert
    )
    if form == "json":
        put_document({"s2cs": s2cs, "logged_in": True, "before": not done})
    elif done:
        say(f"Successfully logged in for {s2cs}!")
    else:
        put("You are already logged in, to try different credentials please log out!")


@click.command("check-auth")
@click.option("--scope", default="", metavar="SCOPE", help="[default: the one that was pinned at login]")
@click.option("--s2cs", "--ip", metavar="ADDRESS", help="[default: every facility with a login]")
@click.option("--show-token", is_flag=True, help="Print the token itself. Whoever reads it is you.")
@format_option
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


@click.command()
@format_option
def logout(form: Form) -> None:
    """Revoke and forget the tokens of every login."""
    addresses = Logins().log_out()
    if form == "json":
        put_document({"logged_out": addresses})
    else:
        put("Successfully logged out!")
