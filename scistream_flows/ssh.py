"""Commands on one host over one kept SSH connection: host keys proven, keys and agent only, every call bounded in time.

A host key is never added here. What cannot be proven is an error that says what was offered and how to add it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import getpass
import hashlib
import hmac
import logging
import os
import random
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import paramiko
from paramiko.pkey import UnknownKeyType

from scistream_flows.errors import GatewayUnreachable, HostKeyRejected, error_from_document

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what it would print is in our errors

KEEPALIVE_S: Final = 15
DEAD_PEER_S: Final = 30  # unacknowledged for so long: the kernel ends the connection
SESSIONS: Final = 8  # at a time; sshd allows 10 on a connection by default
ATTEMPTS: Final = 3
LONGEST_ROUTE: Final = 8
CHUNK: Final = 1 << 18
BEGIN: Final = "scistream-begin"  # printed before a command: what a login shell printed is before it

# ValueError: what paramiko's thread makes of a peer that speaks something else
_TRANSIENT: Final = (OSError, EOFError, ValueError, paramiko.SSHException)


class Host(NamedTuple):
    """One host on the way to a gateway, as `facility.toml` and `~/.ssh/config` say."""

    gateway: str
    name: str
    address: str
    port: int
    user: str
    identities: tuple[Path, ...]
    named: bool
    identities_only: bool
    known_hosts: tuple[Path, ...]
    own_known_hosts: Path | None
    known_as: str
    jump: str

    def __str__(self) -> str:
        return f"{self.user}@{self.address}" + ("" if self.port == 22 else f":{self.port}")


class Answer(NamedTuple):
    """What a command left: its exit status, stdout and stderr."""

    exit: int
    stdout: bytes
    stderr: bytes


class SSH:
    """Runs commands on one host. Threads share one connection; it is made when needed, and again when it is dead.

    Args:
        find_host: Says where to connect; asked at each new connection, `~/.ssh/config` may have changed.
        gateway: The gateway's name, for messages.
        connect_timeout_s: For everything up to the moment at which a command can be sent.
    """

    def __init__(self, find_host: Callable[[], Host], *, gateway: str, connect_timeout_s: float) -> None:
        self._find_host = find_host
        self._gateway = gateway
        self._connect_timeout_s = connect_timeout_s
        self._inherited: list[_Connection] = []
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._sessions = threading.BoundedSemaphore(SESSIONS)
        self._current: _Connection | None = None
        self._failure: tuple[float, GatewayUnreachable] | None = None

    @property
    def connection(self) -> object | None:
        """The living connection, to be compared only; None when there is none."""
        current = self._current
        return current if current is not None and self._pid == os.getpid() and current.alive else None

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float) -> Answer:
        """Run a command and wait for it.

        Connecting is tried again within its own time. A command that was sent is never sent twice.

        Raises:
            HostKeyRejected: The host could not prove to be the one that is known.
            GatewayUnreachable: No connection within `connect_timeout_s`: nothing was done. Or no answer within
                `timeout_s` seconds from then on: what was done is unknown.
        """
        with self._session() as (connection, channel):
            answer = connection.converse(channel, argv, stdin, timeout_s)
        _, begun, stdout = answer.stdout.partition(f"{BEGIN}\n".encode())
        return answer._replace(stdout=stdout) if begun else answer

    def close(self) -> None:
        """Close the connection; what runs on the host lives on."""
        if self._pid != os.getpid():
            return
        with self._lock:
            current, self._current = self._current, None
        if current is not None:
            current.close()

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[_Connection, paramiko.Channel]]:
        if self._pid != os.getpid():  # after a fork: the connection is the parent's, its end included
            if self._current is not None:
                self._inherited.append(self._current)
            self._begin()
        deadline = time.monotonic() + self._connect_timeout_s
        if not self._sessions.acquire(timeout=self._connect_timeout_s):
            raise self._unreachable(f"{SESSIONS} commands were running for {self._connect_timeout_s:g} s")
        try:
            connection, channel = self._open_session(deadline)
            try:
                yield connection, channel
            except _Lost as lost:
                self._retire(connection)
                raise lost.error from None
            finally:
                connection.leave(channel)
        finally:
            self._sessions.release()

    def _open_session(self, deadline: float) -> tuple[_Connection, paramiko.Channel]:
        while True:
            connection, is_new = self._connected(deadline)
            # one that looks alive may not be: leave time to connect anew
            patience = _left(deadline) if is_new else _left(deadline) / 2
            gone = time.monotonic() + patience
            try:
                return connection, connection.enter(patience)
            except _TRANSIENT as wrong:
                if connection.alive and _left(gone) > 0:  # the host has no session free
                    time.sleep(0.1)
                    continue
                self._retire(connection)
                if is_new or _left(deadline) <= 0:
                    raise self._unreachable(f"no session was opened: {_words(wrong)}") from None

    def _connected(self, deadline: float) -> tuple[_Connection, bool]:
        asked = time.monotonic()
        with self._lock:
            if self._current is not None and self._current.alive:
                return self._current, False
            if self._current is not None:
                self._current.retire()
                self._current = None
            # who waited here for somebody else's attempt has its outcome, and does not try again
            if self._failure is not None and self._failure[0] >= asked:
                raise error_from_document(self._failure[1].to_document())
            try:
                self._current = _connect(self._find_host(), deadline=max(deadline, time.monotonic() + 1))
            except GatewayUnreachable as wrong:
                self._failure = (time.monotonic(), wrong)
                raise
            return self._current, True

    def _retire(self, connection: _Connection) -> None:
        with self._lock:
            if self._current is connection:
                self._current = None
        connection.retire()

    def _unreachable(self, words: str) -> GatewayUnreachable:
        return GatewayUnreachable(
            f"gateway {self._gateway} cannot be reached by SSH: {words}", which=self._gateway
        )


class _Lost(Exception):
    def __init__(self, error: GatewayUnreachable) -> None:
        super().__init__(error.message)
        self.error = error


class _Connection:
    """The transports to the first jump, …, to the gateway; each but the first goes through the one before it."""

    def __init__(self, host: Host, transports: Sequence[paramiko.Transport]) -> None:
        self.host = host
        self._transports = transports
        self._lock = threading.Lock()
        self._users = 0
        self._retired = False

    @property
    def alive(self) -> bool:
        return all(one.is_active() for one in self._transports)

    def enter(self, timeout_s: float) -> paramiko.Channel:
        with self._lock:
            self._users += 1
        try:
            return self._transports[-1].open_session(timeout=timeout_s)
        except BaseException:
            self.leave(None)
            raise

    def leave(self, channel: paramiko.Channel | None) -> None:
        if channel is not None and self.alive and not self._retired:
            with contextlib.suppress(*_TRANSIENT):
                channel.close()
        with self._lock:
            self._users -= 1
            over = self._retired and self._users == 0
        if over:
            self.close()

    def retire(self) -> None:
        """Close it as soon as nobody uses it."""
        with self._lock:
            self._retired = True
            over = self._users == 0
        if over:
            self.close()

    def close(self) -> None:
        # the outermost first: with it gone, nothing inside can wait for the network
        for transport in self._transports:
            _end(transport)

    def converse(
        self, channel: paramiko.Channel, argv: Sequence[str], stdin: bytes, timeout_s: float
    ) -> Answer:
        deadline = time.monotonic() + timeout_s
        # paramiko waits without limit for the answer to an exec request and for room in the socket
        watchdog = threading.Timer(timeout_s + 1, self.close)
        watchdog.daemon = True
        watchdog.start()
        try:
            command = shlex.join(_fed(argv)) if stdin else f"{shlex.join(argv)} </dev/null"
            channel.exec_command(f"echo {BEGIN}; exec {command}")
            if stdin:
                _send(channel, stdin, deadline)
            try:
                stdout, stderr = (
                    _receive(channel, one, deadline) for one in (channel.recv, channel.recv_stderr)
                )
                while not channel.exit_status_ready():
                    if _left(deadline) <= 0:
                        raise TimeoutError
                    time.sleep(0.002)
            except (KeyboardInterrupt, SystemExit):
                _let_finish(channel)
                raise
        except _TRANSIENT as wrong:
            raise _Lost(self._lost(argv, wrong, timeout_s, deadline)) from None
        finally:
            watchdog.cancel()
            watchdog.join()
        status = channel.recv_exit_status()
        if status == -1:
            raise _Lost(self._lost(argv, EOFError(), timeout_s, deadline))
        return Answer(status, stdout, stderr)

    def _lost(
        self, argv: Sequence[str], wrong: Exception, timeout_s: float, deadline: float
    ) -> GatewayUnreachable:
        gateway = self.host.gateway
        if isinstance(wrong, TimeoutError) or _left(deadline) <= 0:
            words = f"did not end within {timeout_s:g} s"
            hint = "Look at the load of the gateway, then try again"
        else:
            cause = (
                "the connection was lost, or it was killed" if isinstance(wrong, EOFError) else _words(wrong)
            )
            words = f"gave no exit status: {cause}"
            hint = "What it did is unknown; try again"
        return GatewayUnreachable(f"`{_named(argv)}` on gateway {gateway} {words}", which=gateway, hint=hint)


def _fed(argv: Sequence[str]) -> Sequence[str]:
    """A command that does not end before its input does, whether it reads it or not.

    If it did, the end of input that paramiko sends could come after the channel's end, and sshd would then close the
    whole connection.
    """
    return ["sh", "-c", '"$@"; status=$?; cat >/dev/null; exit $status', "sh", *argv]


def _named(argv: Sequence[str]) -> str:
    """A command in a few words: its program, and its verb where it has one."""
    program, *rest = argv
    return " ".join([Path(program).name, *[one for one in rest[:1] if re.fullmatch("[a-z]+", one)]])


def _send(channel: paramiko.Channel, stdin: bytes, deadline: float) -> None:
    try:
        for start in range(0, len(stdin), CHUNK):
            channel.settimeout(max(_left(deadline), 0.001))
            channel.sendall(stdin[start : start + CHUNK])
        channel.shutdown_write()
    except TimeoutError:
        raise
    except (OSError, EOFError):
        pass  # a command need not read its input; if the connection is gone, reading finds it


def _receive(channel: paramiko.Channel, receive: Callable[[int], bytes], deadline: float) -> bytes:
    blocks: list[bytes] = []
    while True:
        channel.settimeout(max(_left(deadline), 0.001))
        block = receive(CHUNK)
        if not block:
            return b"".join(blocks)
        blocks.append(block)


def _let_finish(channel: paramiko.Channel) -> None:
    # Interrupted in mid-start: a relay that is half up cannot be stopped yet, one that is up can. It takes moments.
    deadline = time.monotonic() + 2
    while not channel.exit_status_ready() and _left(deadline) > 0:
        time.sleep(0.01)


def _left(deadline: float) -> float:
    return deadline - time.monotonic()


def _words(wrong: BaseException) -> str:
    if isinstance(wrong, TimeoutError):
        return "it does not answer"
    if isinstance(wrong, paramiko.ChannelException):
        return f"the server says: {wrong.text}"
    if isinstance(wrong, EOFError):
        return "the connection was closed"
    if isinstance(wrong, OSError):
        return wrong.strerror or str(wrong)
    return str(wrong).rstrip(".") or type(wrong).__name__


# --- where to connect to


def find_host(
    gateway: str,
    name: str,
    *,
    port: int | None = None,
    user: str | None = None,
    identity_file: Path | None = None,
    known_hosts: Path | None = None,
) -> Host:
    """The host that `name` means, an alias of `~/.ssh/config` or a host name.

    Args:
        gateway: The gateway's name, for messages.
        name: The alias or host name.
        port: Before `~/.ssh/config`.
        user: Before `~/.ssh/config`.
        identity_file: Before those of `~/.ssh/config`.
        known_hosts: A file of host keys before those of the user and the system.

    Raises:
        GatewayUnreachable: When `~/.ssh/config` cannot be read, or asks for a ProxyCommand.
    """
    options = _options(gateway, name)
    address = str(options["hostname"]).lower()
    jump = "" if (options.get("proxyjump") or "").lower() == "none" else options.get("proxyjump") or ""
    if options.get("proxycommand") and not jump:
        raise GatewayUnreachable(
            f"gateway {gateway}: ~/.ssh/config has a ProxyCommand for {name}, which is not supported",
            which=gateway,
            hint="Use ProxyJump",
        )
    if port is None:
        text = str(options.get("port", "22"))
        if not (text.isdecimal() and 0 < int(text) < 65_536):
            raise GatewayUnreachable(
                f"gateway {gateway}: ~/.ssh/config has Port {text} for {name}, which is none", which=gateway
            )
        port = int(text)
    known_as = str(options.get("hostkeyalias") or (address if port == 22 else f"[{address}]:{port}"))
    named = [identity_file] if identity_file else []
    named += [Path(one) for one in options.get("identityfile", [])]
    folder = Path("~/.ssh")
    default = [folder / f"id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
    files = [
        *([known_hosts] if known_hosts else []),
        *_files(options, "userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2"),
        *_files(options, "globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"),
    ]
    return Host(
        gateway=gateway,
        name=name,
        address=address,
        port=port,
        user=user or options.get("user") or getpass.getuser(),
        identities=tuple(one.expanduser() for one in named or default),
        named=bool(named),
        identities_only=options.get("identitiesonly", "no").lower() == "yes",
        known_hosts=tuple(one.expanduser() for one in files),
        own_known_hosts=known_hosts,
        known_as=known_as.lower(),
        jump=jump,
    )


def _options(gateway: str, name: str) -> Mapping[str, Any]:
    path = Path("~/.ssh/config").expanduser()
    try:
        config = paramiko.SSHConfig.from_path(str(path)) if path.exists() else paramiko.SSHConfig()
        return config.lookup(name)
    except (OSError, ValueError, ImportError, paramiko.SSHException) as wrong:
        raise GatewayUnreachable(
            f"gateway {gateway}: {path} cannot be used: {_words(wrong)}", which=gateway
        ) from None


def _files(options: Mapping[str, Any], key: str, default: str) -> list[Path]:
    return [Path(one) for one in shlex.split(options.get(key) or default) if one != "none"]


def _route(host: Host, *, depth: int = 0) -> list[Host]:
    """The hosts to pass, `host` last. The first jump may have jumps of its own, as in OpenSSH."""
    if depth > LONGEST_ROUTE:
        raise GatewayUnreachable(
            f"gateway {host.gateway}: the ProxyJump of {host.name} leads in a circle", which=host.gateway
        )
    route: list[Host] = []
    for index, text in enumerate(filter(None, host.jump.split(","))):
        parts = urlsplit("ssh://" + text.strip().removeprefix("ssh://"))
        try:
            jump = find_host(
                host.gateway,
                parts.hostname or "",
                port=parts.port,
                user=parts.username,
                known_hosts=host.own_known_hosts,
            )
        except ValueError:
            raise GatewayUnreachable(
                f"gateway {host.gateway}: ProxyJump {text!r} is not [USER@]HOST[:PORT]", which=host.gateway
            ) from None
        route += _route(jump if index == 0 else jump._replace(jump=""), depth=depth + 1)
    return [*route, host]


# --- connecting


def _connect(host: Host, *, deadline: float) -> _Connection:
    """A connection, within the deadline; what may pass is tried again, with growing pauses."""
    pause = 0.2
    for attempt in range(1, ATTEMPTS + 1):
        route = _route(host)
        transports: list[paramiko.Transport] = []
        hop = route[0]
        try:
            for hop in route:
                transports.append(_login(hop, transports[-1] if transports else None, deadline))
        except _TRANSIENT as wrong:
            _end_all(transports)
            wait = pause * (1 + random.random())  # noqa: S311 - no secret
            if attempt == ATTEMPTS or _left(deadline) <= wait:
                way = "" if hop is host else f", on the way to {host}"
                raise GatewayUnreachable(
                    f"gateway {host.gateway} cannot be reached by SSH: {hop}{way}: {_words(wrong)}",
                    which=host.gateway,
                    hint=f"Try `ssh {host.name}` as the user who runs the facility",
                    attempts=attempt,
                ) from None
            time.sleep(wait)
            pause *= 3
        except BaseException:
            _end_all(transports)
            raise
        else:
            return _Connection(host, transports)
    raise AssertionError("unreachable")


def _login(host: Host, through: paramiko.Transport | None, deadline: float) -> paramiko.Transport:
    pipe: Any = _dial(host, deadline) if through is None else _tunnel(host, through, deadline)
    try:
        transport = paramiko.Transport(pipe)
    except BaseException:
        pipe.close()
        raise
    try:
        left = max(_left(deadline), 0.001)
        transport.banner_timeout = transport.handshake_timeout = left + 1  # start_client ends before
        known = [one for one in _known_keys(host) if not one.revoked]
        options = transport.get_security_options()
        # a host has keys of several types: ask for one that can be proven
        wanted = {name for one in known for name in _algorithms(one.kind)}
        options.key_types = sorted(options.key_types, key=lambda name: name not in wanted)
        transport.start_client(timeout=left)
        if not transport.initial_kex_done:
            raise TimeoutError
        _prove(host, transport.get_remote_server_key())
        _authenticate(host, transport, deadline)
        transport.set_keepalive(KEEPALIVE_S)
    except BaseException:
        _end(transport)
        raise
    return transport


def _dial(host: Host, deadline: float) -> socket.socket:
    found = socket.getaddrinfo(host.address, host.port, type=socket.SOCK_STREAM)
    last: OSError = TimeoutError()
    for index, (family, kind, protocol, _, address) in enumerate(found):
        dialled = socket.socket(family, kind, protocol)
        try:
            dialled.settimeout(max(_left(deadline) / (len(found) - index), 0.001))
            dialled.connect(address)
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_S * 1000)
        except OSError as wrong:
            dialled.close()
            last = wrong
        except BaseException:
            dialled.close()
            raise
        else:
            return dialled
    raise last


def _tunnel(host: Host, through: paramiko.Transport, deadline: float) -> paramiko.Channel:
    left = max(_left(deadline), 0.001)
    return through.open_channel("direct-tcpip", (host.address, host.port), ("127.0.0.1", 0), timeout=left)


def _end_all(transports: Sequence[paramiko.Transport]) -> None:
    for transport in transports:
        _end(transport)


def _end(transport: paramiko.Transport) -> None:
    transport.close()
    transport.packetizer.close()
    transport.packetizer.complete_handshake()  # its timer is a thread
    transport.sock.close()
    if transport.is_alive() and transport is not threading.current_thread():
        transport.join(5)


# --- host keys


class _KnownKey(NamedTuple):
    kind: str
    blob: str
    file: Path
    revoked: bool


def _algorithms(kind: str) -> Sequence[str]:
    return ("rsa-sha2-512", "rsa-sha2-256", "ssh-rsa") if kind == "ssh-rsa" else (kind,)


def _known_keys(host: Host) -> list[_KnownKey]:
    """What the files of host keys say about a host. Lines for certificate authorities are not for keys."""
    found = []
    for file in dict.fromkeys(host.known_hosts):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) < 3 or fields[0].startswith("#") or marker not in ("", "@revoked"):
                continue
            if _means(fields[0], host.known_as):
                found.append(_KnownKey(fields[1], fields[2].rstrip("="), file, bool(marker)))
    return found


def _means(patterns: str, name: str) -> bool:
    """Whether the first field of a line of known_hosts means a host: hashed, or patterns of which none may deny it."""
    if patterns.startswith("|1|"):
        try:
            salt, digest = (base64.b64decode(part, validate=True) for part in patterns[3:].split("|"))
        except (ValueError, binascii.Error):
            return False
        return hmac.compare_digest(hmac.digest(salt, name.encode(), "sha1"), digest)
    verdicts = []
    for pattern in patterns.lower().split(","):
        positive = pattern.removeprefix("!")
        regex = "".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in positive)
        if re.fullmatch(regex, name):
            verdicts.append(positive == pattern)
    return bool(verdicts) and all(verdicts)


def _prove(host: Host, key: paramiko.PKey) -> None:
    """Raise HostKeyRejected unless the key is known for the host."""
    kind, blob = key.get_name(), key.get_base64()
    known = _known_keys(host)
    same = [one for one in known if (one.kind, one.blob) == (kind, blob.rstrip("="))]
    revoked = next((one for one in same if one.revoked), None)
    if same and revoked is None:
        return
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    offered = f"it offered {kind} SHA256:{digest}"
    known = [one for one in known if not one.revoked]
    file = revoked.file if revoked else known[0].file if known else host.known_hosts[0]
    quoted = shlex.quote(str(file))
    add = f"echo {shlex.quote(f'{host.known_as} {kind} {blob}')} >> {quoted}"
    remove = f"ssh-keygen -R {shlex.quote(host.known_as)} -f {quoted}"
    if revoked:
        words, command = f"is revoked in {file}", ""
        hint = "Do not connect: ask the administrator of the host for its new key"
    elif known:
        words, command = f"is not the one in {file}", f"{remove} && {add}"
        hint = (
            "Either the host was set up anew or somebody is in between. Compare the fingerprint with its"
            f" administrator, then replace the key: {command}"
        )
    else:
        words, command = f"is not in {file}", add
        hint = f"Compare the fingerprint with the administrator of the host, then add the key: {command}"
    raise HostKeyRejected(
        f"gateway {host.gateway}: the host key of {host.known_as} {words}; {offered}",
        which=host.gateway,
        hint=hint,
        host=host.known_as,
        file=str(file),
        fingerprint=f"SHA256:{digest}",
        command=command,
    )


# --- the user


def _authenticate(host: Host, transport: paramiko.Transport, deadline: float) -> None:
    tried: list[str] = []
    with contextlib.closing(_keys(host, tried)) as keys:
        for key in keys:
            transport.auth_timeout = max(_left(deadline), 0.001)
            try:
                further = transport.auth_publickey(host.user, key)
            except paramiko.BadAuthenticationType as wrong:
                raise _denied(host, f"takes no keys, only {', '.join(wrong.allowed_types)}") from None
            except (paramiko.SSHException, EOFError):
                if _left(deadline) <= 0:
                    raise TimeoutError from None
                if transport.is_active():
                    continue
                if len(tried) <= 1:
                    raise
                break  # it has seen enough keys
            if further:
                raise _denied(host, f"wants more than a key: {', '.join(further)}")
            return
    raise _denied(host, f"accepts none of the keys: {', '.join(tried) or 'there is none'}")


def _denied(host: Host, words: str) -> GatewayUnreachable:
    return GatewayUnreachable(
        f"gateway {host.gateway}: {host} {words}",
        which=host.gateway,
        hint="Name the key with identity_file or in ~/.ssh/config, or load it into the agent, and see that the host"
        " has it in authorized_keys; passwords are not supported",
    )


def _keys(host: Host, tried: list[str]) -> Generator[paramiko.PKey, None, None]:
    """The keys to try, each noted in `tried` by name: those that are named, then the agent's, then the usual ones."""
    with _agent_keys(tried) as held:
        offered = set()
        for path in host.identities if host.named else ():
            key = _from_file(path, held, tried)
            if key is not None:
                offered.add(key.get_base64())
                yield key
        for one in () if host.identities_only else held:
            if one.get_base64() not in offered:
                tried.append(f"{one.comment or 'a key'} (agent)")
                yield one
        for path in () if host.named else host.identities:
            key = _from_file(path, held, tried) if path.exists() else None
            if key is not None:
                yield key


