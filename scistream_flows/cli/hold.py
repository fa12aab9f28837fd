"""The command `s2uc stream`: both sides at once, held until Ctrl-C."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import click

from scistream_flows.cli.answer import Form
from scistream_flows.cli.console import Progress, Span, in_units, plain, progress, put, put_document, say
from scistream_flows.cli.ledger import Entry, Ledger
from scistream_flows.cli.live import why
from scistream_flows.cli.options import format_option, name_option, takes, wish_options, wishes
from scistream_flows.cli.place import connect, place
from scistream_flows.errors import WaitTimeout
from scistream_flows.stream import ROLES, Stream, StreamEnd, open_stream


@click.command()
@takes(
    click.argument("prod_facility"),
    click.argument("cons_facility"),
    click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="HOST:PORT",
        help="The listening application. Repeat it.",
    ),
    click.option("--consumer", "consumers", multiple=True, metavar="NETWORK", help="May connect. Repeat it."),
    click.option(
        "--until",
        type=click.Choice(["released", "closed"]),
        default="released",
        show_default=True,
        help="closed: it ends after its last connection.",
    ),
    click.option(
        "--ready-timeout-s", type=Span(), default=60.0, metavar="TIME", help="For READY.  [default: 60s]"
    ),
    click.option("--server-cert", "--server-crt", metavar="FILE", help="Certificates to verify both with."),
    wish_options(lease_s=60, num_conn=1),
    name_option,
    format_option,
)
def stream(
    prod_facility: str,
    cons_facility: str,
    targets: Sequence[str],
    consumers: Sequence[str],
    until: Literal["released", "closed"],
    ready_timeout_s: float,
    server_cert: str | None,
    uid: str | None,
    form: Form,
    **options: Any,
) -> None:
    """Open both sides of a stream, hold it until Ctrl-C, and release it.

    From PROD_FACILITY, where the application listens, to CONS_FACILITY. Prints where to connect when a probe has gone
    through to the target. Without --target that is when both relays know each other; the target comes by a hello.
    """
    wish, chosen = wishes(options)
    uid = uid or str(uuid.uuid4())
    ledger = Ledger()
    with contextlib.ExitStack() as closing:
        places = [place(one, server_cert=server_cert) for one in (prod_facility, cons_facility)]
        facilities = [closing.enter_context(contextlib.closing(connect(one))) for one in places]
        with progress(f"opening {uid}") as now:
            opened = open_stream(
                facilities[0],
                facilities[1],
                uid=uid,
                targets=targets,
                consumers=consumers,
                until=until,
                ready_timeout_s=ready_timeout_s,
                on_progress=lambda step: now.says(f"{uid}: {step.step}, {step.elapsed_s:.1f} s"),
                rate_mbits_per_s=wish["rate_mbits_per_s"] if "rate" in chosen else 0,
                **{name: wish[name] for name in ("mode", "num_conn", "gateways", "probe")},
                **{name: wish[name] for name in ("lease_s", "lifetime_s", "hello_timeout_s")},
            )
        with opened:
            for role, where in zip(ROLES, places, strict=True):
                ledger.keep(uid, role, Entry(place=where, offer=opened.offers[role]))
                closing.callback(ledger.forget, uid, role)
            _put_opened(opened, form)
            try:
                end = _hold(opened).check()
            except KeyboardInterrupt:  # it is how this ends
                say(f"releasing {uid}")
            else:
                say(plain(f"{uid} has ended: {end.reasons['CONS']}"))


def _put_opened(opened: Stream, form: Form) -> None:
    if form == "json":
        put_document({"uid": opened.uid, "mode": opened.mode, "listeners": opened.listeners})
        return
    put(f"uid: {opened.uid}")
    for one in opened.listeners:
        put(f'listeners: "{one}"')
    put(f"Listeners: {opened.listeners!r}")


def _hold(opened: Stream) -> StreamEnd:
    """Wait for the end of a stream, and show meanwhile what goes through it."""
    with progress("open, until Ctrl-C") as now:
        if not now.shows:
            return opened.wait()
        end = None
        while end is None:
            end = _look(opened, now)
        return end


def _look(opened: Stream, now: Progress) -> StreamEnd | None:
    """The end of a stream, if it comes within a second."""
    try:
        return opened.wait(timeout_s=1.0)
    except WaitTimeout:
        seen = opened.status()
        rate = in_units(seen.bits_per_s.to_consumer + seen.bits_per_s.to_producer, "bit/s")
        moved = in_units(seen.bytes.to_consumer + seen.bytes.to_producer, "B")
        now.says(f"open, until Ctrl-C: {rate}, {moved}, limited by {why(seen.limiting)}")
        return None
