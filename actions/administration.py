"""The command `s2cs`: for whoever runs a facility. Without a subcommand it serves the facility.

It works on the facility's state directory, so it needs no server, and no rights but those of its owner.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn
from uuid import UUID

import click
from click.core import ParameterSource

from scistream_flows import __version__
from scistream_flows.cli.console import (
    SETTINGS,
    Span,
    completion,
    in_time,
    in_units,
    plain,
    progress,
    put,
    put_document,
    put_long_document,
    put_table,
    run,
    say,
    show_debugging,
)
from scistream_flows.cli.listing import end_in_words, put_streams
from scistream_flows.config import SYSTEM_CONFIG, FacilityConfig, GlobusConfig, config_folders, load_facility
from scistream_flows.errors import (
    BadRequest,
    ConfigError,
    MissingExtra,
    NotFound,
    ScistreamError,
    WaitTimeout,
)
from scistream_flows.haproxy import find_haproxy
from scistream_flows.models import UID_PATTERN, DataServer, Released, Role

from .auth import SECRET_VARIABLE
from .settings import Settings, common, configured_facilities, with_settings
from .template import Place, template, write

if TYPE_CHECKING:
    from scistream_flows.diagnosis import Finding
    from scistream_flows.models import GatewayReport, Status
    from scistream_flows.s2cs import S2CS

DATA_SERVERS: Final[Mapping[str, DataServer]] = {"S2DS": "s2ds", "Haproxy": "haproxy"}
"""What `--type` takes, and how the configuration names it."""

POLL_S: Final = 1.0
_COLOURS: Final[dict[str, str]] = {"ok": "green", "note": "blue", "warning": "yellow", "problem": "red"}


# --- serving


@click.group(invoke_without_command=True, context_settings=dict(SETTINGS))
@common
@click.option(
    "--listener-ip", default="127.0.0.1", show_default=True, help="Serve: bind exactly this address."
)
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=5000, show_default=True, help="Serve: at this port."
)
@click.option("--port-range", metavar="FIRST-LAST", help="Serve: ports for listeners, on every gateway.")
@click.option(
    "--certificate",
    "--server-crt",
    "--server-cert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Serve: the certificate chain, PEM.",
)
@click.option(
    "--key", "--server-key", type=click.Path(path_type=Path), metavar="FILE", help="Serve: its private key."
)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Serve: processes.")
@click.option(
    "--type",
    "-t",
    "data_server",
    metavar="TYPE",
    help=f"Serve: what carries the data: {' or '.join(DATA_SERVERS)}.  [default: as configured, else S2DS]",
)
@click.option(
    "--ssl",
    is_flag=False,
    flag_value="True",
    type=click.BOOL,
    metavar="BOOL",
    help="Serve: False serves plain text, on loopback.  [default: TLS if there is a certificate]",
)
@click.option("--client-id", type=click.UUID, help="Serve: the facility's client at Globus.")
@click.option(
    "--client-secret-file", type=click.Path(path_type=Path), metavar="FILE", help="Serve: its secret (0600)."
)
@click.option(
    "--client-secret",
    metavar="-",
    help="Serve: `-` reads the secret from stdin. On a command line everybody could read it.",
)
@click.option("--verbose", "--v", "-v", is_flag=True, help="Serve: log what is done.")
@click.version_option(__version__, "--version", "-V", message="s2cs, version: %(version)s")
@click.pass_context
def s2cs(
    context: click.Context,
    listener_ip: str,
    port: int,
    port_range: str | None,
    certificate: Path | None,
    key: Path | None,
    workers: int,
    data_server: str | None,
    client_id: UUID | None,
    client_secret_file: Path | None,
    client_secret: str | None,
    *,
    ssl: bool | None,
    verbose: bool,
) -> None:
    """Run a SciStream facility. Without a subcommand: serve it, until Ctrl-C.

    It is the one that --facility names, else $SCISTREAM_FACILITY, else the only one that is configured.
    """
    given = [
        one.name for one in context.command.params if one.expose_value and _is_given(context, one.name or "")
    ]
    if context.invoked_subcommand is not None:
        if given:
            raise click.UsageError(
                f"--{str(given[0]).replace('_', '-')} is for serving, not for {context.invoked_subcommand}"
            )
        return
    carrier = None if data_server is None else _data_server(data_server)
    _check_port_range(port_range)
    certificate, key = _check_ssl(ssl, certificate, key)
    config = context.ensure_object(Settings).load(port_range=port_range, otherwise=f"dev-{port}")
    config = _with_client(config, client_id, client_secret_file, client_secret)
    if carrier is not None:
        config = config.carried_by(carrier)
    if config.data_server == "haproxy":
        find_haproxy()
    if verbose:
        show_debugging()
    try:
        from .service import serve
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("scistream_flows"):
            raise
        raise MissingExtra(
            f"serving needs {missing.name}, which is not installed",
            which=missing.name or "",
            hint="pip install 'scistream-flows[server]'",
        ) from None
    serve(config, listener_ip=listener_ip, port=port, certificate=certificate, key=key, workers=workers)


def _data_server(name: str) -> DataServer:
    known = {spelled.lower(): one for spelled, one in DATA_SERVERS.items()}
    if name.lower() not in known:
        raise BadRequest(
            f"--type {name!r}: there is no such data server in this version",
            which="type",
            hint=f"Use {' or '.join(DATA_SERVERS)}; the relay s2ds takes the place of Nginx and Stunnel",
        )
    return known[name.lower()]


def _check_port_range(text: str | None) -> None:
    if text is not None and not re.fullmatch("[0-9]+-[0-9]+|0", text):
        raise BadRequest(
            "Invalid port_range format. Expected 'start-end'.", which="port_range", hint="Such as 5100-5200"
        )


def _check_ssl(
    wanted: bool | None,  # noqa: FBT001 - as it was given
    certificate: Path | None,
    key: Path | None,
) -> tuple[Path | None, Path | None]:
    """The certificate and the key to serve with; none for plain text."""
    if wanted and certificate is None:
        raise BadRequest(
            "--ssl needs a certificate", which="ssl", hint="Give --server_crt FILE and --server_key FILE"
        )
    return (None, None) if wanted is False else (certificate, key)


def _with_client(
    config: FacilityConfig, client_id: UUID | None, secret_file: Path | None, given: str | None
) -> FacilityConfig:
    """The configuration with the client at Globus that the options name."""
    from_stdin = given == "-"
    if given and not from_stdin:
        raise BadRequest(
            "a secret on a command line can be read by everybody on this machine",
            which="client_secret",
            hint="Put it into a file (0600) and give --client-secret-file FILE, name that in the configuration"
            " ([globus] client_secret_file), or give --client_secret - and write it to stdin",
        )
    if client_id is None:
        if secret_file is not None or from_stdin:
            raise BadRequest("a secret without a client", which="client_id", hint="Give --client_id, too")
        return config
    if from_stdin:
        # relays do not inherit the environment
        os.environ[SECRET_VARIABLE] = click.get_text_stream("stdin").readline().strip()
    changes: dict[str, Any] = {"client_id": str(client_id)}
    if secret_file is not None:
        changes["client_secret_file"] = str(secret_file.resolve())
    known = config.globus.model_dump(exclude_unset=True) if config.globus else {}
    return config.model_copy(update={"globus": GlobusConfig(**{**known, **changes})})


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


# --- init


class _Gateway(click.ParamType):
    """`NAME`, on this machine, or `NAME=HOST`, over SSH."""

    name = "gateway"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        """The gateway that `value` spells."""
        name, separator, host = str(value).partition("=")
        if not re.fullmatch(UID_PATTERN, name) or (
            separator and not (host.isprintable() and re.fullmatch(r'[^\s@/"\\-][^\s@/"\\]*', host))
        ):
            self.fail(f"{value!r} is neither NAME nor NAME=HOST", param, ctx)
        return Place(name, host if separator else None)


@s2cs.command()
@click.argument("name")
@click.option("--directory", type=click.Path(path_type=Path), metavar="DIR", help="Where the file goes.")
@click.option("--force", is_flag=True, help="Replace a file that is there; the old one is kept beside it.")
@click.option(
    "--gateway",
    "gateways",
    type=_Gateway(),
    multiple=True,
    metavar="NAME[=HOST]",
    help="A gateway on this machine, or on HOST over SSH. Repeat it for more.  [default: gw1]",
)
@click.option(
    "--compute",
    metavar="ENDPOINT",
    help="Instead, the Globus Compute endpoint ENDPOINT for the facility, which is configured: its functions are"
    " registered, its directory is written.",
)
@click.option("--email", default="", help="--compute: whom to ask; needed for an endpoint of root.")
@click.option("--flows", is_flag=True, help="--compute: Globus Flows will use it too. Not verified.")
@common
@with_settings
def init(
    settings: Settings,
    name: str,
    directory: Path | None,
    gateways: Sequence[Place],
    compute: str | None,
    email: str,
    *,
    force: bool,
    flows: bool,
) -> None:
    """Write a commented facility.toml for the facility NAME.

    It goes to $SCISTREAM_CONFIG_DIR, else for root to /etc/scistream, else to $XDG_CONFIG_HOME/scistream. Until you
    edit it, its gateways listen on loopback only and nobody may connect anywhere.
    """
    if compute is not None:
        _write_endpoint(settings, name, compute, email=email, flows=flows, force=force)
        return
    if email or flows:
        raise click.UsageError("--email and --flows go with --compute")
    if not re.fullmatch(UID_PATTERN, name):
        raise BadRequest(
            f"{name!r} cannot be the name of a facility",
            which=name,
            hint="Use letters, digits, '_', '-' and '.', 64 at most, the first a letter or digit",
        )
    names = [one.name for one in gateways]
    if len(set(names)) < len(names):
        raise BadRequest("two gateways have the same name", hint="Give each gateway a name of its own")
    folder = directory or _folder()
    text = template(name, list(gateways) or [Place("gw1")])
    written = write(text, facility=name, folder=folder, replace=force)
    if settings.json:
        put_document(
            {
                "facility": name,
                "file": str(written.file),
                "replaced": str(written.replaced) if written.replaced else None,
            }
        )
    else:
        put(str(written.file))
    if written.replaced:
        say(f"The old one is {written.replaced}.")
    option = _option_for(name, written.file)
    say("Next: edit it (addresses, ports, who may do what), then look whether this machine is fit for it:")
    say(f"  s2cs doctor {option}".rstrip())


def _write_endpoint(
    settings: Settings, name: str, endpoint: str, *, email: str, flows: bool, force: bool
) -> None:
    from .endpoint import endpoint_directory, published_file, set_up

    config = load_facility(name, file=settings.config)
    if config.file is None:
        raise ConfigError(
            f"facility {name} has no configuration",
            which=name,
            hint=f"Write and edit it first: s2cs init {name}",
        )
    with progress(f"facility {name}: registering its functions"):
        files = set_up(endpoint_directory(endpoint), facility=config, email=email, flows=flows, replace=force)
    if settings.json:
        functions = str(published_file(config))
        put_document({"facility": name, "functions": functions, "files": [str(one) for one in files]})
    else:
        for one in files:
            put(str(one))
    say("Next: start it, and give its UUID, which `globus-compute-endpoint list` shows, to your users:")
    say(f"  globus-compute-endpoint start {endpoint}")


def _folder() -> Path:
    if os.environ.get("SCISTREAM_CONFIG_DIR") or os.geteuid() != 0:
        return config_folders(os.environ)[0]
    return SYSTEM_CONFIG


def _option_for(name: str, file: Path) -> str:
    """The option by which other subcommands find a file; none where they find it by themselves."""
    try:
        found = configured_facilities()
    except ConfigError:
        found = {}
    if found.get(name) != file:
        return f"--config {file}"
    return "" if len(found) == 1 else f"--facility {name}"


# --- doctor


@s2cs.command()
@click.option(
    "--gateway", "gateways", multiple=True, metavar="NAME", help="Only this one. Repeat it for more."
)
@click.option("--rate-mbits-per-s", type=click.IntRange(1), metavar="N", help="The rate that is wanted.")
@click.option(
    "--rtt-ms",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="The round trip to the other facility.",
)
@click.option("--rtt-s", type=click.FloatRange(0, min_open=True), metavar="N", help="The same, in seconds.")
@click.option("--peer", metavar="FACILITY", help="Look also at the way to this facility.")
@common
@with_settings
def doctor(
    settings: Settings,
    gateways: Sequence[str],
    rate_mbits_per_s: int | None,
    rtt_ms: float | None,
    rtt_s: float | None,
    peer: str | None,
) -> None:
    """Look whether the gateways are fit for what is configured, and say what to do.

    Exits with 1 if there is a problem.
    """
    from scistream_flows.doctor import examine

    from .endpoint import check as check_endpoint
    from .endpoint import endpoints_of

    if rtt_ms is not None and rtt_s is not None:
        raise click.UsageError("give --rtt-ms or --rtt-s, not both")
    config = settings.load()
    settings.quiet()
    findings: list[Finding] = []
    with _running(config) as service, progress(f"facility {config.name}: looking") as now:
        for finding in examine(
            config,
            gateways=gateways,
            rate_mbits_per_s=rate_mbits_per_s,
            rtt_s=rtt_ms / 1000 if rtt_ms is not None else rtt_s,
            peer=peer,
            service=service,
        ):
            findings.append(finding)
            place = finding.gateway or "facility"
            now.says(
                f"facility {config.name}: {_number(len(findings), 'check')}, last {place}, {finding.check}"
            )
        for directory in endpoints_of(config):
            findings += check_endpoint(directory, facility=config)
    if settings.json:
        put_document({"facility": config.name, "findings": [one.model_dump(mode="json") for one in findings]})
    else:
        _put_findings(config.name, findings)
    if any(one.level == "problem" for one in findings):
        click.get_current_context().exit(1)


@contextmanager
def _running(config: FacilityConfig) -> Iterator[S2CS | None]:
    """The service of a facility that has been used, so that what it knows is looked at, too."""
    from scistream_flows.s2cs import S2CS

    service = None
    with suppress(ScistreamError):  # a state directory that cannot be used is one of the findings
        service = S2CS(config) if config.state_dir.exists() else None
    try:
        yield service
    finally:
        if service is not None:
            service.close()


def _put_findings(facility: str, findings: Sequence[Finding]) -> None:
    for gateway in dict.fromkeys(one.gateway for one in findings):
        put(click.style(f"gateway {plain(gateway)}" if gateway else f"facility {facility}", bold=True))
        for one in findings:
            if one.gateway == gateway:
                put(f"  {click.style(f'{one.level:<8}', fg=_COLOURS[one.level])} {plain(one.message)}")
                for line in (one.fix or "").splitlines():
                    put(f"    {plain(line)}")
        put("")
    numbers = {level: sum(one.level == level for one in findings) for level in reversed(_COLOURS)}
    put(
        ", ".join(_number(number, level) for level, number in numbers.items() if number)
        or "nothing to look at"
    )


def _number(number: int, level: str) -> str:
    return f"{number} {level}" + ("s" if number > 1 and level != "ok" else "")


# --- streams


@s2cs.command("list")
@click.option("--owner", metavar="URN", help="Only the streams of this owner.")
@click.option("--ended", is_flag=True, help="Also those that ended within the last day.")
@common
@with_settings
def list_(settings: Settings, owner: str | None, *, ended: bool) -> None:
    """Show the streams of everybody."""
    with settings.service() as service:
        listing = service.survey(owner=owner, include_ended=ended)
    if settings.json:
        put_document(listing.model_dump(mode="json"))
        return
    if not listing.streams:
        say(f"facility {listing.facility} has no streams")
        return
    put_streams(listing.streams)


@s2cs.command()
@click.argument("uid", required=False)
@click.option(
    "--role",
    type=click.Choice(["PROD", "CONS"], case_sensitive=False),
    metavar="PROD|CONS",
    help="Only this side.",
)
@click.option("--all", "everything", is_flag=True, help="Every stream.")
@click.option("--owner", metavar="URN", help="Only the streams of this owner.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@with_settings
def release(
    settings: Settings, uid: str | None, role: Role | None, owner: str | None, *, everything: bool, yes: bool
) -> None:
    """End the stream UID, or all of them, whoever owns them.

    Exits with 1 if one could not be ended; the others are.
    """
    if (uid is None) != everything:
        raise click.UsageError("give a UID or --all" if uid is None else "give a UID or --all, not both")
    with settings.service() as service:
        chosen = [
            one
            for one in service.survey(owner=owner).streams
            if uid in (None, one.uid) and role in (None, one.role)
        ]
        if uid is not None:
            _check_chosen(chosen, uid=uid, facility=service.config.name)
        elif owner is None and not yes and chosen:
            _confirm(f"End all {len(chosen)} streams of facility {service.config.name}?")
        released, failures = _release(service, chosen)
    if settings.json:
        document = {
            "facility": service.config.name,
            "released": [one.model_dump(mode="json") for one in released],
            "left": [
                {"owner": one.owner, "uid": one.uid, "role": one.role, "error": wrong.to_document()}
                for one, wrong in failures
            ],
        }
        put_document(document)
    else:
        for one in released:
            put(_end_in_words(one))
        if not chosen:
            say(f"facility {service.config.name} has no streams" + (f" of {owner}" if owner else ""))
    for left, wrong in failures:
        say(f"{left.uid} ({left.role}) of {left.owner} is left: {plain(wrong.message)}")
        if wrong.hint:
            say(plain(f"  {wrong.hint}"))
    if failures:
        click.get_current_context().exit(1)


def _check_chosen(chosen: Sequence[Status], *, uid: str, facility: str) -> None:
    owners = sorted({one.owner for one in chosen})
    if not owners:
        raise NotFound(
            f"facility {facility} has no such stream: {uid}", which=uid, hint="See `s2cs list --ended`"
        )
    if len(owners) > 1:
        raise BadRequest(
            f"{len(owners)} owners have a stream {uid!r}: {', '.join(owners)}",
            which=uid,
            hint="Say which with --owner URN",
        )


def _confirm(question: str) -> None:
    if not click.get_text_stream("stdin").isatty():
        raise click.UsageError("without a terminal, --all needs --yes or --owner")
    if not click.confirm(question, err=True):
        say("nothing was ended")
        click.get_current_context().exit(1)


def _release(
    service: S2CS, chosen: Sequence[Status]
) -> tuple[Sequence[Released], Sequence[tuple[Status, ScistreamError]]]:
    released: list[Released] = []
    failures: list[tuple[Status, ScistreamError]] = []
    with progress("") as now:
        for number, one in enumerate(chosen, 1):
            now.says(f"{number} of {len(chosen)}: {one.uid} ({one.role})")
            try:
                # nothing is answered for one that has ended by itself meanwhile
                released += service.evict(owner=one.owner, uid=one.uid, role=one.role) or [
                    Released(uid=one.uid, role=one.role)
                ]
            except ScistreamError as wrong:
                failures.append((one, wrong))
    return released, failures


def _end_in_words(released: Released) -> str:
    if released.end is None:
        return f"{released.uid} ({released.role}) had ended"
    return end_in_words(released.end)


# --- audit


@s2cs.command()
@click.option("--owner", metavar="URN", help="Only what concerns this owner.")
@click.option("--uid", metavar="UID", help="Only what concerns streams of this name.")
@click.option("--since", "since_s", type=Span(), metavar="TIME", help="Only the last 90s, 10m, 1h, 2d.")
@click.option(
    "--follow", is_flag=True, help="Go on until Ctrl-C. With --format json, a document on each line."
)
@common
@with_settings
def audit(
    settings: Settings, owner: str | None, uid: str | None, since_s: float | None, *, follow: bool
) -> None:
    """Show who opened, changed, ended or was refused what, oldest first."""
    with settings.service() as service:
        if follow:
            for line in service.audit_followed(owner=owner, uid=uid, since_s=since_s, poll_s=POLL_S / 4):
                put(json.dumps(line) if settings.json else _in_words(line))
            return
        lines = service.audit(owner=owner, uid=uid, since_s=since_s)
        if settings.json:
            put_long_document({"facility": service.config.name}, "lines", lines)
            return
        for line in lines:
            put(_in_words(line))


def _in_words(line: Mapping[str, Any]) -> str:
    rest = dict(line)
    at, event, owner = (str(rest.pop(key, "-")) for key in ("at", "event", "owner"))
    uid, role = rest.pop("uid", None), rest.pop("role", None)
    side = f"{uid} ({role})" if uid else "-"
    details = " ".join(f"{key}={_value(value)}" for key, value in rest.items())
    return plain(f"{at}  {event:<7}  {side}  {owner}  {details}".rstrip())


def _value(value: Any) -> str:
    is_word = isinstance(value, str) and value.isprintable() and re.fullmatch(r"[^\s\"=]+", value)
    return str(value) if is_word else json.dumps(value)


# --- gateways


@s2cs.group()
@common
def gateway() -> None:
    """See the gateways, and take one out of service."""


@gateway.command("list")
@common
@with_settings
def gateway_list(settings: Settings) -> None:
    """Show each gateway: whether it answers, and what of it is booked."""
    with settings.service() as service:
        reports = _reports(service)
    if settings.json:
        put_document(
            {
                "facility": service.config.name,
                "gateways": [one.model_dump(mode="json", exclude={"protocol"}) for one in reports],
            }
        )
        return
    headings = ("GATEWAY", "KIND", "STATE", "STREAMS", "LISTENERS", "CONNECTIONS", "RESERVED")
    put_table(headings, [_gateway_row(one) for one in reports])
    for one in reports:
        if one.message:
            say(plain(f"{one.name}: {one.message}"))


def _gateway_row(report: GatewayReport) -> Sequence[str]:
    states = [("draining", report.draining), ("no answer", not report.answers)]
    capacity = in_units(report.capacity_mbits_per_s * 1e6, "bit/s") if report.capacity_mbits_per_s else ""
    return [
        report.name,
        report.kind,
        ", ".join(word for word, holds in states if holds) or "in service",
        str(report.streams),
        _of_all(str(report.listeners), str(report.ports or "")),
        _of_all(str(report.connections), str(report.connection_budget or "")),
        _of_all(in_units(report.reserved_mbits_per_s * 1e6, "bit/s"), capacity),
    ]


def _of_all(used: str, all_: str) -> str:
    return f"{used} of {all_}" if all_ else used


@gateway.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Wait until its last stream has ended.")
@click.option("--timeout-s", type=Span(), metavar="N", help="Wait at most so long; exit with 1 then.")
@common
@with_settings
def drain(settings: Settings, name: str, *, wait: bool, timeout_s: float | None) -> None:
    """Let the gateway NAME take no new stream. Those that run go on."""
    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout-s is for --wait")
    with settings.service() as service:
        service.drain(name)
        report = _report(service, name)
        if wait:
            report = _wait_until_empty(service, report, timeout_s)
    _put_gateway(settings, report, f"takes no new stream, {_streams(report.streams)} left")


@gateway.command()
@click.argument("name")
@common
@with_settings
def undrain(settings: Settings, name: str) -> None:
    """Let the gateway NAME take new streams again."""
    with settings.service() as service:
        service.undrain(name)
        report = _report(service, name)
    _put_gateway(settings, report, f"takes new streams, has {_streams(report.streams)}")


def _report(service: S2CS, name: str) -> GatewayReport:
    return next(one for one in _reports(service) if one.name == name)


def _reports(service: S2CS) -> Sequence[GatewayReport]:
    service.survey()  # so that what has ended by itself is not counted
    return service.gateways()


def _wait_until_empty(service: S2CS, report: GatewayReport, timeout_s: float | None) -> GatewayReport:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    said = None
    with progress("") as now:
        while report.streams:
            words = f"gateway {report.name}: {_streams(report.streams)} left"
            words += "" if report.answers else f" ({plain(report.message or 'it does not answer')})"
            now.says(words)
            if words != said and not now.shows:
                say(words)
                said = words
            left_s = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
            if left_s <= 0:
                raise WaitTimeout(
                    f"gateway {report.name} still has {_streams(report.streams)} after {in_time(timeout_s or 0)}",
                    which=report.name,
                    hint="It takes no new one. Wait on, or end them: s2cs list, s2cs release",
                )
            time.sleep(left_s)
            report = _report(service, report.name)
    return report


def _put_gateway(settings: Settings, report: GatewayReport, words: str) -> None:
    if settings.json:
        put_document(report.model_dump(mode="json"))
    else:
        put(f"gateway {report.name} {words}")


def _streams(number: int) -> str:
    return f"{number or 'no'} stream{'' if number == 1 else 's'}"


s2cs.add_command(completion(s2cs, name="s2cs"))


def main() -> NoReturn:
    """The entry point of `s2cs`."""
    run(s2cs, name="s2cs", asked=Settings())
