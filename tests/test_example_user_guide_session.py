"""The session of the user guide, as it stands in examples: against services in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import serving
from standins.globus import Globus
from users import assert_no_relay_below, two_facilities

SCRIPT = Path(__file__).resolve().parents[1] / "examples/user_guide_session.sh"
GLOBUS = """
[globus]
client_id = "{client_id}"
client_secret_file = "{secret}"
scope = "{scope}"
"""

pytestmark = [
    pytest.mark.timeout(100),
    pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed"),
]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user whose commands are on the PATH, and whose facilities have their state below `tmp_path`."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SCISTREAM_", "S2UC_"))
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return clean | {
        "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}",
        "SCISTREAM_STATE_DIR": str(tmp_path),
        "SCISTREAM_CONFIG_DIR": str(tmp_path / "config"),
        "IPERF3_PORT": port,
        "IPERF3_SECONDS": "1",
    }


def assert_streamed(stdout: str) -> None:
    assert "receiver" in stdout
    assert re.search(r"PROD +STREAMING", stdout)
    assert stdout.endswith("Release completed\n")


def test_at_facilities_of_ones_own(tmp_path: Path, environment: dict[str, str]) -> None:
    with two_facilities(tmp_path) as (aps, alcf):
        addresses = [one.url.removeprefix("http://") for one in (aps, alcf)]
        done = subprocess.run(
            [SCRIPT, "--dev", *addresses], env=environment, capture_output=True, text=True, timeout=80
        )
        assert done.returncode == 0, done.stderr
        assert_streamed(done.stdout)
        assert aps.token not in done.stdout + done.stderr
        assert_no_relay_below(tmp_path)


def test_a_session_that_fails_half_way_is_released(tmp_path: Path, environment: dict[str, str]) -> None:
    with two_facilities(tmp_path) as (aps, _):
        done = subprocess.run(
            [SCRIPT, "--dev", aps.url.removeprefix("http://"), "127.0.0.1:1"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=80,
        )
        assert done.returncode == 1
        assert done.stdout.endswith("Release completed\n")
        assert_no_relay_below(tmp_path)


def test_with_a_login_at_globus(tmp_path: Path, environment: dict[str, str]) -> None:
    """Globus Auth has a stand-in; the person opens the URL and copies the code, for each facility."""
    with Globus() as globus:
        globus.login_as = globus.add_person("ada@example.org")
        more = []
        for name in ("aps", "alcf"):
            client, scope = globus.add_facility(groups=False)
            secret = tmp_path / f"{name}.secret"
            secret.write_text(str(client.secret))
            secret.chmod(0o600)
            more.append(GLOBUS.format(client_id=client.id, secret=secret, scope=scope))
        environment |= globus.environment | {"SCISTREAM_FLOWS_CLIENT_ID": globus.add_native_app().id}
        with (
            serving(tmp_path, "aps", more=more[0], environment=globus.environment) as aps,
            serving(tmp_path, "alcf", more=more[1], environment=globus.environment) as alcf,
            subprocess.Popen(
                [SCRIPT, *(one.url.removeprefix("http://") for one in (aps, alcf))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as session,
        ):
            assert session.stdin is not None
            assert session.stdout is not None
            assert session.stderr is not None
            said = ""
            for line in session.stderr:
                said += line
                if "/oauth2/authorize?" in line:
                    answer = httpx.get(line.strip())
                    assert answer.status_code == 302, said + answer.text
                    shown = answer.headers["Location"]
                    session.stdin.write(re.findall(r"[?&]code=([^&]+)", shown)[0] + "\n")
                    session.stdin.flush()
            stdout = session.stdout.read()
            assert session.wait(60) == 0, said
            assert said.count("Successfully logged in") == 2
            assert len(re.findall(r"Access Token for scope '\S+': \*+", stdout)) == 2
            assert_streamed(stdout)
            assert_no_relay_below(tmp_path)
