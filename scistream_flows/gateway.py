"""Where relays run: a gateway puts files and runs commands, and all control of relays goes through that."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from scistream_flows.config import GatewayConfig
from scistream_flows.errors import PROTOCOL, GatewayUnreachable, ProtocolMismatch, RegistryError, RelayError
from scistream_flows.haproxy import starter
from scistream_flows.models import DataServer
from scistream_flows.relay import CALL_TIMEOUT_S, Outcome, Relays, find_s2ds

CONNECT_TIMEOUT_S: Final = 10
COPY_TIMEOUT_S: Final = 120.0


class Gateway(Protocol):
    """A node that can run relays."""

    @property
    def config(self) -> GatewayConfig:
        """Its configuration."""
        ...

    @property
    def relays(self) -> Relays:
        """The relays on it."""
        ...

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file, whole or not at all."""
        ...

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run a command and wait for it.

        Raises:
            GatewayUnreachable: When it could not be run or did not end within `timeout_s` seconds.
        """
        ...

    def close(self) -> None:
        """Give back what the connection holds. Relays live on."""
        ...


# What a relay may know of the environment of this process, which may hold secrets.
_PASSED_ON: Final = frozenset({"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR"})


class LocalGateway:
    """This machine.

    Args:
        config: Its configuration.
        runtime_dir: Where its relays keep sockets and logs; made 0700 by the relay.
        data_server: What is started as a relay.
    """

    def __init__(self, config: GatewayConfig, *, runtime_dir: Path, data_server: DataServer = "s2ds") -> None:
        self.config = config
        self.runtime_dir = runtime_dir
        self._data_server = data_server

    @property
    def relays(self) -> Relays:
        """The relays on it; the binary is looked up each time, it may have been installed since."""
        return Relays(
            self.run,
            binary=find_s2ds(),
            runtime_dir=str(self.runtime_dir),
            gateway=self.config.name,
            starter=starter() if self._data_server == "haproxy" else (),
        )

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file, whole or not at all."""
        part = f"{path}.{os.getpid()}.part"
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(content)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as wrong:
            raise RegistryError(f"cannot write {path}: {wrong.strerror}", which=path) from wrong

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run a command and wait for it.

        Raises:
            GatewayUnreachable: When it could not be run or did not end within `timeout_s` seconds.
        """
        try:
            # its own session: Ctrl-C in a terminal must not end a command that cleans up
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={name: text for name, text in os.environ.items() if name in _PASSED_ON},
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as wrong:
            raise GatewayUnreachable(
                f"cannot run {argv[0]} on gateway {self.config.name}: {wrong.strerror}",
                which=self.config.name,
            ) from wrong
        with process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise GatewayUnreachable(
                    f"`{Path(argv[0]).name} {argv[1] if len(argv) > 1 else ''}` on gateway {self.config.name}"
                    f" did not end within {timeout_s:g} s",
                    which=self.config.name,
                    hint="Look at the load of the gateway, then try again",
                ) from None
            except BaseException:
                _let_finish(process)
                raise
        return Outcome(process.returncode, stdout, stderr)

    def close(self) -> None:
        """Nothing is held."""


def _let_finish(process: subprocess.Popen[str]) -> None:
    # Interrupted in mid-start: a relay that is half up cannot be stopped yet, one that is up can. It takes moments.
    try:
        process.communicate(timeout=2)
    finally:
        process.kill()


# Both run under `sh -c`, with what they need as arguments. Of the gateway's programs they need those of POSIX, and
# sha256sum if it is there.

# DIRECTORY SHA256: prepare the directory and look at the binary in it, if one is wanted.
_LOOK: Final = r"""
LC_ALL=C; export LC_ALL; umask 077
d=$1
case $d in "~/"*) d=$HOME/${d#"~/"} ;; "") d=${XDG_CACHE_HOME:-$HOME/.cache}/scistream ;; esac
mkdir -p "$d" || exit 73
if ! [ -O "$d" ] || ! [ -w "$d" ]; then echo "$d does not belong to this user, or cannot be written" >&2; exit 73; fi
case $(ls -ld "$d/.") in
?????w* | ????????w*) echo "$d can be written by others: chmod go-w $d" >&2; exit 73 ;;
esac
echo "system $(uname -s) $(uname -m)"
echo "directory $d"
f=$d/s2ds-$2
if [ -z "$2" ]; then exit 0; fi
if ! [ -f "$f" ]; then
  find "$d" -name "s2ds-*.part" -mtime +0 -exec rm -f {} + 2>/dev/null
elif command -v sha256sum >/dev/null 2>&1; then
  h=$(sha256sum <"$f"); echo "copy ${h%% *}"
