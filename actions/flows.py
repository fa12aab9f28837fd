"""The command `scistream-flows`: render a flow for two facilities, check it, run it here, put it at Globus.

stdout is data, stderr is words; it exits with 0 when done, 1 on our errors, 2 on wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeAlias

import click
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from scistream_flows import __version__
from scistream_flows.cli.console import CANCELLED, SETTINGS, plain, put, put_document, say, show_debugging
from scistream_flows.cli.console import run as run_command
from scistream_flows.errors import BadRequest, MissingExtra
from scistream_flows.tokens import Tokens

if TYPE_CHECKING:
    from .render import FlowDocument
    from .runner import Run

Format: TypeAlias = Literal["text", "json"]

FIRST_RELEASE: Final = "ReleaseConsumerRelay"
"""The state of our definitions at which both sides are released, whatever came before."""

_DEFINITIONS: Final = ("slices", "action-providers", "compute-only")


@dataclass
class Asked:
    """What every subcommand takes."""

    debug: bool = False


class Commands(click.Group):
    """A group that says which extra a missing module belongs to."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as missing:
            if (missing.name or "").startswith("scistream_flows"):
                raise
            raise MissingExtra(
                f"{missing.name} is not installed",
                which=missing.name or "",
                hint="pip install 'scistream-flows[flows]'",
            ) from None


_format = click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    help="For people, or one JSON document.",
)


@click.group(cls=Commands, context_settings=dict(SETTINGS))
@click.option("--debug", is_flag=True, help="Log what is done, and show where an error comes from.")
@click.version_option(__version__, "--version", "-V", message="%(prog)s, version %(version)s")
@click.pass_obj
def flows(asked: Asked, *, debug: bool) -> None:
    """Streams between facilities as steps of Globus Flows."""
    asked.debug = debug
    if debug:
        show_debugging()


def main() -> NoReturn:
    """The entry point."""
    run_command(flows, name="scistream-flows", asked=Asked())


# --- render


@flows.command()
@click.argument("definition", type=click.Choice(_DEFINITIONS))
@click.option("--producer", required=True, metavar="URL|UUID", help="The facility of the instrument.")
@click.option("--consumer", required=True, metavar="URL|UUID", help="The facility of the analysis.")
@click.option(
    "--producer-functions", type=click.Path(), metavar="FILE", help="compute-only: JSON, verb to UUID."
)
@click.option(
    "--consumer-functions", type=click.Path(), metavar="FILE", help="compute-only: JSON, verb to UUID."
)
@click.option(
    "--analysis-endpoint", metavar="UUID", help="Start the analysis on this Globus Compute endpoint."
)
@click.option("--start-analysis-function", metavar="UUID", help="The function that starts it.")
@click.option("--collect-analysis-function", metavar="UUID", help="The function that collects its result.")
@click.option(
    "--analysis-wait-s", type=int, default=600, show_default=True, help="For the analysis to start."
)
@click.option("--lease-s", type=int, help="Of the relays; by default the shortest that is safe.")
@click.option("--slice-s", type=int, default=30, show_default=True, help="slices: so old can progress be.")
@click.option(
    "--poll-every-s", type=int, default=30, show_default=True, help="compute-only: between two looks."
)
@click.option(
    "--hello-timeout-s", type=int, default=180, show_default=True, help="For the stream to become ready."
)
@click.option(
    "--part",
    type=click.Choice(["flow", "definition", "input-schema"]),
    default="flow",
    show_default=True,
    help="All that `deploy` takes, or one part of it for other tools.",
)
def render(
    definition: str,
    *,
    producer: str,
    consumer: str,
    producer_functions: str | None,
    consumer_functions: str | None,
    analysis_endpoint: str | None,
    start_analysis_function: str | None,
    collect_analysis_function: str | None,
    part: str,
    **seconds: Any,
) -> None:
    """Write the flow DEFINITION for a pair of facilities to stdout.

    slices (recommended) is watched in slices, so that progress is fresh; action-providers in one step;
    compute-only needs no service at the facilities, only Globus Compute endpoints (their UUIDs as PRODUCER and
    CONSUMER).
    """
    from .render import Analysis
    from .render import render as render_flow

    analysis = None
    parts = (analysis_endpoint, start_analysis_function, collect_analysis_function)
    if any(parts):
        if not (analysis_endpoint and start_analysis_function and collect_analysis_function):
            raise BadRequest(
                "an analysis has an endpoint and two functions",
                which="analysis",
                hint="Give --analysis-endpoint, --start-analysis-function and --collect-analysis-function, or none",
            )
        analysis = Analysis(
            endpoint_id=analysis_endpoint,
            start_function_id=start_analysis_function,
            collect_function_id=collect_analysis_function,
        )
    flow = render_flow(
        definition,
        producer=producer,
        consumer=consumer,
        producer_functions=_object(producer_functions) if producer_functions else None,
        consumer_functions=_object(consumer_functions) if consumer_functions else None,
        analysis=analysis,
        **seconds,
    )
    document = flow.model_dump(mode="json")
    put(json.dumps(document if part == "flow" else document[part.replace("-", "_")], indent=2))


