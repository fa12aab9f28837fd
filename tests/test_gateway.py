"""The local gateway: puts files, runs commands, gives up in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scistream_flows.config import GatewayConfig
from scistream_flows.errors import GatewayUnreachable, RegistryError
from scistream_flows.gateway import Gateway, LocalGateway


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    config = GatewayConfig(name="gw", wan_bind=("127.0.0.1",), lan_bind=("127.0.0.1",))
    return LocalGateway(config, runtime_dir=tmp_path / "relays")


def test_a_command_gets_its_input_and_answers_exit_stdout_and_stderr(gateway: Gateway) -> None:
    outcome = gateway.run(["sh", "-c", "cat; echo words >&2; exit 3"], stdin='{"a": 1}', timeout_s=10)
    assert outcome == (3, '{"a": 1}', "words\n")


def test_a_command_that_takes_no_input_is_no_error(gateway: Gateway) -> None:
    assert gateway.run(["true"], stdin="x" * 1_000_000, timeout_s=10).exit == 0


def test_a_command_that_hangs_is_given_up_and_ended(gateway: Gateway, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(GatewayUnreachable, match=r"did not end within 0\.2 s"):
        gateway.run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"], timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_command_that_is_not_there_is_a_typed_error(gateway: Gateway) -> None:
    with pytest.raises(GatewayUnreachable, match="No such file"):
        gateway.run(["/nowhere/s2ds"], timeout_s=1)


def test_bytes_that_are_no_text_do_no_harm(gateway: Gateway) -> None:
    assert gateway.run(["printf", "\\377"], timeout_s=10).stdout == "\N{REPLACEMENT CHARACTER}"


def test_a_command_does_not_inherit_the_secrets_of_the_service(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCISTREAM_GLOBUS_CLIENT_SECRET", "not for relays")
    assert "not for relays" not in gateway.run(["env"], timeout_s=10).stdout


INTERRUPTED = """
import sys
from pathlib import Path
from scistream_flows.config import GatewayConfig
from scistream_flows.gateway import LocalGateway
config = GatewayConfig(name="gw", wan_bind="127.0.0.1", lan_bind="127.0.0.1")
gateway = LocalGateway(config, runtime_dir=Path("/nowhere"))
print("running", flush=True)
gateway.run(["sh", "-c", "sleep 0.5; touch " + sys.argv[1]], timeout_s=30)
"""


def test_ctrl_c_lets_the_running_command_finish(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(done)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "running\n"
        time.sleep(0.2)
        script.send_signal(signal.SIGINT)
        assert script.wait(10) != 0
    assert done.exists()


def test_a_file_is_put_whole_with_its_mode(gateway: Gateway, tmp_path: Path) -> None:
    gateway.put(b"content", str(tmp_path / "file"), mode=0o700)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o700
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_put_is_a_typed_error(gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot write"):
        gateway.put(b"", str(tmp_path / "none" / "file"))
