"""Gateways over SSH, against a real sshd whose user has no Python and may write in one directory only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from sshd import Account, Server, make_key, why_not

from scistream_flows import s2cs
from scistream_flows.config import GatewayConfig, load_facility
from scistream_flows.errors import (
    ConfigError,
    GatewayUnreachable,
    HostKeyRejected,
    NotFound,
    ProtocolMismatch,
    RelayError,
)
from scistream_flows.gateway import SSHGateway
from scistream_flows.relay import find_s2ds
from scistream_flows.s2cs import S2CS
from scistream_flows.ssh import find_host
from scistream_flows.stream import open_stream

Within = Callable[..., None]

PROD = {"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]}
SIDE = {"protocol": 1, "uid": "s", "role": "PROD"}
POLICY = """
[policy]
targets = ["127.0.0.0/8"]
peers = ["127.0.0.0/8"]
consumers = ["127.0.0.0/8"]
"""


@pytest.fixture(scope="module")
def the_account() -> Iterator[Account]:
    if reason := why_not():
        pytest.skip(reason)
    Path("/run/sshd").mkdir(
        mode=0o755, exist_ok=True
    )  # where sshd locks itself in; any other may use it too: it stays
    account = Account()
    yield account
    account.remove()


@pytest.fixture
def account(the_account: Account, within: Within) -> Iterator[Account]:
    """The gateway's user; after the test nothing of it runs, and it has written nowhere but in its directory."""
    the_account.clean()
    yield the_account
    try:
        within(lambda: not the_account.processes(), what="the processes of the user to end")
    finally:
        for pid in the_account.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert the_account.lost() == []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the user who runs the facility: one key, nothing else."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    make_key(home / ".ssh" / "id_ed25519")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def sshd(account: Account, home: Path) -> Iterator[Callable[..., Server]]:
    """A function that starts an sshd; its key is known unless told otherwise."""
    servers: list[Server] = []

    def start(*lines: str, known: bool = True) -> Server:
        servers.append(Server(account, (home / ".ssh" / "id_ed25519.pub").read_text(), *lines))
        servers[-1].start()
        if known:
            with (home / ".ssh" / "known_hosts").open("a") as file:
                file.write(servers[-1].host_key)
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def server(sshd: Callable[..., Server]) -> Server:
    return sshd()


@pytest.fixture(autouse=True)
def no_thread_is_left(within: Within) -> Iterator[None]:
    yield
    kinds = (paramiko.Transport, threading.Timer)
    within(
        lambda: not [one for one in threading.enumerate() if isinstance(one, kinds)], what="threads to end"
    )


def table(server: Server, name: str = "gw", **changes: Any) -> dict[str, Any]:
    """The `[[gateway]]` of a server."""
    keys = {
        "name": name,
        "kind": "ssh",
        "wan_bind": "127.0.0.1",
        "lan_bind": "127.0.0.1",
        "host": "127.0.0.1",
        "port": server.port,
        "user": server.account.name,
        "directory": str(server.account.directory),
    } | changes
    return {key: value for key, value in keys.items() if value is not None}


LOCAL = {"name": "here", "wan_bind": "127.0.0.1", "lan_bind": "127.0.0.1"}


@pytest.fixture
def configured(state_base: Path) -> Callable[..., None]:  # noqa: ARG001 - where the state goes
    """A function that writes the file of a facility."""

    def write(name: str, *tables: dict[str, Any]) -> None:
        lines = [f'[facility]\nname = "{name}"']
        for one in tables:
            lines += ["[[gateway]]", *[f"{key} = {json.dumps(value)}" for key, value in one.items()]]
        folder = Path(os.environ["SCISTREAM_CONFIG_DIR"])
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.toml").write_text("\n".join(lines) + POLICY)

    return write


@pytest.fixture
def service(configured: Callable[..., None]) -> Iterator[Callable[..., S2CS]]:
    """A function that makes the service of the facility `site` with the gateways given."""
    with contextlib.ExitStack() as stack:

        def make(*tables: dict[str, Any]) -> S2CS:
            configured("site", *tables)
            return stack.enter_context(S2CS(load_facility("site")))

        yield make


