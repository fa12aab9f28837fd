"""The example examples/tomography: projections stream into a task on a real worker of Parsl's HTEX."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("parsl", reason="not installed: the extra parsl")
pytest.importorskip("skimage", reason="not installed: the extra demo")

SCRIPT = Path(__file__).resolve().parents[1] / "examples/tomography/workflow.py"

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("own_temporary")]


def test_a_scan_streams_into_a_task_which_finds_the_sample(
    state_base: Path, tmp_path: Path, relays_below: Callable[..., list[int]]
) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path / "out", "--rate", "200"],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out/result.json").read_text())
    assert said["projections"] == said["verified"] == 180
    # the noise is the same each time
    assert said["psnr_db"]["found"] > 26
    assert 15 < said["psnr_db"]["early"] < 20
    assert said["worker_pool"] != os.getpid()
    assert said["payload_bytes"] == 180 * 16 * 256 * 2
    assert said["producer_relay_bytes"] >= said["payload_bytes"]
    assert said["consumer_relay_bytes"] >= said["payload_bytes"]
    assert said["end"] == {"PROD": "released", "CONS": "released"}
    assert (tmp_path / "out/tomography.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert relays_below(state_base) == []


def test_an_interrupted_scan_leaves_nothing(
    state_base: Path, tmp_path: Path, relays_below: Callable[..., list[int]]
) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--output", tmp_path / "out", "--rate", "1"],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(relays_below(state_base)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, words = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, words.decode()
    assert relays_below(state_base, patience_s=10) == []
    assert not [one for one in started if one.is_running()]
    assert not (tmp_path / "out").exists()