else
  echo "copy unread"
fi
"""

# PART PATH SIZE MODE SHA256: a file from stdin, whole and as it was sent, or not at all.
_PUT: Final = r"""
LC_ALL=C; export LC_ALL; umask 077
trap 'rm -f "$1"' 0
trap 'exit 74' 1 2 13 15
cat >"$1" || exit 74
n=$(wc -c <"$1")
if ! [ "$n" -eq "$3" ]; then echo "$n of $3 bytes arrived" >&2; exit 74; fi
if command -v sha256sum >/dev/null 2>&1; then
  h=$(sha256sum <"$1")
  if [ "${h%% *}" != "$5" ]; then echo "it arrived with other bytes" >&2; exit 74; fi
  said=verified
fi
chmod "$4" "$1" && mv -f "$1" "$2" || exit 74
echo "put ${said-unread}"
"""


class _Place(NamedTuple):
    """What is known about a gateway as long as a connection lives."""

    connection: object | None
    binary: str
    runtime_dir: str


class SSHGateway:
    """Another machine, reached by SSH. It needs `sh` and the usual small programs, no Python.

    The relay's binary is copied there once, under the name of its hash, and looked at again with each new connection.

    Args:
        config: Its configuration, of kind `ssh`.
        runtime_name: The name of the directory there that holds the sockets and logs of this facility's relays.
    """

    def __init__(self, config: GatewayConfig, *, runtime_name: str) -> None:
        # here: loading paramiko takes longer than all the rest
        from scistream_flows.ssh import SSH, Host, find_host

        def find() -> Host:
            return find_host(
                config.name,
                config.host or "",
                port=config.port,
                user=config.user,
                identity_file=_path(config.identity_file),
                known_hosts=_path(config.known_hosts),
            )

        self.config = config
        self._runtime_name = runtime_name
        timeout_s = config.connect_timeout_s or CONNECT_TIMEOUT_S
        self._ssh = SSH(find, gateway=config.name, connect_timeout_s=timeout_s)
        self._preparing = threading.Lock()
        self._place: _Place | None = None

    @property
    def relays(self) -> Relays:
        """The relays on it.

        Raises:
            GatewayUnreachable: When it cannot be reached.
            RelayError: When no relay can run there.
            ProtocolMismatch: When the relay installed there speaks another protocol.
        """
        place = self._prepared()
        return Relays(self.run, binary=place.binary, runtime_dir=place.runtime_dir, gateway=self.config.name)

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file, whole and verified or not at all.

        Raises:
            RelayError: When it cannot be written; `errno` says why where that is known.
            GatewayUnreachable: When the outcome is unknown.
        """
        digest = hashlib.sha256(content).hexdigest()
        part = f"{path}.{secrets.token_hex(8)}.part"
        arguments = (part, path, str(len(content)), f"{mode:o}", digest)
        outcome = self._script(_PUT, *arguments, stdin=content, timeout_s=COPY_TIMEOUT_S)
        said = _said(outcome)
        if outcome.exit != 0 or "put" not in said:
            raise self._failed(f"{path} cannot be written", outcome)
        if said["put"] != "verified" and self._digest(path) != digest:
            self.run(["rm", "-f", path], timeout_s=CALL_TIMEOUT_S)
            raise self._failed(f"{path} was written with other bytes", outcome)

    def run(self, argv: Sequence[str], *, stdin: str = "", timeout_s: float) -> Outcome:
        """Run a command and wait for it, at most `connect_timeout_s` for a connection and `timeout_s` from then on.

        A command that was sent is never repeated: what it did is unknown when its answer is lost.

        Raises:
            HostKeyRejected: The host could not prove to be the one that is known.
            GatewayUnreachable: It could not be run, or did not end within the time.
        """
        outcome = self._run(argv, stdin.encode(), timeout_s)
        place = self._place
        if outcome.exit in (126, 127) and place is not None and argv[0] == place.binary:
            # its shell did not find or could not run the relay: it has not run, and may be there the next time
            self._place = None
            outcome = self._run([self._prepared().binary, *argv[1:]], stdin.encode(), timeout_s)
        return outcome

    def close(self) -> None:
        """Close the connection. Relays live on."""
        self._ssh.close()

    def _run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Outcome:
        answer = self._ssh.run(argv, stdin=stdin, timeout_s=timeout_s)
        stdout, stderr = (text.decode(errors="replace") for text in answer[1:])
        return Outcome(answer.exit, stdout, stderr)

    def _script(self, script: str, *arguments: str, stdin: bytes = b"", timeout_s: float) -> Outcome:
        return self._run(["sh", "-c", script, "sh", *arguments], stdin, timeout_s)

    def _prepared(self) -> _Place:
        with self._preparing:
            place = self._place
            if place is None or place.connection is None or place.connection is not self._ssh.connection:
                place = self._place = self._prepare()
            return place

    def _prepare(self) -> _Place:
        installed = self.config.s2ds
        ours = None if installed else Path(find_s2ds())
        content = b"" if ours is None else ours.read_bytes()
        digest = hashlib.sha256(content).hexdigest() if content else ""
        outcome = self._script(_LOOK, self.config.directory or "", digest, timeout_s=CALL_TIMEOUT_S)
        said = _said(outcome)
        if outcome.exit != 0 or not {"system", "directory"} <= said.keys():
            raise self._failed("its directory cannot be used", outcome, hint="Set directory in facility.toml")
        binary = installed or f"{said['directory']}/s2ds-{digest}"
        if ours is not None:
            self._same_architecture(said["system"])
            copied = said.get("copy")
            if copied == "unread":
                copied = self._digest(binary)
            if copied != digest:
                self.put(content, binary, mode=0o700)
        self._check_runs(binary)
        return _Place(self._ssh.connection, binary, f"{said['directory']}/{self._runtime_name}")

    def _digest(self, path: str) -> str:
        """The hash of a file on a gateway that cannot tell it: all of it comes back."""
        answer = self._ssh.run(["cat", path], timeout_s=COPY_TIMEOUT_S)
        return hashlib.sha256(answer.stdout).hexdigest()

    def _same_architecture(self, theirs: str) -> None:
        system = os.uname()
        ours = f"{system.sysname} {system.machine}"
        if theirs != ours:
            raise RelayError(
                f"gateway {self.config.name} is {theirs}, but the relay of this installation is for {ours}",
                which=self.config.name,
                hint="Install the s2ds of the same version there, and name its path with s2ds in facility.toml",
                cause="architecture",
            )

    def _check_runs(self, binary: str) -> None:
        outcome = self._run([binary, "version", "--format", "json"], b"", CALL_TIMEOUT_S)
        try:
            theirs = json.loads(outcome.stdout.strip().splitlines()[-1])["protocol"]
        except (ValueError, LookupError, TypeError):
            raise self._failed(
                f"{binary} is no relay that runs there",
                outcome,
                hint="See that it is executable, and its file system not mounted noexec; else set directory or s2ds in"
                " facility.toml",
            ) from None
        if theirs != PROTOCOL:
            raise ProtocolMismatch(
                f"{binary} on gateway {self.config.name} speaks protocol {theirs}, this package speaks {PROTOCOL}",
                which=self.config.name,
                hint="Install package and relay of one version",
                theirs=theirs if isinstance(theirs, int) else None,
                ours=PROTOCOL,
            )

    def _failed(self, words: str, outcome: Outcome, *, hint: str = "") -> RelayError:
        lines = outcome.stderr.strip().splitlines()
        cause = lines[-1][:300] if lines else f"exit {outcome.exit}"
        known = (name for number, name in errno.errorcode.items() if os.strerror(number) in outcome.stderr)
        return RelayError(
            f"gateway {self.config.name}: {words}: {cause}",
            which=self.config.name,
            hint=hint or "Look at its disk, or set directory in facility.toml",
            errno=next(known, None),
        )


