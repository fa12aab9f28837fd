"""The example examples/iperf3: real iperf3, which knows nothing of relays."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples/iperf3/throughput.py"

pytestmark = pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed")


@pytest.mark.parametrize(
    "options", [["--mode", "tls"], ["--mode", "auth", "--streams", "4", "--reverse"]], ids=" ".join
)
def test_every_byte_of_iperf3_has_passed_both_relays(
    state_base: Path, relays_below: Callable[..., list[int]], options: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seconds", "1", "--json", *options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["payload_bytes"] > 1_000_000
    assert said["producer_relay_bytes"] >= said["payload_bytes"]
    assert said["consumer_relay_bytes"] >= said["payload_bytes"]
    assert said["end"] == {"PROD": "released", "CONS": "released"}
    assert relays_below(state_base) == []


def test_a_server_that_is_not_there_is_said_in_one_sentence(state_base: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--target", "192.0.2.1:5201"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "does not allow 192.0.2.1:5201 in targets" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (state_base / "aps" / "relays").exists() or not any((state_base / "aps" / "relays").iterdir())
