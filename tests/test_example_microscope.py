"""The example examples/microscope: two endpoints of Globus Compute in one stream, under a stand-in for its service."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("globus_compute_sdk", reason="not installed: the extra compute")
pytest.importorskip("globus_compute_endpoint", reason="not installed: globus-compute-endpoint")

from standins.compute_cloud import ComputeCloud, Endpoint

from scistream_flows.actions.endpoint import set_up
from scistream_flows.config import load_facility

SCRIPT = Path(__file__).resolve().parents[1] / "examples/microscope/over_compute.py"

# The SDK leaves a pair of sockets, by which pika wakes its loop, to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.timeout(180),
]


def test_a_microscope_streams_between_two_endpoints(
    state_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    relays_below: Callable[..., list[int]],
) -> None:
    with ComputeCloud() as cloud:
        for name, value in cloud.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path / "client"))
        endpoints = []
        for facility in ("aps", "alcf"):
            endpoint = Endpoint(tmp_path / "endpoints" / facility, cloud)
            set_up(endpoint.directory, facility=load_facility(facility), email="admin@example.org")
            endpoints.append(endpoint)
        with endpoints[0], endpoints[1]:
            addresses = [f"compute:{one.id}" for one in endpoints]
            done = subprocess.run(
                [sys.executable, SCRIPT, *addresses, "--seconds", "1"],
                env=dict(os.environ),
                capture_output=True,
                text=True,
                timeout=150,
            )
            assert done.returncode == 0, done.stderr
            said = json.loads(done.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert said["verified"] == said["frames"] > 0
    assert said["producer_relay_bytes"] >= said["payload_bytes"] >= 1e8
    assert said["consumer_relay_bytes"] >= said["payload_bytes"]
    assert said["end"] == {"PROD": "finished", "CONS": "finished"}
    assert relays_below(state_base) == []