# --- validate


@flows.command()
@click.argument("flow", type=click.Path(), metavar="FILE")
@_format
def validate(flow: str, *, form: Format) -> None:
    """Name every problem of the flow in FILE: what `render` wrote, or a bare definition."""
    from .render import validate as validate_flow

    document = _flow(flow)
    found = validate_flow(document.definition, input_schema=document.input_schema)
    valid = not any(one.level == "error" for one in found)
    if form == "json":
        put_document({"valid": valid, "problems": [vars(one) for one in found]})
    else:
        for problem in found:
            put(str(problem))
    say(f"{flow}: {'valid' if valid else 'not valid'}")
    if not valid:
        raise click.exceptions.Exit(1)


# --- run


@flows.command()
@click.argument("flow", type=click.Path(), metavar="FILE")
@click.option("--local", is_flag=True, help="On this machine. Required: runs at Globus are started there.")
@click.option(
    "--input", "flow_input", type=click.Path(allow_dash=True), metavar="FILE", help="JSON; - is stdin."
)
@click.option("--label", help="Of the run and its actions, 1 to 64 characters.")
@click.option("--manager", "managers", multiple=True, metavar="URN", help="May also manage the streams.")
@click.option("--monitor", "monitors", multiple=True, metavar="URN", help="May also see the streams.")
@click.option(
    "--polling",
    type=click.Choice(["fast", "globus"]),
    default="fast",
    show_default=True,
    help="How often actions are asked; globus: ever more rarely, up to every ten minutes.",
)
@click.option(
    "--token",
    "pins",
    multiple=True,
    metavar="URL=FILE",
    help="The token (0600 file) for addresses that begin with URL.",
)
@click.option(
    "--on-cancel",
    type=click.Choice(["release", "leave"]),
    default="release",
    show_default=True,
    help="After Ctrl-C: release both sides, or leave them to their leases, as Globus does.",
)
@_format
def run(
    flow: str,
    *,
    local: bool,
    flow_input: str | None,
    label: str | None,
    managers: Sequence[str],
    monitors: Sequence[str],
    polling: str,
    pins: Sequence[str],
    on_cancel: str,
    form: Format,
) -> None:
    """Run the flow in FILE here, against real action providers.

    The token of a development facility on this machine is found by itself, when it is yours. Ctrl-C cancels the run; at
    Globus nothing of a cancelled run would be executed any more, here both sides are released unless you say otherwise.
    """
    from . import language, runner

    if not local:
        raise BadRequest(
            "run needs --local",
            which="run",
            hint="Put a flow at Globus with `deploy`, and start it there: `globus flows start`",
        )
    document = _flow(flow)
    definition = language.Definition(document.definition, flow)
    given = _object(flow_input) if flow_input else {}
    screen = Screen(Console(stderr=True, highlight=False))
    tokens = Tokens(pins, tell=screen.note)
    pace = runner.Polling.globus() if polling == "globus" else runner.Polling()

    def start(events: Callable[[Mapping[str, Any]], object], cancelled: threading.Event) -> Run:
        return runner.run(
            definition,
            given,
            authorizer=tokens,
            input_schema=document.input_schema or None,
            polling=pace,
            label=label,
            managers=managers,
            monitors=monitors,
            on_event=events,
            cancelled=cancelled,
        )

    ended = _followed(start, screen)
    released: Run | None = None
    streams = FIRST_RELEASE in definition.states
    if ended.status == "ENDED" and on_cancel == "release" and streams:
        screen.note("releasing both sides; at Globus a cancelled run leaves them to their leases")
        part = language.Definition(_release_part(document.definition, ended.run_id), flow)

        def release(events: Callable[[Mapping[str, Any]], object], _: threading.Event) -> Run:
            return runner.run(part, ended.output or {}, authorizer=tokens, on_event=events)

        released = _followed(release, screen, interrupted="still releasing")
    if ended.status == "ENDED" and streams and not _is_released(released):
        screen.note(
            f"stream {ended.run_id} was not released on both sides: what is left of it ends by its lease"
        )
    _report(ended, released, screen, form=form)
    if ended.status != "SUCCEEDED":
        raise click.exceptions.Exit(CANCELLED if ended.status == "ENDED" else 1)


