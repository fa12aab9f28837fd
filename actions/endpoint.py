"""A Globus Compute endpoint for a facility: its functions registered, its directory written, both checked.

The personal deployment: an endpoint of one account, whose functions act as that account and own what they open. The
endpoint allows the facility's functions and nothing else: no other function, no serialized code, no setting that a
caller could choose.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scistream_flows.compute import close_client, open_client
from scistream_flows.config import FacilityConfig, load_facility
from scistream_flows.errors import BadRequest, ConfigError
from scistream_flows.functions import source
from scistream_flows.s2cs import VERBS

if TYPE_CHECKING:
    from globus_compute_sdk import Client

    from scistream_flows.diagnosis import Finding

PUBLISHED: Final = "compute-functions.json"
"""The file in the facility's state directory that maps each verb to the id of its function."""

CONFIG: Final = "config.yaml"
TEMPLATE: Final = "user_config_template.yaml.j2"
SCHEMA: Final = "user_config_schema.json"
ENVIRONMENT: Final = "user_environment.yaml"
DROP_IN: Final = "scistream.conf"

_HANDED_ON: Final = ("SCISTREAM_CONFIG_DIR", "SCISTREAM_PORT_RANGE")
_JSON_ONLY: Final = """\
  allowed_serializers:  # source text and JSON: nothing that runs when it is read
    - globus_compute_sdk.serialize.PureSourceTextInspect
    - globus_compute_sdk.serialize.JSONData
"""
_ANY: Final = """\
  # Used from Globus Flows, whose way to pack arguments is not documented, so every serializer is taken. NOT VERIFIED
  # against the service: try it, and if JSON arrives, write this file again without the option for flows.
"""
_TEMPLATE: Final = """\
# Written for scistream-flows. Control functions only: threads of this process, on the gateway itself, never in a
# batch job (what a job started ends with the job).
heartbeat_period: {heartbeat_s}
idle_heartbeats_soft: 0  # stays, so that no call waits for a start
engine:
  type: ThreadPoolEngine
  max_workers: {max_workers}
{serializers}"""
_SCHEMA: Final = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "description": "Callers choose nothing",
    "type": "object",
    "additionalProperties": False,
}
_DROP_IN: Final = """\
# For /etc/systemd/system/globus-compute-endpoint-{name}.service.d/{file}
# Relays outlive the endpoint that started them; without this, systemd ends them with it.
[Service]
KillMode=process
"""


def endpoint_directory(name: str) -> Path:
    """Where an endpoint of this account has its configuration."""
    base = os.environ.get("GLOBUS_COMPUTE_USER_DIR")
    return (Path(base) if base else Path.home() / ".globus_compute") / name