def _from_file(path: Path, held: Sequence[paramiko.AgentKey], tried: list[str]) -> paramiko.PKey | None:
    """The key in a file; if a passphrase protects it, the agent's one of the same public key."""
    try:
        key = paramiko.PKey.from_path(path)
    except FileNotFoundError:
        tried.append(f"{path} (no such file)")
        return None
    except (OSError, ValueError, TypeError, paramiko.SSHException, UnknownKeyType) as wrong:
        with contextlib.suppress(OSError, IndexError):
            public = path.with_name(path.name + ".pub").read_text(encoding="utf-8").split()[1]
            for one in held:
                if one.get_base64() == public:
                    tried.append(f"{path} (agent)")
                    return one
        protected = isinstance(wrong, TypeError | paramiko.PasswordRequiredException)
        tried.append(f"{path} ({'protected by a passphrase' if protected else 'not a private key'})")
        return None
    tried.append(str(path))
    return key


@contextlib.contextmanager
def _agent_keys(tried: list[str]) -> Iterator[Sequence[paramiko.AgentKey]]:
    try:
        agent = paramiko.Agent()
    except (OSError, EOFError, paramiko.SSHException) as wrong:
        tried.append(f"agent ({_words(wrong)})")
        yield ()
        return
    try:
        yield agent.get_keys()
    finally:
        agent.close()
