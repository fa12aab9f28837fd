"""The relay `s2ds` as seen from Python: find the binary, say what to run, understand what it answers.

How a command reaches the gateway is not known here: `Relays` takes anything that runs one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from scistream_flows.errors import (
    PROTOCOL,
    NotFound,
    PortsExhausted,
    ProtocolMismatch,
    RelayError,
    RelayLost,
)
from scistream_flows.models import ListedRelay, RelayFailed, RelayList, RelayReady, RelayStatus, read

START_TIMEOUT_S: Final = 25.0  # s2ds itself gives up after 20
CALL_TIMEOUT_S: Final = 10.0

M = TypeVar("M", bound=BaseModel)


class Outcome(NamedTuple):
    """What a command left: its exit status, stdout and stderr."""

    exit: int
    stdout: str
    stderr: str


class Run(Protocol):
    """Runs a command on a gateway and waits for it; raises GatewayUnreachable past `timeout_s` seconds."""

    def __call__(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run `argv` with `stdin` as its input."""
        ...


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class KernelTLS(_Facts):
    """Whether a connection could be given to the kernel's TLS, and whether that takes new keys later."""

    available: bool = False
    errno: str | None = None
    new_keys: bool | None = None


class PipeFacts(_Facts):
    """The size that a new pipe of this user got."""

    asked_bytes: int = 0
    granted_bytes: int | None = None
    errno: str | None = None


class InterfaceFacts(_Facts):
    """A network interface, and the card that carries it."""

    name: str
    mtu: int | None = None
    speed_mbits_per_s: int | None = None
    driver: str | None = None
    numa_node: int | None = None


class OwnAddress(_Facts):
    """An address that the node has."""

    address: str
    interface: str | None = None


class RefusedPort(_Facts):
    """A port of the range that could not be bound."""

    port: int
    errno: str | None = None


class PortFacts(_Facts):
    """The ports of the range at one address: those tried, those that could be bound, and the first that could not."""

    checked: int = 0
    free: int = 0
    refused: list[RefusedPort] = []


class AddressFacts(_Facts):
    """An address of the configuration, as the node has it."""

    address: str
    errno: str | None = None
    interface: InterfaceFacts | None = None
    ports: PortFacts | None = None


class FileSystem(_Facts):
    """The mount that a directory lies in."""

    type: str | None = None
    mounted_at: str | None = None


class DirectoryFacts(_Facts):
    """A directory; where it is still to be made, `errno` is ENOENT and the rest is about what is above it."""

    path: str
    errno: str | None = None
    mode: int | None = None
    uid: int | None = None
    file_system: FileSystem | None = None
    free_bytes: int | None = None
    free_files: int | None = None
    read_only: bool | None = None
    noexec: bool | None = None


class DescriptorFacts(_Facts):
    """How many files a process of this user may have open."""

    soft: int | None = None
    hard: int | None = None


class LogindFacts(_Facts):
    """What logind does with processes that a user leaves behind; values as in its files."""

    running: bool = False
    kill_user_processes: str | None = None
    kill_only_users: str | None = None
    kill_exclude_users: str | None = None
    linger: bool = False


class NodeFacts(_Facts):
    """What `s2ds inspect` says of a gateway; a value that cannot be known there is None."""

    protocol: int
    version: str = ""
    host: str = ""
    uid: int
    user: str | None = None
    kernel: str = ""
    architecture: str = ""
    at_ns: int
    took_s: float = 0.0
    ktls: KernelTLS = KernelTLS()
    pipe: PipeFacts = PipeFacts()
    page_bytes: int = 4096
    own_addresses: list[OwnAddress] = []
    addresses: list[AddressFacts] = []
    directories: list[DirectoryFacts] = []
    descriptors: DescriptorFacts = DescriptorFacts()
    settings: dict[str, str | None] = {}
    logind: LogindFacts = LogindFacts()
    cpus: int = 1
    cpus_allowed: str | None = None
    numa_nodes: dict[int, str | None] = {}
    memory_bytes: int | None = None

    def numbers(self, setting: str) -> list[int]:
        """The numbers of a kernel setting; empty when this kernel does not have or show it."""
        try:
            return [int(word) for word in (self.settings.get(setting) or "").split()]
        except ValueError:
            return []


