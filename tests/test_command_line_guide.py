"""docs/command-line.md: every block of commands in it is run as it stands, against real services and applications."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import serving
from standins.globus import Globus
from users import assert_no_relay_below

PAGE = Path(__file__).resolve().parents[1] / "docs/command-line.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
LOGIN = [text for text in SHELL if "s2uc login" in text]
PORTS = ("5000", "6000", "5201", "7000")
READY = (
    "until (echo >/dev/tcp/127.0.0.1/5000) 2>&- && (echo >/dev/tcp/127.0.0.1/6000) 2>&-; do sleep 0.2; done\n"
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SCISTREAM_", "S2UC_"))
    }
    return clean | {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "SCISTREAM_STATE_DIR": str(tmp_path / "state"),
        "SCISTREAM_CONFIG_DIR": str(tmp_path / "config"),
    }


def test_every_block_says_what_it_is() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "text"}
    assert len(LOGIN) == 1


@pytest.mark.timeout(240)
@pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed")
def test_the_blocks_run_one_after_the_other(tmp_path: Path, environment: dict[str, str]) -> None:
    """Each line has to succeed; ports are free ones instead of those of the page."""
    blocks = [text for text in SHELL if text not in LOGIN]
    blocks.insert(1, READY)
    script = (
        "set -euo pipefail\ntrap 'for job in $(jobs -p); do kill $job; done 2>&-; wait' EXIT\n"
        + "".join(blocks)
    )
    with contextlib.ExitStack() as held:
        for written in PORTS:
            port = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            script = re.sub(rf"(?<![0-9]){written}(?![0-9])", str(port), script)
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            stdout, stderr = shell.communicate(timeout=220)
        finally:
            with contextlib.suppress(ProcessLookupError):  # as it should be
                os.killpg(shell.pid, signal.SIGKILL)
            assert_no_relay_below(tmp_path)
    assert shell.returncode == 0, stdout + stderr
    assert stdout.count("Release completed") == 5
    assert stdout.count("receiver") == 1
    assert "READY: a probe has gone through" in stderr
    assert (tmp_path / "stream.png").read_bytes()[1:4] == b"PNG"
    assert {one["role"] for one in json.loads((tmp_path / "seen.json").read_text())["streams"]} == {
        "PROD",
        "CONS",
    }
    assert len(re.findall(r"^message \d+$", stdout, re.MULTILINE)) == 3


@pytest.mark.timeout(100)
def test_the_login_runs_as_it_is_written(
    tmp_path: Path, environment: dict[str, str], certificate: tuple[Path, Path]
) -> None:
    """Globus Auth has a stand-in; the facility is a real one behind TLS, under another address."""
    chain, key = map(str, certificate)
    with Globus() as globus:
        client, scope = globus.add_facility(groups=False)
        secret = tmp_path / "secret"
        secret.write_text(str(client.secret))
        secret.chmod(0o600)
        globus.login_as = globus.add_person("ada@example.org")
        more = f'[globus]\nclient_id = "{client.id}"\nclient_secret_file = "{secret}"\nscope = "{scope}"\n'
        environment |= {
            **globus.environment,
            "CLIENT_ID": globus.add_native_app().id,
            "REQUESTS_CA_BUNDLE": chain,
        }
        (tmp_path / "state").mkdir()
        with serving(
            tmp_path / "state", "aps", more=more, certificate=chain, key=key, environment=globus.environment
        ) as aps:
            script = "set -e\n" + LOGIN[0].replace("https://scistream.aps.example.org", aps.url)
            with subprocess.Popen(
                ["bash", "-c", script],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as session:
                assert session.stdin is not None
                assert session.stdout is not None
                assert session.stderr is not None
                said = ""
                for line in session.stderr:
                    said += line
                    if "/oauth2/authorize?" in line:
                        shown = httpx.get(line.strip()).headers["Location"]
                        session.stdin.write(re.findall(r"[?&]code=([^&]+)", shown)[0] + "\n")
                        session.stdin.flush()
                stdout = session.stdout.read()
                assert session.wait(60) == 0, said
    assert re.fullmatch(rf"Access Token for scope '{scope}': \*+\S{{4}}\nSuccessfully logged out!\n", stdout)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()))
def test_a_link_leads_to_a_file(link: str) -> None:
    assert (PAGE.parent / link).exists()
