"""The command `s2uc`: streams from the command line, as users of SciStream 1.x know it, and what that could not do.

stdout is data, stderr is words; it exits with 0 when done, 1 on our errors, 2 on wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NoReturn

import click

from scistream_flows import __version__
from scistream_flows.cli.account import check_auth, login, logout
from scistream_flows.cli.console import SETTINGS, completion, interrupted_by_sigterm, run, show_debugging
from scistream_flows.cli.hold import stream
from scistream_flows.cli.request import cons_req, inbound_request, outbound_request, prod_req, release, update
from scistream_flows.cli.view import list_, plot, renew, status, watch


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


for _command in (
    *(login, check_auth, logout),
    *(prod_req, cons_req, inbound_request, outbound_request, update, release),
    *(status, list_, renew, watch, plot),
    stream,
    completion(s2uc, name="s2uc"),
):
    s2uc.add_command(_command)
