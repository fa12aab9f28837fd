"""The command `appctrl`: hello for an application that says none itself, and applications to try a stream with.

It starts what it is told to start and ends nobody's processes. stdout is data, stderr is words.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import click

from scistream_flows import __version__
from scistream_flows.cli.console import (
    SETTINGS,
    Span,
    StreamName,
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
from scistream_flows.cli.place import addresses_in, connect, place
from scistream_flows.errors import BadRequest, FacilityUnreachable, MissingExtra, ScistreamError
from scistream_flows.models import Hello, Role, join_address, read, split_address
from scistream_flows.stream import ROLES

PORTS: Final = "5074,5075,5076,37000,47000"
CONTROLLER_IP: Final = "127.0.0.1"
S2CS: Final = "localhost:5000"
COMES_UP_WITHIN_S: Final = 10.0
_NO_TOKEN: Final = ("-", "INVALID_TOKEN", "")


class Asked:
    """What every command takes."""

    debug: bool = False


class Words(NamedTuple):
    """`UID [S2CS] ACCESS_TOKEN ROLE [CONTROLLER_IP]`."""

    uid: str
    s2cs: str
    role: Role
    controller_ip: str


@click.group(context_settings=dict(SETTINGS))
@click.option("--debug", is_flag=True, help="Log what is done, and show where an error comes from.")
@click.version_option(__version__, "--version", "-v", message="%(prog)s, version %(version)s")
@click.pass_obj
def appctrl(asked: Asked, *, debug: bool) -> None:
    """Say hello for an application, and try a stream with one."""
    asked.debug = debug
    if debug:
        show_debugging()


def main() -> NoReturn:
    """The entry point."""
    interrupted_by_sigterm()
    run(appctrl, name="appctrl", asked=Asked())


appctrl.add_command(completion(appctrl, name="appctrl"))


# --- hello


def _hello(command: str, *, help_text: str) -> None:
    @appctrl.command(command, help=help_text)
    @click.argument("words", nargs=-1, metavar="UID [S2CS] ACCESS_TOKEN ROLE [CONTROLLER_IP]")
    @click.option(
        "--ports", default=PORTS, show_default=True, metavar="PORT,…", help="PROD: where it listens."
    )
    @click.option("--scope", default="", metavar="SCOPE", help="Where not the one of the login is meant.")
    @click.option(
        "--server-cert", "--server-crt", metavar="FILE", help="Certificates to verify S2CS with, PEM."
    )
    @click.option("--format", "form", type=click.Choice(["default", "json"]), default="default")
    def say_hello(words: Sequence[str], ports: str, scope: str, server_cert: str | None, form: str) -> None:
        said = _read(words)
        where = place(said.s2cs, scope=scope, server_cert=server_cert)
        wish: dict[str, Any] = {"protocol": 1, "uid": said.uid, "role": said.role}
        if said.role == "PROD":
            wish["targets"] = list(addresses_in(said.controller_ip, ports, at_most=256))
        elif said.controller_ip != CONTROLLER_IP:
            wish["consumers"] = [said.controller_ip]
        hello = read(Hello, wish)
        with progress(f"hello to {said.s2cs}"), contextlib.closing(connect(where)) as facility:
            offer = facility.hello(hello)
        say("Hello message sent successfully")
        if form == "json":
            put_document(offer.model_dump(mode="json"))
            return
        for one in offer.addresses:
            put(f'listeners: "{one}"')


_hello(
    "create-appctrl",
    help_text="Say hello for the application at CONTROLLER_IP: at PROD it listens there at --ports, at CONS it connects"
    " from there. ACCESS_TOKEN is `-`: the token of the login, or of your own development facility.",
)
_hello("mock", help_text="The same hello, for an application that there is none of.")


def _read(words: Sequence[str]) -> Words:
    """The words by their place; the role tells which of them are left out."""
    at = next((at for at in (2, 3) if at < len(words) and words[at].upper() in ROLES), None)
    if at is None or len(words) > at + 2:
        raise click.UsageError("it takes UID [S2CS] ACCESS_TOKEN ROLE [CONTROLLER_IP], ROLE is PROD or CONS")
    token = words[at - 1]
    if token not in _NO_TOKEN:
        raise BadRequest(
            "a token on a command line can be read by everybody on this machine",
            which="ACCESS_TOKEN",
            hint="Give `-`: the token of `s2uc login` is taken, or that of your own development facility",
        )
    role: Role = "PROD" if words[at].upper() == "PROD" else "CONS"
    uid = StreamName().convert(words[0], None, None)
    return Words(
        uid, words[1] if at == 3 else S2CS, role, words[at + 1] if len(words) > at + 1 else CONTROLLER_IP
    )


# --- iperf3


@appctrl.command("iperf-server")
@click.argument("port", type=click.IntRange(1, 65_535), default=7000)
def iperf_server(port: int) -> None:
    """Serve iperf3 at PORT, until Ctrl-C."""
    iperf3 = _iperf3()
    sys.stdout.flush()
    os.execv(iperf3, [iperf3, "--server", "--port", str(port)])  # noqa: S606 - it is this program from here on


@appctrl.command("iperf-client")
@click.argument("target", default="127.0.0.1:7000")
@click.option("--time-s", type=Span(), default=10, help="How long it measures.  [default: 10s]")
@click.option(
    "--wait-s", type=Span(), default=COMES_UP_WITHIN_S, help="For TARGET to be there.  [default: 10s]"
)
def iperf_client(target: str, time_s: float, wait_s: float) -> None:
    """Measure with iperf3 from TARGET to here."""
    iperf3 = _iperf3()
    host, port = _address(target)
    command = [
        iperf3,
        "--client",
        host,
        "--port",
        str(port),
        "--time",
        str(max(1, round(time_s))),
        "--reverse",
    ]
    deadline = time.monotonic() + wait_s
    with progress(f"iperf3 to {target}") as now:
        while True:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 or time.monotonic() >= deadline or "onnect" not in done.stderr:
                break
            now.says(f"{target} is not there yet")
            time.sleep(0.5)
    put(done.stdout.rstrip())
    if done.returncode:
        raise ScistreamError(
            f"iperf3: {done.stderr.strip() or 'it failed'}",
            which=target,
            hint="Start `appctrl iperf-server` at the other end, and see `s2uc status`",
        )


def _iperf3() -> str:
    found = shutil.which("iperf3")
    if found is None:
        raise MissingExtra(
            "iperf3 is not installed", which="iperf3", hint="Debian, Ubuntu: apt-get install iperf3"
        )
    return found


# --- ZeroMQ


@appctrl.command("run-producer")
@click.argument("port", type=click.IntRange(0, 65_535), default=7000)
@click.option("--bind", default="127.0.0.1", show_default=True, metavar="IP", help="The address to bind.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Messages.  [default: until Ctrl-C]")
@click.option("--every-s", type=Span(), default=1.0, help="Between two messages.  [default: 1s]")
def run_producer(port: int, bind: str, count: int | None, every_s: float) -> None:
    """Publish numbered messages over ZeroMQ at PORT."""
    zmq = _zmq()
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 1000
        try:
            publisher.bind(f"tcp://{join_address(bind, port)}" if port else f"tcp://{bind}:*")
        except zmq.ZMQError as wrong:
            raise ScistreamError(
                f"port {port} cannot be bound: {wrong.strerror}", which=str(port), hint="Choose another port"
            ) from None
        put(f"publishing at {publisher.last_endpoint.decode().removeprefix('tcp://')}")
        number = 0
        while count is None or number < count:
            publisher.send_string(f"message {number}")
            number += 1
            time.sleep(every_s)


@appctrl.command("subscribe")
@click.argument("target", default="127.0.0.1:7000")
@click.option("--count", type=click.IntRange(1), metavar="N", help="Messages.  [default: until Ctrl-C]")
@click.option("--timeout-s", type=Span(), metavar="TIME", help="Give up when so long no message comes.")
def subscribe(target: str, count: int | None, timeout_s: float | None) -> None:
    """Print the messages that are published at TARGET."""
    host, port = _address(target)
    zmq = _zmq()
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        subscriber.ipv6 = ":" in host
        subscriber.subscribe("")
        subscriber.connect(f"tcp://{join_address(host, port)}")
        number = 0
        while count is None or number < count:
            if not subscriber.poll(None if timeout_s is None else round(1000 * timeout_s)):
                raise FacilityUnreachable(
                    f"no message has come from {target} for {timeout_s:g} s",
                    which=target,
                    hint="See that `appctrl run-producer` runs, and `s2uc status`",
                )
            # whoever publishes there may say anything
            put(plain(b" ".join(subscriber.recv_multipart()).decode(errors="backslashreplace")))
            number += 1


def _zmq() -> Any:
    try:
        import zmq
    except ImportError:
        raise MissingExtra(
            "pyzmq is not installed", which="pyzmq", hint="pip install 'scistream-flows[appctrl]'"
        ) from None
    return zmq


def _address(target: str) -> tuple[str, int]:
    try:
        return split_address(target)
    except ValueError as wrong:
        raise BadRequest(str(wrong), which=target) from None
