"""The commands of `s2uc` about streams that run: status, list, renew, watch, plot."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.live import Live

from scistream_flows.cli.answer import Form
from scistream_flows.cli.console import Span, in_time, in_units, plain, progress, put, put_document, say
from scistream_flows.cli.ledger import Ledger, Place
from scistream_flows.cli.listing import put_streams
from scistream_flows.cli.live import Sample, draw, picture, require_plot, samples
from scistream_flows.cli.options import (
    Known,
    facility_options,
    format_option,
    given_place,
    role_option,
    takes,
)
from scistream_flows.cli.place import connect, place
from scistream_flows.cli.request import MOCK_UID
from scistream_flows.cli.session import Session, Sight
from scistream_flows.errors import FacilityUnreachable, NotFound, ScistreamError
from scistream_flows.models import ListQuery, Role, Status

LONGEST_PAUSE_S: Final = 3600.0


@click.command()
@takes(click.argument("uid", type=Known()), facility_options(None), role_option, format_option)
def status(uid: str, role: Role | None, form: Form, **options: Any) -> None:
    """Show the sides of the stream UID."""
    if uid == MOCK_UID and options["s2cs"] is None:
        put_document({"uid": uid, "mock": True, "streams": []}) if form == "json" else put(f"{uid} MOCK")
        return
    places = Session(uid).places(given_place(options))
    with progress(f"asking for {uid}"), Sight(uid, _only(places, role)) as sight:
        sides = sight.look()
    _put_streams(list(sides.values()), form)


def _only(places: Mapping[Role, Place], role: Role | None) -> Mapping[Role, Place]:
    chosen = {one: where for one, where in places.items() if role in (None, one)}
    if not chosen:
        raise NotFound(f"this user has not opened the {role} side here", hint="Name its facility with --s2cs")
    return chosen


@click.command("list")
@takes(
    facility_options(None),
    click.option("--ended", is_flag=True, help="Also those of the last day."),
    format_option,
)
def list_(form: Form, *, ended: bool, **options: Any) -> None:
    """Show your streams: at --s2cs, or at every facility where you have opened one."""
    where = given_place(options)
    places = [where] if where else _known_places() or [place("localhost:5000")]
    found: list[Status] = []
    silent: dict[str, ScistreamError] = {}
    for number, one in enumerate(places, 1):
        with progress(f"asking {one.address} ({number} of {len(places)})"):
            try:
                with contextlib.closing(connect(one)) as facility:
                    there = facility.list(ListQuery(include_ended=ended)).streams
                found += there
                Ledger().forget_old(one, {(side.uid, side.role) for side in there})
            except ScistreamError as wrong:
                silent[one.address] = wrong
    if len(silent) == len(places) == 1:
        raise next(iter(silent.values()))
    if found or form == "json":
        _put_streams(found, form)
    elif not silent:
        say(f"no streams at {', '.join(one.address for one in places)}")
    for why in silent.values():
        say(plain(why.message))
    if silent:
        raise FacilityUnreachable(
            f"{len(silent)} of {len(places)} facilities could not be asked: {', '.join(silent)}",
            which=", ".join(silent),
            hint=f"Name one with --s2cs to ask only there. What you have opened where is in {Ledger().folder}",
        )


def _known_places() -> list[Place]:
    return list(dict.fromkeys(side.place for record in Ledger().all() for side in record.sides.values()))


def _put_streams(streams: Sequence[Status], form: Form) -> None:
    if form == "json":
        put_document({"streams": [one.model_dump(mode="json") for one in streams]})
    else:
        put_streams(streams)


@click.command()
@takes(
    click.argument("uid", type=Known()),
    click.option("--lease-s", type=Span(), metavar="TIME", help="[default: as it was requested]"),
    click.option("--keep", is_flag=True, help="Go on renewing, until Ctrl-C or the end of the stream."),
    facility_options(None),
    format_option,
)
def renew(uid: str, lease_s: float | None, form: Form, *, keep: bool, **options: Any) -> None:
    """Renew the lease of the stream UID."""
    wanted = None if lease_s is None else max(1, int(lease_s))
    with Sight(uid, Session(uid).places(given_place(options))) as sight, progress("") as now:
        sides = sight.renew(wanted)
        while keep and not all(one.ended for one in sides.values()):
            left_s = min((one.lease_remaining_s or 0 for one in sides.values() if not one.ended), default=0)
            now.says(f"{uid}: lease {in_time(left_s)}, renewed until Ctrl-C")
            time.sleep(min(max(0.2, left_s / 3), LONGEST_PAUSE_S))
            sides = sight.renew(wanted)
    if form == "json":
        put_document({"streams": [one.model_dump(mode="json") for one in sides.values()]})
        return
    for role, one in sides.items():
        over = f"has ended: {one.reason}" if one.ended else f"lease {in_time(one.lease_remaining_s or 0)}"
        put(f"{uid} ({role}): {over}")


@click.command()
@takes(
    click.argument("uid", type=Known()),
    click.option("--interval-s", type=Span(), default=1.0, help="Between two looks.  [default: 1s]"),
    click.option("--for-s", type=Span(), metavar="TIME", help="End after so long."),
    click.option("--renew", "renews", is_flag=True, help="Renew the lease at each look."),
    facility_options(None),
    format_option,
)
def watch(
    uid: str, interval_s: float, for_s: float | None, form: Form, *, renews: bool, **options: Any
) -> None:
    """Show the stream UID live, until Ctrl-C or its end. With --format json, a document on each line."""
    history: list[float] = []
    console = Console(highlight=False)
    with Sight(uid, Session(uid).places(given_place(options))) as sight, contextlib.ExitStack() as stack:
        shown = None
        if console.is_terminal and form != "json":
            shown = stack.enter_context(Live(console=console, auto_refresh=False))
        with contextlib.suppress(KeyboardInterrupt):  # it is how this ends
            for now in samples(sight, every_s=interval_s, for_s=for_s, renews=renews):
                history.append(now.total_bits_per_s)
                if shown is not None:
                    shown.update(picture(now, history), refresh=True)
                else:
                    put(json.dumps(now.document()) if form == "json" else now.line())


@click.command()
@takes(
    click.argument("uid", type=Known()),
    click.option("--seconds", type=Span(), default=30.0, help="For so long.  [default: 30s]"),
    click.option("--interval-s", type=Span(), default=0.5, help="Between two looks.  [default: 0.5s]"),
    click.option(
        "--output",
        type=click.Path(dir_okay=False, path_type=Path),
        default=Path("stream.png"),
        show_default=True,
        metavar="FILE",
        help="The picture, PNG.",
    ),
    facility_options(None),
    format_option,
)
def plot(uid: str, seconds: float, interval_s: float, output: Path, form: Form, **options: Any) -> None:
    """Draw the rate of the stream UID over the next seconds."""
    require_plot()
    if not os.access(output.parent, os.W_OK | os.X_OK):  # said before the waiting, not after it
        raise click.UsageError(f"--output: nothing can be written in {output.parent}")
    seen: list[Sample] = []
    with (
        Sight(uid, Session(uid).places(given_place(options))) as sight,
        progress(f"looking at {uid}") as now,
        contextlib.suppress(KeyboardInterrupt),  # what was seen until then is drawn
    ):
        for one in samples(sight, every_s=interval_s, for_s=seconds):
            seen.append(one)
            now.says(
                f"{in_time(one.at_s)} of {in_time(seconds)}: {in_units(one.total_bits_per_s, 'bit/s')}, Ctrl-C"
                " draws now"
            )
    if not seen:
        raise click.Abort
    draw(seen, output)
    if form == "json":
        put_document({"uid": uid, "file": str(output), "samples": [one.document() for one in seen]})
    else:
        put(str(output))