def _is_released(released: Run | None) -> bool:
    """Whether both sides answered the release."""
    return (
        released is not None
        and released.status == "SUCCEEDED"
        and not any(key.endswith("release_error") for key in released.output or {})
    )


def _report(ended: Run, released: Run | None, screen: Screen, *, form: Format) -> None:
    if form == "json":
        put_document(
            {
                **ended.to_document(),
                "error": ended.error,
                "cause": ended.cause,
                "state_name": ended.state_name,
                "output": ended.output,
                "released": None if released is None else _is_released(released),
                "log": [*ended.log, *(released.log if released else ())],
            }
        )
        return
    put(f"{ended.status} run {ended.run_id} in {screen.elapsed_s:.1f} s")
    if ended.status == "FAILED":
        error = (ended.output or {}).get("error") if isinstance(ended.output, dict) else None
        say(f"error: {plain(_why(error) or _why({'Error': ended.error, 'Cause': ended.cause}))}")


def _why(error: Any) -> str:
    """A caught error in one line: the state of the action, the error's name, and what its provider said."""
    from .client import in_words

    if not isinstance(error, dict):
        return ""
    cause = error.get("Cause")
    state = cause.get("state_name") if isinstance(cause, dict) else None
    return ": ".join(
        str(one) for one in (state, error.get("Error"), in_words(cause) if cause else None) if one
    )


def _release_part(definition: Mapping[str, Any], run_id: str) -> dict[str, Any]:
    """The definition from the releases on, with the run's id written down: a run of its own would have another."""
    from .language import successors

    states = definition["States"]
    kept: list[str] = []
    waiting = [FIRST_RELEASE]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.append(name)
            waiting.extend(successors(states[name]))
    return {"StartAt": FIRST_RELEASE, "States": {name: _with_run_id(states[name], run_id) for name in kept}}


def _with_run_id(part: Any, run_id: str) -> Any:
    if isinstance(part, list):
        return [_with_run_id(one, run_id) for one in part]
    if not isinstance(part, dict):
        return part
    return {
        key.removesuffix(".$") if value == "$._context.run_id" else key: (
            run_id if value == "$._context.run_id" else _with_run_id(value, run_id)
        )
        for key, value in part.items()
    }