class Relays:
    """The relays of one gateway.

    Args:
        run: Runs a command there.
        binary: The path of `s2ds` there.
        runtime_dir: The directory there that holds the relays' sockets and logs.
        gateway: The gateway's name, for messages.
        starter: What starts a relay in the place of the binary, and leaves behind what that understands.
    """

    def __init__(
        self, run: Run, *, binary: str, runtime_dir: str, gateway: str, starter: Sequence[str] = ()
    ) -> None:
        self._run = run
        self._binary = binary
        self._starter = starter or (binary,)
        self._runtime_dir = runtime_dir
        self._gateway = gateway

    def start(self, configuration: Mapping[str, Any]) -> RelayReady:
        """Start a relay, which lives on by itself.

        Raises:
            PortsExhausted: When no port of the range could be bound.
            RelayError: When it did not start, with the errno; nothing of it is left.
            GatewayUnreachable: When the outcome is unknown.
        """
        relay_id = str(configuration["relay_id"])
        outcome = self._call("start", stdin=json.dumps(configuration), timeout_s=START_TIMEOUT_S)
        event = self._last_document(outcome, "start", relay_id)
        if event.get("event") == "ready":
            return _read(RelayReady, event)
        if "error" in event:
            raise self._error(event, "start", relay_id)
        failed = _read(RelayFailed, event)
        if failed.code == "ports-exhausted":
            raise PortsExhausted(
                f"no port free on gateway {self._gateway}: {failed.message}",
                which=self._gateway,
                hint="Release a stream, ask for fewer listeners, or widen port_range",
                errno=failed.errno,
            )
        raise RelayError(
            f"the relay on gateway {self._gateway} did not start: {failed.message}",
            which=self._gateway,
            hint="s2cs doctor says what is wrong with the gateway: its addresses, ports, limits and disk",
            errno=failed.errno,
            cause=failed.code,
            relay_id=relay_id,
        )

    def status(self, relay_id: str) -> RelayStatus:
        """The status, or the end record of a relay that has ended.

        Raises:
            RelayLost: When it was killed.
            NotFound: When there is no such relay.
        """
        return self._status("status", relay_id)

    def update(self, relay_id: str, changes: Mapping[str, Any]) -> RelayStatus:
        """Change `targets, peers, sources, lease_s, rate_mbits_per_s`; each given replaces the whole value."""
        return self._status("update", relay_id, stdin=json.dumps(dict(changes)))

    def renew(self, relay_id: str, *, lease_s: int) -> RelayStatus:
        """Renew the lease to `lease_s` seconds from now."""
        return self._status("renew", relay_id, "--lease-s", str(lease_s))

    def stop(self, relay_id: str, *, reason: Literal["released", "admin"] = "released") -> RelayStatus:
        """End a relay and wait until it is gone; answers its end record. On one that has ended: that record again.

        Raises:
            RelayLost: When it was killed.
            NotFound: When there is no such relay.
        """
        return self._status("stop", relay_id, "--reason", reason)

    def forget(self, relay_id: str) -> None:
        """Remove what a relay that has ended left in the runtime directory."""
        outcome = self._call("forget", relay_id, timeout_s=CALL_TIMEOUT_S)
        if outcome.exit != 0:
            raise self._error(self._last_document(outcome, "forget", relay_id), "forget", relay_id)

    def list(self) -> list[ListedRelay]:
        """Every relay that has a socket or a log in the runtime directory."""
        outcome = self._call("list", timeout_s=CALL_TIMEOUT_S)
        return _read(RelayList, self._checked(outcome, "list", "")).relays

    def inspect(self, request: Mapping[str, Any]) -> NodeFacts:
        """Facts about the node: what its kernel and its user can, and whether addresses and ports can be had there.

        Args:
            request: `addresses` (numeric), `first_port`, `last_port`, `directories`; each may be left out.

        Raises:
            RelayError: When the binary there does not know the verb, or refuses the request.
            GatewayUnreachable: When it does not answer.
        """
        outcome = self._call(
            "inspect", stdin=json.dumps({"protocol": PROTOCOL, **request}), timeout_s=CALL_TIMEOUT_S
        )
        return _read(NodeFacts, self._checked(outcome, "inspect", ""))

    def _status(self, verb: str, relay_id: str, *options: str, stdin: str = "") -> RelayStatus:
        outcome = self._call(verb, relay_id, *options, stdin=stdin, timeout_s=CALL_TIMEOUT_S)
        return _read(RelayStatus, self._checked(outcome, verb, relay_id))

    def _call(self, verb: str, *rest: str, stdin: str = "", timeout_s: float) -> Outcome:
        program = self._starter if verb == "start" else (self._binary,)
        argv = [*program, verb, *rest, "--runtime-dir", self._runtime_dir]
        return self._run(argv, stdin=stdin, timeout_s=timeout_s)

    def _checked(self, outcome: Outcome, verb: str, relay_id: str) -> dict[str, Any]:
        document = self._last_document(outcome, verb, relay_id)
        if "error" in document:
            raise self._error(document, verb, relay_id)
        return document

    def _last_document(self, outcome: Outcome, verb: str, relay_id: str) -> dict[str, Any]:
        lines = outcome.stdout.strip().splitlines()
        try:
            document = json.loads(lines[-1]) if lines else None
        except ValueError:
            document = None
        if isinstance(document, dict):
            return document
        words = outcome.stderr.strip().splitlines()
        raise RelayError(
            f"s2ds {verb} on gateway {self._gateway} gave no document"
            f" (exit {outcome.exit}{': ' + words[-1][:300] if words else ''})",
            which=relay_id or self._gateway,
            hint="Run `s2ds version` on the gateway: the binary may be the wrong one",
        )

    def _error(self, document: Mapping[str, Any], verb: str, relay_id: str) -> RelayError | NotFound:
        error = document.get("error")
        code, words = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
        if code == "no-such-relay":
            return NotFound(f"gateway {self._gateway} has no relay {relay_id}", which=relay_id)
        if code == "relay-lost":
            return RelayLost(
                f"the relay {relay_id} on gateway {self._gateway} is gone without a word: it was killed",
                which=relay_id,
                hint="Open the stream again; look at the gateway's kernel log for the cause",
            )
        return RelayError(f"s2ds {verb} on gateway {self._gateway}: {words}", which=relay_id, cause=code)


