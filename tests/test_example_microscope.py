"""The example examples/microscope: an endpoint of Globus Compute and another facility in one stream.

The endpoints are real, their service is a stand-in.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("globus_compute_sdk", reason="not installed: the extra compute")
pytest.importorskip("globus_compute_endpoint", reason="not installed: globus-compute-endpoint")

from serving import Caller, serving
from standins.compute_cloud import ComputeCloud, Endpoint

from scistream_flows.actions.endpoint import set_up
from scistream_flows.config import load_facility

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/microscope"

# The SDK leaves a pair of sockets, by which pika wakes its loop, to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.timeout(180),
]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeCloud]:
    """The stand-in for Globus Compute, in the environment of the SDK."""
    with ComputeCloud() as cloud:
        for name, value in cloud.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GLOBUS_COMPUTE_USER_DIR", str(tmp_path / "client"))
        yield cloud
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.parametrize("consumer", ["another endpoint", "an action provider"])
def test_a_microscope_streams_from_an_endpoint_to(
    consumer: str,
    cloud: ComputeCloud,
    state_base: Path,
    tmp_path: Path,
    relays_below: Callable[..., list[int]],
) -> None:
    with contextlib.ExitStack() as facilities:

        def endpoint(facility: str) -> str:
            made = Endpoint(tmp_path / "endpoints" / facility, cloud)
            set_up(made.directory, facility=load_facility(facility), email="admin@example.org")
            facilities.enter_context(made)
            return f"compute:{made.id}"

        addresses = [endpoint("aps")]
        if consumer == "another endpoint":
            script = EXAMPLE / "over_compute.py"
            addresses.append(endpoint("alcf"))
        else:
            script = EXAMPLE / "with_action_provider.py"
            served = facilities.enter_context(serving(state_base, "alcf", development=True))
            addresses.append(served.url)
        done = subprocess.run(
            [sys.executable, script, *addresses, "--seconds", "1"],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        if consumer == "an action provider":
            # the environment's proxy is the way to the stand-in
            http = facilities.enter_context(httpx.Client(timeout=30, trust_env=False))
            caller = Caller(served, served.token, http)
            for action in ("start", "status", "monitor", "release"):
                ended = caller.ask("GET", f"/actions/{action}/actions?status=succeeded,failed")
                assert {one["status"] for one in ended.json()} == {"SUCCEEDED"}, action
    assert said["verified"] == said["frames"] > 0
    assert said["producer_relay_bytes"] >= said["payload_bytes"] >= 1e8
    assert said["consumer_relay_bytes"] >= said["payload_bytes"]
    assert said["end"] == {"PROD": "finished", "CONS": "finished"}
    assert relays_below(state_base) == []