def _followed(
    start: Callable[[Callable[[Mapping[str, Any]], object], threading.Event], Run],
    screen: Screen,
    *,
    interrupted: str = "cancelling",
) -> Run:
    """Run a flow in a thread and show its events; Ctrl-C and SIGTERM cancel it, a second one leaves at once."""
    events: queue.SimpleQueue[Mapping[str, Any] | signal.Signals | None] = queue.SimpleQueue()
    cancelled = threading.Event()
    outcome: list[Run | BaseException] = []

    def work() -> None:
        try:
            outcome.append(start(events.put, cancelled))
        except BaseException as wrong:  # noqa: BLE001 - raised again where it is waited for
            outcome.append(wrong)
        events.put(None)

    with _signals_told(events.put), screen:
        thread = threading.Thread(target=work, name="run", daemon=True)
        thread.start()
        while (event := events.get()) is not None:
            if not isinstance(event, signal.Signals):
                screen.show(event)
            elif cancelled.is_set():
                screen.note("left; what is open ends by its lease")
                raise click.exceptions.Exit(CANCELLED)
            else:
                cancelled.set()
                screen.note(f"{interrupted}; again to leave at once")
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextmanager
def _signals_told(tell: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Ctrl-C and SIGTERM are told, not raised: an exception could come anywhere, also between words or in tidying."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: tell(signal.Signals(got))) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Screen:
    """The progress of a run, on stderr: one line for each step that is done, a live one for the step at work."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._began = time.monotonic()
        self._entered: dict[str, float] = {}
        self._said: tuple[str, str] | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the beginning, seconds."""
        return time.monotonic() - self._began

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, words: str) -> None:
        """Say something."""
        self._console.print(Text(plain(words), style="dim"))

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event of the run."""
        details = event["details"]
        name, kind = details.get("state_name"), details.get("state_type")
        if kind not in ("Action", "Wait"):
            return
        what = event["code"].removeprefix(kind)
        output = details.get("output")
        said = output.get("display_status") if isinstance(output, dict) else None
        if what == "Started":
            self._entered[name] = time.monotonic()
            self._working(name, "" if kind == "Action" else f"{details['input']['seconds']} s")
        elif what == "Polled":
            self._working(name, said or output["status"])
        elif what == "Completed" and kind == "Action":
            self._done("✓", "green", name, said or "")
        elif what in ("Failed", "Canceled", "Abandoned"):
            why = _why({"Error": details.get("error"), "Cause": details.get("cause")})
            self._done("✗", "red", name, why or event["description"])

    def _working(self, name: str, said: str) -> None:
        said = plain(str(said))  # a provider's words
        if self._live is not None:
            self._live.update(Spinner("dots", Text(f"{name}  {said}")))
        elif said and (name, said) != self._said:
            self._said = (name, said)
            self._console.print(Text(f"  {name}  {said}"), soft_wrap=True)

    def _done(self, sign: str, colour: str, name: str, said: str) -> None:
        took_s = time.monotonic() - self._entered.get(name, self._began)
        line = Text.assemble((sign, colour), f" {name}  {plain(str(said))}  ", (f"{took_s:.1f} s", "dim"))
        self._console.print(line, soft_wrap=True)


# --- Globus


_client_id = click.option(
    "--client-id",
    required=True,
    envvar="SCISTREAM_FLOWS_CLIENT_ID",
    show_envvar=True,
    metavar="UUID",
    help="Your application at Globus (app.globus.org, Settings, Developers).",
)
_client_secret = click.option(
    "--client-secret-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Its secret, if it has one (0600).",
)


@flows.command()
@click.argument("flow", type=click.Path(), metavar="FILE")
@_client_id
@_client_secret
@click.option("--flow-id", metavar="UUID", help="Update this flow instead of creating one.")
@click.option("--viewer", "viewers", multiple=True, metavar="URN", help="May see it; also `public`.")
@click.option("--starter", "starters", multiple=True, metavar="URN", help="May run it.")
@click.option("--administrator", "administrators", multiple=True, metavar="URN", help="May change it.")
@click.option("--subscription-id", metavar="UUID", help="What a second flow needs at Globus.")
@_format
def deploy(
    flow: str, *, client_id: str, client_secret_file: Path | None, form: Format, **options: Any
) -> None:
    """Put the flow in FILE at Globus Flows, or update the one there.

    The services of both facilities must run: Globus asks them for their scopes.
    """
    from . import deploy as globus

    document = _flow(flow)
    app = globus.globus_app(client_id=client_id, client_secret_file=client_secret_file)
    deployed = globus.deploy(document, client=globus.flows_client(app), **options)
    if form == "json":
        put_document(deployed.to_document())
        return
    say(f"{'created' if deployed.created else 'updated'} {deployed.title!r}")
    say(f"start it at {deployed.url}")
    put(deployed.flow_id)


@flows.command()
@click.argument("name")
@_client_id
@_client_secret
@click.option(
    "--secret-file", type=click.Path(path_type=Path), required=True, metavar="FILE", help="To be made, 0600."
)
@click.option("--project-id", metavar="UUID", help="An existing project at Globus.")
@click.option("--contact-email", help="For a new project.")
@_format
def register(
    name: str, *, client_id: str, client_secret_file: Path | None, form: Format, **options: Any
) -> None:
    """Register the facility NAME at Globus Auth: its client, the scope of its actions, and its secret in a file.

    Writes the table for the facility's configuration to stdout.
    """
    from . import deploy as globus

    app = globus.globus_app(client_id=client_id, client_secret_file=client_secret_file)
    registered = globus.register(name, client=globus.auth_client(app), **options)
    if form == "json":
        put_document(registered.to_document())
        return
    say(f"registered {name}; its secret is in {registered.secret_file}")
    say("add this to the facility's configuration:")
    put(registered.table.rstrip())


# --- files


def _flow(name: str) -> FlowDocument:
    from .render import read_flow

    return read_flow(_text(name), what=name)


def _object(name: str) -> dict[str, Any]:
    from .language import read_object

    return read_object(_text(name), name=name)


def _text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as wrong:
        words = wrong.strerror if isinstance(wrong, OSError) else "it is not UTF-8"
        raise BadRequest(f"{name} cannot be read: {words}", which=name, hint="Name another file") from None