def _read(model: type[M], document: Mapping[str, Any]) -> M:
    return read(model, document, what=f"s2ds {model.__name__}", error=RelayError)


def find_s2ds(environment: Mapping[str, str] | None = None) -> str:
    """The path of the `s2ds` of this installation, its protocol checked.

    Looks at `$S2DS` (then nowhere else), the scripts of this environment and of its base, the `bin` above and beside
    the package, the user's scheme, the build of a checkout, and PATH.

    Raises:
        RelayError: When there is none; the hint says how to build it and `details["looked_at"]` where it was sought.
        ProtocolMismatch: When it speaks another protocol.
    """
    environment = os.environ if environment is None else environment
    named = environment.get("S2DS")
    places = [Path(named)] if named else _places(environment)
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            path = str(place.absolute())
            _check_protocol(path, place.stat().st_mtime_ns)
            return path
    looked_at = [str(place) for place in places]
    raise RelayError(
        "the relay binary s2ds was not found; looked at " + ", ".join(looked_at),
        which="s2ds",
        hint="Install scistream-flows from a wheel, or build it in a checkout with"
        " `cargo build --release --manifest-path relay/Cargo.toml`, or set $S2DS",
        looked_at=looked_at,
    )


def _places(environment: Mapping[str, str]) -> list[Path]:
    package = Path(__file__).resolve().parent
    found_on_path = shutil.which("s2ds", path=environment.get("PATH", os.defpath))
    folders = [
        Path(sysconfig.get_path("scripts")),
        Path(sysconfig.get_path("scripts", vars={"base": sys.base_prefix})),
        *(above / "bin" for above in list(package.parents)[2:4]),  # PREFIX/lib/pythonX/site-packages/package
        package.parent / "bin",  # pip install --target
        Path(site.getuserbase()) / "bin",
        package.parent / "relay" / "target" / "release",
    ]
    places = [folder / "s2ds" for folder in folders]
    if found_on_path:
        places.append(Path(found_on_path))
    return list(dict.fromkeys(places))


@lru_cache(maxsize=16)
def _check_protocol(path: str, mtime_ns: int) -> None:  # noqa: ARG001 - part of the cache's key
    """Ask a binary for its protocol, once as long as the file stays the same."""
    try:
        answer = subprocess.run(
            [path, "version", "--format", "json"],
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            check=True,
        )
        theirs = json.loads(answer.stdout)["protocol"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as wrong:
        raise RelayError(
            f"{path} is not a relay binary: {_short(wrong)}", which=path, hint="Build it again, or set $S2DS"
        ) from None
    if theirs != PROTOCOL:
        raise ProtocolMismatch(
            f"{path} speaks protocol {theirs}, this package speaks {PROTOCOL}",
            which=path,
            hint="Install package and relay of one version",
            theirs=theirs if isinstance(theirs, int) else None,
            ours=PROTOCOL,
        )


def _short(wrong: Exception) -> str:
    if isinstance(wrong, subprocess.CalledProcessError):
        if wrong.returncode < 0:
            return f"ended by {signal.Signals(-wrong.returncode).name}"
        return f"exit {wrong.returncode} from `version --format json`"
    if isinstance(wrong, OSError):
        return str(wrong.strerror)
    return "it does not say its version"
