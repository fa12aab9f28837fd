"""The example examples/epics: images over real PV Access, on a network with no way past the relays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pvaccess", reason="not installed: the extra test")

from relay.gateway import split

from .services import Services
from .topology import Host, reaches

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/epics"
PORT = 5075  # that of PV Access: every host of the network has ports of its own
FRAMES = 40

pytestmark = pytest.mark.net

Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def program(services: Services, tmp_path: Path) -> Iterator[Program]:  # noqa: ARG001 - programs end before the network
    """A function that starts a program of the example, on a host or with the services; none outlives the test."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EPICS_")}
    with contextlib.ExitStack() as stack:

        def start(
            script: str, *options: str, on: Host | None = None, environment: Mapping[str, str] | None = None
        ) -> subprocess.Popen[str]:
            command = [sys.executable, str(EXAMPLE / script), *options]
            said = stack.enter_context((tmp_path / f"{script}.stderr").open("w+"))
            process = subprocess.Popen(
                command if on is None else on.command(*command),
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=clean | dict(environment or {}),
            )
            stack.callback(end, process)
            return process

        yield start


def end(process: subprocess.Popen[str]) -> None:
    """By a signal, if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
    process.communicate()


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next thing that it says."""
    assert process.stdout
    said: dict[str, Any] = json.loads(process.stdout.readline() or '{"ended": true}')
    assert "ended" not in said
    return said


def test_images_over_pv_access_reach_a_viewer_that_has_no_route_to_the_detector(
    services: Services, program: Program
) -> None:
    network = services.network
    services.configure("b", gateway_b={"port_range": str(PORT)})
    detector = program("detector.py", on=network.producer)
    line(detector)
    here = network.producer.address("IPv4")
    assert reaches(network.gateway_a, here, PORT) is None
    assert reaches(network.consumer, here, PORT) == errno.ENETUNREACH

    where = ["--target", f"{here}:{PORT}", "--consumers", network.consumer.address("IPv4")]
    stream = program("stream.py", "local:site-a", "local:site-b", *where)
    listener = line(stream)["listener"]
    assert split(listener) == (network.gateway_b.address("IPv4", "lan-b"), PORT)
    viewer = program(
        "viewer.py",
        *("--frames", str(FRAMES)),
        on=network.consumer,
        environment={"EPICS_PVA_AUTO_ADDR_LIST": "NO", "EPICS_PVA_NAME_SERVERS": listener},
    )
    seen = line(viewer)
    assert viewer.wait(20) == 0
    assert seen["verified"] == seen["frames"] == FRAMES
    assert seen["in_order"]
    assert detector.poll() is None

    stream.send_signal(signal.SIGTERM)
    carried = line(stream)
    assert stream.wait(20) == 0
    assert seen["bytes"] > 10_000_000
    assert carried["producer_relay_bytes"] >= seen["bytes"]
    assert carried["consumer_relay_bytes"] >= seen["bytes"]
    assert carried["end"] == {"PROD": "released", "CONS": "released"}
    services.wait_bare()


def test_a_listener_to_whose_port_the_server_would_not_send_its_clients_is_refused(
    services: Services, program: Program, tmp_path: Path
) -> None:
    network = services.network
    line(program("detector.py", on=network.producer))
    where = ["--target", f"{network.producer.address('IPv4')}:{PORT}"]
    stream = program("stream.py", "local:site-a", "local:site-b", *where)
    assert stream.wait(60) == 1
    said = (tmp_path / "stream.py.stderr").read_text()
    assert f"but the server will send its clients to port {PORT}" in said
    assert f'port_range = "{PORT}"' in said
    assert "Traceback" not in said
    services.wait_bare()