def _said(outcome: Outcome) -> Mapping[str, str]:
    lines = (line.partition(" ") for line in outcome.stdout.splitlines())
    return {key: value for key, _, value in lines}


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def connect_gateway(config: GatewayConfig, *, state_dir: Path, data_server: DataServer = "s2ds") -> Gateway:
    """The gateway that `config` describes, for a facility whose state is in `state_dir`. Nothing is connected yet."""
    if config.kind == "local":
        return LocalGateway(config, runtime_dir=state_dir / "relays", data_server=data_server)
    # of this facility and this gateway alone: others may use the same account, or the same home on a file server
    return SSHGateway(config, runtime_name=f"relays-{config.name}-{_installation(state_dir)}")


def _installation(state_dir: Path) -> str:
    """A random name that a facility keeps with its state, whichever process asks first."""
    path = state_dir / "installation"
    try:
        with contextlib.suppress(FileExistsError):
            part = path.with_name(f"installation.{secrets.token_hex(8)}.part")
            try:
                part.write_text(secrets.token_hex(8), encoding="ascii")
                path.hardlink_to(part)
            finally:
                part.unlink(missing_ok=True)
        return path.read_text(encoding="ascii")
    except OSError as wrong:
        raise RegistryError(f"cannot write {path}: {wrong.strerror}", which=str(path)) from wrong