@pytest.fixture
def gateway() -> Iterator[Callable[..., SSHGateway]]:
    """A function that makes a gateway by itself."""
    made: list[SSHGateway] = []

    def make(server: Server, **changes: Any) -> SSHGateway:
        made.append(SSHGateway(GatewayConfig(**table(server, **changes)), runtime_name="relays"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def audit(service: S2CS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (service.config.state_dir / "audit.jsonl").read_text().splitlines()]


# --- a stream


@pytest.mark.parametrize("both", [False, True], ids=["CONS over SSH", "both sides over SSH"])
def test_a_stream_lives_its_whole_life(
    both: bool,  # noqa: FBT001 - a parameter of the test
    sshd: Callable[..., Server],
    account: Account,
    configured: Callable[..., None],
    application: Any,
    talk: Callable[[str, bytes], str],
) -> None:
    configured("aps", table(sshd(), "a") if both else LOCAL)
    configured("alcf", table(sshd(), "b"))
    payload = random.Random(2).randbytes(3_000_000)  # noqa: S311 - no secret
    with open_stream("local:aps", "local:alcf", targets=[application.address], mode="tls") as stream:
        assert len(account.relays()) == 1 + both
        received = talk(stream.listeners[0], payload)
    assert received == hashlib.sha256(application.payload).hexdigest()
    assert application.received == [hashlib.sha256(payload).hexdigest()]
    assert account.left() == []


def test_a_relay_outlives_the_session_and_is_found_again(
    server: Server, account: Account, service: Callable[..., S2CS], within: Within
) -> None:
    first = service(table(server))
    offer = first.request(PROD)
    first.close()
    within(lambda: not server.sessions(), what="the session to end")
    assert len(account.relays()) == 1
    second = service(table(server))
    assert second.status(SIDE).state == "LISTENING"
    assert second.request(PROD).relays == offer.relays
    end = second.release(SIDE).end
    assert end is not None
    assert end.reason == "released"
    assert account.relays() == []
    assert account.left() == []


def test_the_user_of_the_gateway_has_no_python_and_one_directory(server: Server, gateway: Any) -> None:
    outcome = gateway(server).run(["sh", "-c", "command -v python3; echo x >$HOME/x"], timeout_s=10)
    assert outcome.exit != 0
    assert outcome.stdout == ""


def test_a_login_shell_that_talks_does_no_harm(
    server: Server, account: Account, service: Callable[..., S2CS]
) -> None:
    (account.home / ".bashrc").write_text(
        "echo welcome to the gateway; echo '{}' >&2; printf 'no end of line'\n"
    )
    subprocess.run(["usermod", "--shell", "/bin/bash", account.name], check=True, capture_output=True)
    try:
        site = service(table(server))
        site.request(PROD)
        assert site.release(SIDE).end is not None
    finally:
        subprocess.run(["usermod", "--shell", "/bin/sh", account.name], check=True, capture_output=True)
        (account.home / ".bashrc").unlink()


# --- the copy of the relay


def test_the_relay_is_copied_once(server: Server, account: Account, service: Callable[..., S2CS]) -> None:
    service(table(server)).request(PROD)
    (copy,) = account.copies()
    digest = hashlib.sha256(Path(find_s2ds()).read_bytes()).hexdigest()
    assert copy.name == f"s2ds-{digest}"
    assert copy.stat().st_mode & 0o777 == 0o700
    before = copy.stat()
    again = service(table(server))
    again.release(SIDE)
    assert account.copies() == [copy]
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("able", [True, False], ids=["with sha256sum", "without sha256sum"])
@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\nexit 0\n"], ids=["empty", "another program"])
def test_a_spoiled_copy_is_noticed_and_replaced(
    able: bool,  # noqa: FBT001 - a parameter of the test
    content: bytes,
    server: Server,
    account: Account,
    gateway: Any,
) -> None:
    if not able:
        (account.tools / "sha256sum").unlink()
    assert gateway(server).relays.list() == []
    (copy,) = account.copies()
    copy.write_bytes(content)
    assert gateway(server).relays.list() == []
    assert copy.read_bytes() == Path(find_s2ds()).read_bytes()


def test_a_copy_that_vanishes_under_a_living_connection_is_replaced(
    server: Server, account: Account, service: Callable[..., S2CS]
) -> None:
    site = service(table(server))
    site.request(PROD)
    for copy in account.copies():
        copy.unlink()
    site.release(SIDE)
    assert len(account.copies()) == 1


def test_copies_at_the_same_moment_do_not_spoil_each_other(
    server: Server, account: Account, gateway: Any
) -> None:
    gateways = [gateway(server) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda one: one.relays.list(), gateways)) == [[]] * 4
    (copy,) = account.files()
    assert copy.read_bytes() == Path(find_s2ds()).read_bytes()


def test_another_architecture_is_named_and_an_installed_relay_is_used(
    server: Server, account: Account, gateway: Any
) -> None:
    account.tool("uname", '[ "$1" = -s ] && echo Linux || echo riscv64')
    with pytest.raises(
        RelayError, match="is Linux riscv64, but the relay of this installation is for Linux"
    ) as caught:
        _ = gateway(server).relays
    assert "s2ds in facility.toml" in caught.value.hint
    assert account.files() == []
    installed = account.tools / "the relay"
    shutil.copy(find_s2ds(), installed)
    assert gateway(server, s2ds=str(installed)).relays.list() == []
    assert account.copies() == []


def test_an_installed_relay_of_another_protocol_or_none_is_said(
    server: Server, account: Account, gateway: Any
) -> None:
    other = account.tool("s2ds", """echo '{"name":"s2ds","version":"9","protocol":9}'""")
    with pytest.raises(ProtocolMismatch, match="speaks protocol 9, this package speaks 1"):
        _ = gateway(server, s2ds=str(other)).relays
    with pytest.raises(RelayError, match=r"/nowhere/s2ds is no relay that runs there: .*not found"):
        _ = gateway(server, s2ds="/nowhere/s2ds").relays


def test_a_directory_that_others_may_write_in_is_refused(
    server: Server, account: Account, gateway: Any
) -> None:
    account.directory.chmod(0o777)
    with pytest.raises(RelayError, match="can be written by others: chmod go-w"):
        _ = gateway(server).relays
    with pytest.raises(RelayError, match="does not belong to this user, or cannot be written"):
        _ = gateway(server, directory=str(account.home)).relays
    with pytest.raises(RelayError, match="Permission denied") as caught:
        _ = gateway(server, directory=None).relays  # below the home, where this user may not write
    assert caught.value.errno == "EACCES"


def test_a_full_disk_is_said_and_nothing_is_left(
    server: Server, account: Account, service: Callable[..., S2CS]
) -> None:
    with contextlib.ExitStack() as disk:
        try:
            disk.enter_context(account.small_disk("size=1m"))
        except PermissionError as wrong:
            pytest.skip(f"a small disk needs the right to mount: {wrong}")
        site = service(table(server))
        with pytest.raises(RelayError, match=r"gateway gw: .*No space left on device") as caught:
            site.request(PROD)
        assert caught.value.errno == "ENOSPC"
        assert account.files() == []
        with pytest.raises(NotFound):
            site.status(SIDE)


def test_files_and_arguments_are_what_they_are_whatever_a_shell_makes_of_them(
    server: Server, account: Account, gateway: Any
) -> None:
    one = gateway(server)
    path = account.directory / 'it\'s $HOME; "a" `b` *'
    one.put(b"\0\xff" * 100_000, str(path), mode=0o640)
    assert path.read_bytes() == b"\0\xff" * 100_000
    assert path.stat().st_mode & 0o777 == 0o640
    argv = ["sh", "-c", 'cat; echo "$1" >&2; exit 3', "sh", "it's $HOME\n*"]
    assert one.run(argv, stdin="input", timeout_s=10) == (3, "input", "it's $HOME\n*\n")
    assert one.run(["true"], stdin="x" * 5_000_000, timeout_s=10).exit == 0
    with pytest.raises(RelayError, match="none/file cannot be written: "):
        one.put(b"", str(account.directory / "none" / "file"))


# --- host keys


def test_an_unknown_host_is_refused_and_the_printed_command_adds_it(
    sshd: Callable[..., Server], home: Path, gateway: Any
) -> None:
    server = sshd(known=False)
    with pytest.raises(HostKeyRejected, match="is not in") as caught:
        gateway(server).run(["true"], timeout_s=5)
    details = caught.value.details
    fingerprint = subprocess.run(["ssh-keygen", "-lf", server.key], capture_output=True, text=True).stdout
    assert details["fingerprint"] == fingerprint.split()[1]
    assert details["host"] == server.known_as
    assert details["file"] == str(home / ".ssh" / "known_hosts")
    assert all(text in str(caught.value) for text in (*details.values(), "gateway gw"))
    assert not (home / ".ssh" / "known_hosts").exists()
    subprocess.run(["sh", "-c", details["command"]], check=True)
    assert gateway(server).run(["true"], timeout_s=5).exit == 0


def test_a_changed_host_key_is_refused_and_the_printed_command_replaces_it(
    server: Server, sshd: Callable[..., Server], home: Path, gateway: Any
) -> None:
    known = home / ".ssh" / "known_hosts"
    known.write_text(
        server.host_key.replace(server.host_key.split()[2], sshd(known=False).host_key.split()[2])
    )
    with pytest.raises(
        HostKeyRejected, match=r"is not the one in .*set up anew or somebody is in between"
    ) as caught:
        gateway(server).run(["true"], timeout_s=5)
    subprocess.run(["sh", "-c", caught.value.details["command"]], check=True, capture_output=True)
    assert gateway(server).run(["true"], timeout_s=5).exit == 0


def test_a_file_of_the_gateway_is_asked_before_those_of_the_user(
    sshd: Callable[..., Server], home: Path, tmp_path: Path, gateway: Any
) -> None:
    server = sshd(known=False)
    (tmp_path / "keys").write_text(server.host_key)
    assert gateway(server, known_hosts=str(tmp_path / "keys")).run(["true"], timeout_s=5).exit == 0
    (tmp_path / "keys").write_text(f"@revoked {server.host_key}{server.host_key}")
    with pytest.raises(HostKeyRejected, match=r"is revoked in .*keys; it offered"):
        gateway(server, known_hosts=str(tmp_path / "keys")).run(["true"], timeout_s=5)
    assert not (home / ".ssh" / "known_hosts").exists()


@pytest.mark.parametrize(
    ("pattern", "means"),
    [("[127.0.0.*]:*", True), ("*,![127.0.0.1]:*", False), ("127.0.0.1", False), ("|1|no|no", False)],
)
def test_patterns_of_known_hosts_mean_what_they_mean_to_openssh(
    pattern: str,
    means: bool,  # noqa: FBT001 - a parameter of the test
    sshd: Callable[..., Server],
    home: Path,
    gateway: Any,
) -> None:
    server = sshd(known=False)
    known = home / ".ssh" / "known_hosts"
    known.write_text(f"# {server.host_key}{server.host_key.replace(server.known_as, pattern)}")
    with contextlib.nullcontext() if means else pytest.raises(HostKeyRejected):
        gateway(server).run(["true"], timeout_s=5)


def test_a_hashed_name_is_found(server: Server, home: Path, gateway: Any) -> None:
    known = home / ".ssh" / "known_hosts"
    subprocess.run(["ssh-keygen", "-H", "-f", known], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    assert gateway(server).run(["true"], timeout_s=5).exit == 0


# --- the user


def test_a_key_that_is_not_accepted_and_a_wrong_user_are_said(
    server: Server, tmp_path: Path, home: Path, gateway: Any
) -> None:
    make_key(tmp_path / "other")
    (home / ".ssh" / "id_ed25519").rename(home / "moved")
    with pytest.raises(GatewayUnreachable, match=r"accepts none of the keys: .*/other") as caught:
        gateway(server, identity_file=str(tmp_path / "other")).run(["true"], timeout_s=5)
    assert "passwords are not supported" in caught.value.hint
    with pytest.raises(GatewayUnreachable, match="accepts none of the keys: there is none"):
        gateway(server).run(["true"], timeout_s=5)
    with pytest.raises(GatewayUnreachable, match=r"accepts none of the keys: .*none \(no such file\)"):
        gateway(server, identity_file=str(tmp_path / "none")).run(["true"], timeout_s=5)
    with pytest.raises(GatewayUnreachable, match=r"gateway gw: nobody@127\.0\.0\.1:\d+ accepts none"):
        gateway(server, user="nobody", identity_file=str(home / "moved")).run(["true"], timeout_s=5)
    assert gateway(server, identity_file="~/moved").run(["true"], timeout_s=5).exit == 0


def test_a_protected_key_needs_the_agent(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, gateway: Any
) -> None:
    key = home / ".ssh" / "id_ed25519"
    argv = ["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(key)]
    subprocess.run(argv, check=True, capture_output=True)
    with pytest.raises(GatewayUnreachable, match="protected by a passphrase"):
        gateway(server).run(["true"], timeout_s=5)
    path = home / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as agent:
        try:
            deadline = time.monotonic() + 5
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
            (home / "ask").write_text("#!/bin/sh\necho secret\n")
            (home / "ask").chmod(0o700)
            asking = {**os.environ, "SSH_ASKPASS": str(home / "ask"), "SSH_ASKPASS_REQUIRE": "force"}
            subprocess.run(["ssh-add", "-q", key], check=True, env=asking, capture_output=True)
            assert gateway(server).run(["true"], timeout_s=5).exit == 0
            assert gateway(server, identity_file=str(key)).run(["true"], timeout_s=5).exit == 0
        finally:
            agent.terminate()


# --- ~/.ssh/config


def test_an_alias_of_ssh_config_is_all_that_is_needed(
    sshd: Callable[..., Server], account: Account, home: Path, gateway: Any
) -> None:
    server = sshd(known=False)
    (home / ".ssh" / "id_ed25519").rename(home / "a key")
    (home / "known-hosts").write_text(server.host_key)
    (home / ".ssh" / "config").write_text(
        f'Host dtn\n HostName 127.0.0.1\n Port {server.port}\n User {account.name}\n IdentityFile "~/a key"\n'
        f'Host *\n UserKnownHostsFile "{home}/none" {home}/known-hosts\n User nobody\n StrictHostKeyChecking no\n'
    )
    assert gateway(server, host="dtn", port=None, user=None).run(["true"], timeout_s=5).exit == 0


def test_a_gateway_behind_another_is_reached_by_proxy_jump(
    sshd: Callable[..., Server], account: Account, home: Path, service: Callable[..., S2CS], within: Within
) -> None:
    jump, server = sshd(), sshd("AllowTcpForwarding no")
    (home / ".ssh" / "config").write_text(
        f"Host bastion\n HostName 127.0.0.1\n Port {jump.port}\n User {account.name}\n"
        f"Host dtn\n HostName 127.0.0.1\n Port {server.port}\n User {account.name}\n ProxyJump bastion\n"
    )
    site = service(table(server, host="dtn", port=None, user=None))
    site.request(PROD)
    assert (len(jump.sessions()), len(server.sessions())) == (1, 1)
    site.release(SIDE)
    site.close()
    within(lambda: not jump.sessions() and not server.sessions(), what="both connections to end")


def test_a_jump_that_fails_is_named(
    sshd: Callable[..., Server], account: Account, home: Path, gateway: Any
) -> None:
    jump, server = sshd(known=False), sshd()
    config = home / ".ssh" / "config"
    config.write_text(f"Host 127.0.0.1\n ProxyJump {account.name}@localhost:{jump.port}\n")
    with pytest.raises(HostKeyRejected) as caught:
        gateway(server).run(["true"], timeout_s=5)
    assert caught.value.details["host"] == f"[localhost]:{jump.port}"
    with (home / ".ssh" / "known_hosts").open("a") as file:
        file.write(jump.host_key.replace("127.0.0.1", "localhost"))
    assert gateway(server).run(["true"], timeout_s=5).exit == 0
    server.kill()
    with pytest.raises(GatewayUnreachable, match="the server says: "):
        gateway(server).run(["true"], timeout_s=5)
    config.write_text("Host a\n ProxyJump b\nHost b\n ProxyJump a\n")
    with pytest.raises(GatewayUnreachable, match="leads in a circle"):
        gateway(server, host="a").run(["true"], timeout_s=5)
    config.write_text("Host a\n Port ssh\n")
    with pytest.raises(GatewayUnreachable, match="has Port ssh for a"):
        find_host("gw", "a")
    config.write_text("Host *\n ProxyCommand nc %h %p\n")
    with pytest.raises(GatewayUnreachable, match=r"has a ProxyCommand .*Use ProxyJump"):
        find_host("gw", "somewhere")


# --- connections that do not hold


def test_a_host_that_does_not_answer_is_given_up_in_time(server: Server, gateway: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = gateway(server, port=silent.getsockname()[1], connect_timeout_s=1)
        began = time.monotonic()
        with pytest.raises(GatewayUnreachable, match="it does not answer"):
            one.run(["true"], timeout_s=30)
        # who comes while another one tries has the same answer, not a time-out of his own after it
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(one.run, ["true"], timeout_s=30) for _ in range(4)]
        assert all(isinstance(future.exception(), GatewayUnreachable) for future in futures)
        assert time.monotonic() - began < 5


def test_a_refused_connection_is_tried_again_a_few_times(server: Server, gateway: Any) -> None:
    server.kill()
    with pytest.raises(GatewayUnreachable, match="Connection refused") as caught:
        gateway(server).run(["true"], timeout_s=5)
    assert caught.value.details["attempts"] == 3


def test_a_connection_that_stops_in_its_tracks_is_given_up_and_made_anew(
    server: Server, gateway: Any, within: Within
) -> None:
    one = gateway(server, connect_timeout_s=3)
    one.run(["true"], timeout_s=5)
    stopped = server.every_session()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert (
            one.run(["true"], timeout_s=5).exit == 0
        )  # found dead before the command was sent: nothing is unknown
        assert time.monotonic() - began < 3
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    within(lambda: len(server.sessions()) == 1, what="the first connection to end")


def test_a_host_that_stops_in_the_midst_of_a_command_is_given_up_in_time(
    server: Server, gateway: Any
) -> None:
    one = gateway(server)
    one.run(["true"], timeout_s=5)
    stopped = server.every_session()

    def stop_all() -> None:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    stop = threading.Timer(0.2, stop_all)
    stop.start()
    try:
        began = time.monotonic()
        with pytest.raises(GatewayUnreachable, match="`sh` on gateway gw did not end within 1 s"):
            one.run(["sh", "-c", "sleep 1; cat >/dev/null"], stdin="x" * 60_000_000, timeout_s=1)
        assert time.monotonic() - began < 4
    finally:
        stop.join()
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def test_a_slow_command_is_given_up_and_disturbs_no_other(server: Server, gateway: Any) -> None:
    one = gateway(server)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(one.run, ["sh", "-c", "sleep 1.5; echo done"], timeout_s=10)
        time.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(GatewayUnreachable, match=r"`sleep` on gateway gw did not end within 0\.5 s"):
            one.run(["sleep", "3"], timeout_s=0.5)
        assert time.monotonic() - began < 1.5
        assert other.result(10).stdout == "done\n"


@pytest.mark.parametrize("lines", [(), ("MaxSessions 1",)], ids=["as usual", "one session at a time"])
def test_threads_share_one_connection(
    lines: Sequence[str], sshd: Callable[..., Server], gateway: Any
) -> None:
    server = sshd(*lines)
    one = gateway(server)
    with ThreadPoolExecutor(20) as pool:
        outcomes = list(
            pool.map(lambda number: one.run(["sh", "-c", f"echo {number}"], timeout_s=20), range(20))
        )
    assert [int(outcome.stdout) for outcome in outcomes] == list(range(20))
    assert len(server.sessions()) == 1


def test_after_close_nothing_is_held(server: Server, gateway: Any, within: Within) -> None:
    one = gateway(server)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    one.run(["true"], timeout_s=5)
    one.close()
    assert not [thread for thread in threading.enumerate() if isinstance(thread, paramiko.Transport)]
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - a count
    within(lambda: not server.sessions(), what="the session to end")
    assert one.run(["true"], timeout_s=5).exit == 0


INTERRUPTED = """
import json, sys
from scistream_flows.config import GatewayConfig
from scistream_flows.gateway import SSHGateway
gateway = SSHGateway(GatewayConfig(**json.loads(sys.argv[1])), runtime_name="relays")
gateway.run(["true"], timeout_s=10)
print("running", flush=True)
gateway.run(["sh", "-c", "sleep 0.5; echo done >" + sys.argv[2]], timeout_s=30)
"""


def test_ctrl_c_lets_the_running_command_finish(server: Server, account: Account) -> None:
    done = account.directory / "done"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, json.dumps(table(server)), str(done)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "running\n"
        time.sleep(0.2)
        script.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert script.wait(10) != 0
        assert time.monotonic() - began > 0.1
    assert done.read_text() == "done\n"


def test_a_forked_process_makes_its_own_connection_and_leaves_the_parents_alone(
    server: Server, gateway: Any
) -> None:
    one = gateway(server)
    one.run(["true"], timeout_s=5)
    child = multiprocessing.get_context("fork").Process(
        target=one.run, args=(["true"],), kwargs={"timeout_s": 5}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        child.start()
    child.join(20)
    assert child.exitcode == 0
    connection = one._ssh.connection
    assert one.run(["true"], timeout_s=5).exit == 0
    assert one._ssh.connection is connection


# --- sshd and S2CS killed


def test_sshd_killed_in_mid_life_is_said_and_the_relay_is_found_again(
    server: Server, account: Account, service: Callable[..., S2CS]
) -> None:
    site = service(table(server))
    site.request(PROD)
    (relay,) = account.relays()
    server.kill()
    with pytest.raises(
        GatewayUnreachable, match=r"gateway gw cannot be reached by SSH: .*Connection refused"
    ):
        site.status(SIDE)
    assert account.relays() == [relay]
    server.start()
    assert site.status(SIDE).state == "LISTENING"
    site.release(SIDE)
    assert account.left() == []


def test_a_relay_that_nobody_can_reach_ends_by_its_lease_and_is_cleared_away_later(
    server: Server,
    account: Account,
    service: Callable[..., S2CS],
    within: Within,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s2cs, "GATEWAY_RETRY_S", 0)
    site = service(table(server))
    site.request(PROD | {"lease_s": 2})
    server.kill()
    within(lambda: not account.relays(), timeout_s=6, what="the lease to end")
    server.start()
    assert site.status(SIDE).reason == "lease_expired"
    assert site.list({"protocol": 1}).streams == []
    assert account.left() == []


SLOW = 'if [ "$1" = start ]; then sleep 1; fi; exec {} "$@"'


@pytest.fixture
def slow(account: Account) -> dict[str, str]:
    """An installed relay that takes a second to start."""
    shutil.copy(find_s2ds(), account.tools / "s2ds-real")
    return {"s2ds": str(account.tool("slow", SLOW.format(account.tools / "s2ds-real")))}


def test_sshd_killed_in_mid_start_is_said_and_what_comes_up_is_cleared_away(
    server: Server,
    account: Account,
    slow: dict[str, str],
    service: Callable[..., S2CS],
    within: Within,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s2cs, "GATEWAY_RETRY_S", 0)
    site = service(table(server, **slow))
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(site.request, PROD)
        within(lambda: account.processes("sleep"), what="the start to begin")
        server.kill()
        with pytest.raises(GatewayUnreachable, match="`slow start` on gateway gw gave no exit status"):
            request.result(30)
    within(account.relays, what="the relay to come up nevertheless")
    server.start()
    assert site.list({"protocol": 1}).streams == []
    within(lambda: site.list({"protocol": 1}).streams == [] and not account.relays() and not account.left())
    site.request(PROD)
    site.release(SIDE)


STARTING = """
from scistream_flows.config import load_facility
from scistream_flows.s2cs import S2CS
S2CS(load_facility("site")).request({"protocol": 1, "uid": "s", "role": "PROD", "targets": ["127.0.0.1:9"]})
"""


def test_a_service_killed_in_mid_start_is_reconciled(
    server: Server, account: Account, slow: dict[str, str], service: Callable[..., S2CS], within: Within
) -> None:
    site = service(table(server, **slow))
    with subprocess.Popen([sys.executable, "-c", STARTING]) as other:
        within(lambda: account.processes("sleep"), timeout_s=10)
        other.send_signal(signal.SIGKILL)
    within(lambda: [one for one in account.left() if one.is_socket()], what="the relay to come up")
    time.sleep(0.2)
    assert site.status(SIDE).state == "LISTENING"
    assert len(account.relays()) == 1
    site.release(SIDE)
    assert account.relays() == []
    assert account.left() == []


# --- several gateways


def test_a_gateway_that_does_not_answer_is_skipped_said_and_used_again_when_back(
    server: Server,
    service: Callable[..., S2CS],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(s2cs, "GATEWAY_RETRY_S", 0.5)
    site = service(table(server, capacity_mbits_per_s=2000), LOCAL | {"capacity_mbits_per_s": 1000})
    server.kill()
    (relay,) = site.request(PROD).relays
    assert relay.gateway == "here"
    assert "gateway gw is skipped: gateway gw cannot be reached by SSH" in caplog.text
    (skipped,) = [one for one in audit(site) if one["event"] == "skip"]
    assert (skipped["gateway"], skipped["uid"]) == ("gw", "s")
    assert "Connection refused" in skipped["message"]
    site.release(SIDE)
    server.start()
    time.sleep(0.6)
    (relay,) = site.request(PROD).relays
    assert relay.gateway == "gw"
    site.release(SIDE)


def test_a_gateway_lost_in_mid_start_gives_its_place_to_another(
    server: Server, account: Account, slow: dict[str, str], service: Callable[..., S2CS], within: Within
) -> None:
    site = service(table(server, capacity_mbits_per_s=2000, **slow), LOCAL | {"capacity_mbits_per_s": 1000})
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(site.request, PROD | {"lease_s": 2, "until": "released"})
        within(lambda: account.processes("sleep"), what="the start to begin")
        server.kill()
        assert request.result(30).relays[0].gateway == "here"
    site.release(SIDE)
    within(lambda: not account.processes(), timeout_s=8, what="the other one to end by its lease")


def test_a_stream_may_be_spread_over_another_machine_and_this_one(
    server: Server,
    account: Account,
    configured: Callable[..., None],
    application: Any,
    talk: Callable[[str, bytes], str],
) -> None:
    for name in ("aps", "alcf"):
        configured(name, table(server), LOCAL)
    payload = random.Random(5).randbytes(1_000_000)  # noqa: S311 - no secret
    with open_stream(
        "local:aps", "local:alcf", targets=[application.address], num_conn=2, gateways=2, linger_s=1
    ) as stream:
        assert len(account.relays()) == 2
        assert {relay.gateway for relay in stream.offers["PROD"].relays} == {"gw", "here"}
        with ThreadPoolExecutor(2) as pool:
            heard = [*pool.map(lambda address: talk(address, payload), stream.listeners)]
        assert stream.wait(30).check().reasons == {"PROD": "finished", "CONS": "finished"}
    assert heard == [hashlib.sha256(application.payload).hexdigest()] * 2
    assert application.received == [hashlib.sha256(payload).hexdigest()] * 2
    assert account.left() == []


def test_when_none_answers_each_is_named_with_its_reason(
    server: Server, sshd: Callable[..., Server], service: Callable[..., S2CS]
) -> None:
    site = service(table(server, "one"), table(sshd(known=False), "two"))
    server.kill()
    with pytest.raises(GatewayUnreachable, match="no gateway of facility site can be used") as caught:
        site.request(PROD)
    reasons = caught.value.details["gateways"]
    assert "Connection refused" in reasons["one"]
    assert "host key" in reasons["two"]
    assert all(reason in str(caught.value) for reason in reasons.values())


# --- facility.toml


@pytest.mark.parametrize(
    ("lines", "key", "words"),
    [
        ('kind = "ssh"', "host", 'needed, because kind is "ssh"'),
        ('kind = "rsh"', "kind", "'local' or 'ssh'"),
        ('host = "dtn"', "host", 'only for kind = "ssh", but kind is "local"'),
        ("connect_timeout_s = 5", "connect_timeout_s", 'only for kind = "ssh"'),
        ('kind = "ssh"\nhost = "me@dtn"', "host", "match pattern"),
        ('kind = "ssh"\nhost = "dtn"\nport = 0', "port", "greater than or equal to 1"),
        ('kind = "ssh"\nhost = "dtn"\nuser = "a b"', "user", "match pattern"),
        (
            'kind = "ssh"\nhost = "dtn"\nidentity_file = "key"',
            "identity_file",
            'nor one that begins with "~/"',
        ),
        ('kind = "ssh"\nhost = "dtn"\ndirectory = "scratch"', "directory", "neither an absolute path"),
        ('kind = "ssh"\nhost = "dtn"\ns2ds = "~/s2ds"', "s2ds", "not an absolute path"),
        (
            'kind = "ssh"\nhost = "dtn"\nconnect_timeout_s = 121',
            "connect_timeout_s",
            "less than or equal to 120",
        ),
        (
            'kind = "ssh"\nhost = "dtn"\npassword = "x"',
            "password",
            "passwords and passphrases are not supported",
        ),
    ],
)
def test_each_mistake_names_file_key_and_what_is_allowed(
    lines: str, key: str, words: str, tmp_path: Path
) -> None:
    text = (
        f'[facility]\nname = "site"\n[[gateway]]\nname = "gw"\nwan_bind = "::1"\nlan_bind = "::1"\n{lines}\n'
    )
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_facility("site", file=tmp_path / "site.toml", environment={"HOME": str(tmp_path)})
    assert caught.value.key == f"gateway.0.{key}"
    assert caught.value.file == str(tmp_path / "site.toml")
    assert words in str(caught.value)
    assert shlex.quote("x") not in str(caught.value).split()