def endpoints_of(facility: FacilityConfig) -> Sequence[Path]:
    """The directories of the endpoints of this account that allow functions of a facility.

    Raises:
        ConfigError: The ids of the facility's functions cannot be read.
    """
    ids = published(facility).values()
    found = []
    for config in sorted(endpoint_directory("").glob(f"*/{CONFIG}")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = config.read_text(encoding="utf-8")
            if any(one in text for one in ids):
                found.append(config.parent)
    return found


def set_up(
    directory: str | Path,
    *,
    facility: FacilityConfig,
    email: str = "",
    flows: bool = False,
    replace: bool = False,
) -> Sequence[Path]:
    """Make an endpoint ready to be started: `register` and `write_configuration`, with the login of this account.

    Repeating it changes nothing.

    Returns:
        The files of the endpoint's configuration.

    Raises:
        MissingExtra: globus-compute-sdk is not installed.
        Unauthenticated: This account is not logged in to Globus Compute.
        BadRequest: The last part of `directory` cannot be a name, or `email` is not on one line.
        ConfigError: A file is there and says something else, or cannot be read or written.
    """
    client = open_client()
    try:
        functions = register(client, facility=facility)
    finally:
        close_client(client)
    return write_configuration(
        directory, facility=facility, functions=functions, email=email, flows=flows, replace=replace
    )


def published_file(facility: FacilityConfig) -> Path:
    """Where the ids of a facility's functions are."""
    return facility.state_dir / PUBLISHED


def published(facility: FacilityConfig) -> dict[str, str]:
    """The ids of a facility's functions that are registered so far, from verb to UUID.

    Raises:
        ConfigError: The file cannot be read, or is something else.
    """
    path = published_file(facility)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as wrong:
        raise ConfigError(f"{path}: {wrong}", which=str(path), file=str(path)) from None
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ConfigError(
            f"{path} does not map verbs to ids",
            which=str(path),
            file=str(path),
            hint="Remove it, register again, and write the endpoint's configuration again",
        )
    return found


def register(client: Client, *, facility: FacilityConfig) -> Mapping[str, str]:
    """Register the facility's functions with Globus Compute; those that are registered keep their ids.

    What is registered is a loader that never changes: the functions themselves come with the installed package. Each
    id is written down before the next function is registered, so that whatever interrupts this, repeating it goes on.

    Args:
        client: A `globus_compute_sdk.Client` of who runs the endpoint.
        facility: The facility.

    Returns:
        The id of each verb's function, as in the file `published_file(facility)`.

    Raises:
        ConfigError: The ids that are there cannot be read, or new ones not be written.
    """
    ids = published(facility)
    facility.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for verb in VERBS:
        if verb not in ids:
            ids[verb] = str(
                client.register_source_code(
                    source(verb, facility=facility.name),
                    f"scistream_{verb}",
                    description=f"scistream-flows: {verb} at facility {facility.name}",
                    metadata={"python_version": "any", "sdk_version": "any"},
                )
            )
            _write(published_file(facility), json.dumps(ids, indent=2) + "\n", mode=0o644)
    return {verb: ids[verb] for verb in VERBS}


def write_configuration(
    directory: str | Path,
    *,
    facility: FacilityConfig,
    functions: Mapping[str, str],
    display_name: str = "",
    email: str = "",
    max_workers: int = 4,
    heartbeat_s: int = 30,
    flows: bool = False,
    environment: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Sequence[Path]:
    """Write the configuration of an endpoint that serves a facility. Nothing is started, and its id stays its own.

    Args:
        directory: `~/.globus_compute/NAME` of the endpoint NAME; made if it is not there.
        facility: The facility.
        functions: The ids of its functions, from verb to UUID. No other function will run.
        display_name: How the endpoint is shown; by default `scistream FACILITY`.
        email: Whom to ask; Globus Compute wants it of an endpoint that root runs.
        max_workers: Verbs that are answered at the same time, 1 to 64.
        heartbeat_s: Seconds between two signs of life, 5 to 300. For three of them, an endpoint that was killed does
            not start again.
        flows: Whether Globus Flows calls the functions too: then every serializer is taken. Not verified.
        environment: For the functions, besides PATH and the SCISTREAM_ variables that say where this facility is.
        replace: Whether files that say something else may be overwritten.

    Returns:
        The files.

    Raises:
        BadRequest: A number is out of its range, an id is none, or what is no name or address of mail.
        ConfigError: A file is there and says something else, or cannot be written.
    """
    directory = Path(directory)
    _check_numbers(max_workers=(max_workers, 1, 64), heartbeat_s=(heartbeat_s, 5, 300))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", directory.name):
        raise BadRequest(f"{directory.name!r} cannot be the name of an endpoint", which=directory.name)
    if not functions:  # an empty list would allow every function
        raise BadRequest("functions: none is given", which="functions")
    for verb, one in functions.items():
        if verb not in VERBS or not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", one):
            raise BadRequest(f"functions: {verb!r}: {one!r} is no verb with a UUID", which="functions")
    for text in (display_name, email):
        if not text.isprintable():
            raise BadRequest(f"{text!r} does not fit on a line", which=text)
    settings: dict[str, Any] = {"display_name": display_name or f"scistream {facility.name}"}
    if email:
        settings["email"] = email
    settings |= {
        "heartbeat_period": heartbeat_s,
        "allowed_functions": [functions[verb] for verb in functions],
    }
    texts = {
        CONFIG: "# Written for scistream-flows.\n" + _yaml(settings),
        TEMPLATE: _TEMPLATE.format(
            heartbeat_s=heartbeat_s, max_workers=max_workers, serializers=_ANY if flows else _JSON_ONLY
        ),
        SCHEMA: json.dumps(_SCHEMA, indent=2) + "\n",
        ENVIRONMENT: _yaml({**_environment(facility, directory), **(environment or {})}),
        DROP_IN: _DROP_IN.format(name=directory.name, file=DROP_IN),
    }
    _refuse_to_overwrite(directory, texts, replace=replace)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(directory / name, text, mode=0o600)
    except OSError as wrong:
        raise ConfigError(
            f"{directory}: {wrong.strerror}", which=str(directory), file=str(directory)
        ) from None
    return [directory / name for name in texts]


def check(directory: str | Path, *, facility: FacilityConfig) -> Iterator[Finding]:
    """What is right and wrong about the configuration of an endpoint, for `s2cs doctor`.

    Only files are looked at: whether the endpoint runs, `globus-compute-endpoint list` tells.

    Raises:
        ConfigError: The ids of the facility's functions cannot be read.
    """
    from scistream_flows.diagnosis import Finding

    directory = Path(directory)
    name = directory.name
    again = f"s2cs init {facility.name} --compute {name} --force"
    try:
        texts = {one: (directory / one).read_text(encoding="utf-8") for one in (CONFIG, TEMPLATE, SCHEMA)}
    except OSError as wrong:
        yield Finding(
            check="compute-endpoint",
            level="problem",
            message=f"endpoint {name}: {wrong.filename}: {wrong.strerror}",
            fix=again,
        )
        return
    yield from (
        Finding(
            check=what, level="problem" if wrong else "ok", message=wrong or right, fix=fix if wrong else None
        )
        for what, wrong, right, fix in (
            (
                "compute-functions",
                _wrong_functions(texts[CONFIG], published(facility)),
                f"endpoint {name} allows the functions of facility {facility.name} and no other",
                again,
            ),
            (
                "compute-settings",
                _wrong_schema(texts[SCHEMA]),
                f"endpoint {name} lets callers choose no settings",
                again,
            ),
            (
                "compute-engine",
                ""
                if re.search(r"^\s*type:\s*ThreadPoolEngine\s*$", texts[TEMPLATE], re.MULTILINE)
                else f"endpoint {name} runs functions in another engine than ThreadPoolEngine: relays may end with"
                " its processes",
                f"endpoint {name} runs functions in threads, on this machine",
                again,
            ),
        )
    )
    if "allowed_serializers" not in texts[TEMPLATE]:
        yield Finding(
            check="compute-serializers",
            level="warning",
            message=f"endpoint {name} takes every serializer; some run code when they read an argument. Only an"
            " allowed function's caller can use that",
            fix=f"{again} (without --flows)",
        )
    yield from _check_secrecy(directory)
    yield from _check_unit(name)


def _wrong_functions(config: str, ids: Mapping[str, str]) -> str:
    found = re.search(r"^allowed_functions:[ \t]*((?:\n[ \t]*-.*)*|\[.*\])", config, re.MULTILINE)
    allowed = (
        set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", found[1].lower())) if found else set()
    )
    if not allowed:
        return "the endpoint runs every function that a caller sends: allowed_functions is missing in config.yaml"
    missing = sorted(verb for verb in VERBS if ids.get(verb, "").lower() not in allowed)
    if missing:
        return f"the endpoint does not allow the function of {', '.join(missing)}"
    foreign = allowed - {one.lower() for one in ids.values()}
    return f"the endpoint allows functions of others too: {', '.join(sorted(foreign))}" if foreign else ""


def _wrong_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except ValueError as wrong:
        return f"{SCHEMA} is no JSON: {wrong}"
    closed = (
        isinstance(schema, dict)
        and schema.get("additionalProperties") is False
        and not schema.get("properties")
    )
    return (
        "" if closed else f"callers may choose settings of the endpoint ({SCHEMA}), such as commands to run"
    )


def _check_secrecy(directory: Path) -> Iterator[Finding]:
    from scistream_flows.diagnosis import Finding

    for path in [directory, *sorted(directory.glob("*.yaml*")), *sorted(directory.glob("*.json"))]:
        with contextlib.suppress(OSError):
            if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                yield Finding(
                    check="compute-files",
                    level="problem",
                    message=f"{path} can be written by others, who could so run programs as this account",
                    fix=f"chmod go-w {path}",
                )


def _check_unit(name: str, *, units: Path = Path("/etc/systemd/system")) -> Iterator[Finding]:
    from scistream_flows.diagnosis import Finding

    unit = units / f"globus-compute-endpoint-{name}.service"
    if not unit.is_file():
        return
    texts = [one.read_text(errors="replace") for one in (unit, *sorted(Path(f"{unit}.d").glob("*.conf")))]
    if any(re.search(r"^\s*KillMode\s*=\s*(process|none)\s*$", text, re.MULTILINE) for text in texts):
        yield Finding(
            check="compute-unit", level="ok", message=f"relays outlive a restart of the endpoint {name}"
        )
    else:
        yield Finding(
            check="compute-unit",
            level="problem",
            message=f"systemd ends the relays when the endpoint {name} stops or is restarted",
            fix=f"mkdir -p {unit}.d && printf '[Service]\\nKillMode=process\\n' > {unit}.d/{DROP_IN}"
            " && systemctl daemon-reload",
        )


def _environment(facility: FacilityConfig, directory: Path) -> dict[str, str]:
    """What the functions need to find this facility. An endpoint of root gives its processes nothing else."""
    known = {name: os.environ[name] for name in _HANDED_ON if os.environ.get(name)}
    if facility.file is not None:
        known.setdefault("SCISTREAM_CONFIG_DIR", str(facility.file.resolve().parent))
    known["SCISTREAM_STATE_DIR"] = str(facility.state_dir.resolve().parent)
    meant = load_facility(facility.name, environment=known)
    if (meant.file, meant.state_dir) != (facility.file, facility.state_dir):
        raise ConfigError(
            f"by its name, facility {facility.name} is found in {meant.file or 'no file'}, not in {facility.file}",
            which=facility.name,
            file=str(facility.file),
            hint=f"Name the file {facility.name}.toml, and the last part of its state directory {facility.name}",
        )
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return {"PATH": path, "GLOBUS_COMPUTE_USER_DIR": str(directory.resolve().parent), **known}


def _yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML: JSON is a part of it."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(one)}" for one in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _refuse_to_overwrite(directory: Path, texts: Mapping[str, str], *, replace: bool) -> None:
    for name, text in texts.items():
        path = directory / name
        try:
            other = path.read_text(encoding="utf-8") != text
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            other = True
        if other and not replace:
            raise ConfigError(
                f"{path} is there and says something else",
                which=str(path),
                file=str(path),
                hint="Name another endpoint, or replace its configuration",
            )


def _check_numbers(**numbers: tuple[int, int, int]) -> None:
    for name, (number, least, most) in numbers.items():
        if not least <= number <= most:
            raise BadRequest(f"{name}: {number} is not within {least} to {most}", which=name)


def _write(path: Path, text: str, *, mode: int) -> None:
    """Write a file as a whole: whoever reads meanwhile finds the old or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
