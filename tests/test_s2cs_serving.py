"""`s2cs` without a subcommand, with the options that SciStream 1.x has: what it serves, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from standins.globus import Globus

from scistream_flows.actions.administration import s2cs as command
from scistream_flows.actions.settings import Settings
from scistream_flows.cli.console import run

COMMAND = [
    *(sys.executable, "-W", "error", "-c"),
    "from scistream_flows.actions.administration import main; main()",
]

pytestmark = [pytest.mark.timeout(100), pytest.mark.usefixtures("state_base")]


@contextlib.contextmanager
def s2cs(*arguments: object, given: str = "", **variables: str) -> Iterator[tuple[str, list[str]]]:
    """The command, served until the end of the block: where, and what it says. It has to end in order."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    try:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(given)
        process.stdin.close()
        for line in process.stderr:
            said.append(line)
            if match := re.fullmatch(r"Server started on (\S+)\n", line):
                yield match[1], said
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.send_signal(signal.SIGTERM)
        if process.stderr is not None:
            said += process.stderr.readlines()
            process.stderr.close()
        assert process.wait(30) == 0


@pytest.mark.parametrize("spelled", ["_", "-"])
def test_it_serves_as_in_1_x(state_base: Path, spelled: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [one.replace("_", spelled) for one in ("--listener_ip", "--port_range")]
    with s2cs(words[0], "127.0.0.1", "--port", port, words[1], "5100-5200", "-t", "s2ds", "--v") as (
        at,
        said,
    ):
        assert at == f"127.0.0.1:{port}"
        assert httpx.get(f"http://{at}/health").json() == {"status": "ok"}
        assert any(f"facility dev-{port}: serving at" in line for line in said)
    assert (state_base / f"dev-{port}").is_dir()
    assert not list(Path.cwd().glob("app.log"))


@pytest.mark.parametrize("ssl", [(), ("--ssl=True",), ("--ssl",)])
def test_a_certificate_is_served_under_its_old_names(
    certificate: tuple[Path, Path], ssl: tuple[str, ...]
) -> None:
    chain, key = certificate
    with s2cs("--port", 0, "--facility", "a", "--server_crt", chain, "--server_key", key, *ssl) as (at, said):
        assert any(f"serving at https://{at}" in line for line in said)


def test_without_ssl_it_is_plain_text_on_loopback_only(certificate: tuple[Path, Path]) -> None:
    chain, key = certificate
    words = ("--port", 0, "--facility", "a", "--server_crt", chain, "--server_key", key, "--ssl=False")
    with s2cs(*words) as (at, _):
        assert httpx.get(f"http://{at}/health").status_code == 200
    done = subprocess.run(
        [*COMMAND, *map(str, words), "--listener_ip", "192.0.2.1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "loopback" in done.stderr


@pytest.mark.parametrize("by", ["stdin", "file"])
def test_a_client_at_globus_is_named_by_options_and_its_secret_by_none(tmp_path: Path, by: str) -> None:
    with Globus() as globus:
        client, scope = globus.add_facility(groups=False)
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        words: list[object] = ["--port", 0, "--facility", "a", "--client_id", client.id]
        words += ["--client_secret", "-"] if by == "stdin" else ["--client-secret-file", secret]
        given = f"{client.secret}\n" if by == "stdin" else ""
        with s2cs(*words, given=given, **globus.environment) as (at, said):
            token = globus.mint(globus.add_person("ada@example.org"), scope)
            asked = {"Authorization": f"Bearer {token}"}
            assert httpx.get(f"http://{at}/streams", headers=asked).status_code == 200
            assert httpx.get(f"http://{at}/streams").status_code == 401
    assert str(client.secret) not in "".join(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--type", "Typo"), "there is no such data server"),
        (("--type", "StunnelSubprocess"), "Use S2DS"),
        (("--type", "Nginx"), "Use S2DS or Haproxy"),
        (("--port_range", "5100"), "Invalid port_range format. Expected 'start-end'."),
        (("--port_range", "5100:5200"), "Invalid port_range format. Expected 'start-end'."),
        (("--port_range", "5200-5100"), "5200-5100"),
        (("--client_secret", "hunter2hunter2"), "can be read by everybody"),
        (("--client_secret", "-"), "a secret without a client"),
        (("--client_id", str(uuid.uuid4())), "has no secret"),
        (("--client_id", "x"), "x"),
        (("--ssl",), "--ssl needs a certificate"),
        (("--listener_ip", "0.0.0.0"), "loopback"),
        (("--verbose", "list"), "--verbose is for serving"),
    ],
    ids=lambda one: "".join(one) if isinstance(one, tuple) else "",
)
def test_what_it_does_not_serve_is_refused_in_words(
    words: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = words if words[-1] == "list" else ("--facility", "a", "--port", "0", *words)
    monkeypatch.setattr(sys, "argv", ["s2cs", *served])
    with pytest.raises(SystemExit) as left:
        run(command, name="s2cs", asked=Settings())
    shown = capsys.readouterr()
    assert (left.value.code, shown.out) == (2, "")
    assert said in shown.err
    assert "hunter2" not in shown.err


def test_it_says_its_version() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"s2cs, version: \d+\.\d+\.\d+\n", done.stdout)
