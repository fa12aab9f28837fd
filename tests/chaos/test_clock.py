"""The clock of a machine jumps: leases do not."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import pytest
from relay.apps import Applications, Payload
from relay.gateway import ROOT, Gateway, Relay, eventually, join

from scistream_flows.models import Release, Request, read

from .report import PAST, Record
from .scene import LEASE_SLACK_S, Scene

HOUR_S: Final = 3600


@dataclass
class Clock:
    """The time of day of the programs that are started with this environment; nobody else's is touched."""

    folder: Path

    def __post_init__(self) -> None:
        self.file = self.folder / "moved"
        self.move(0)
        self.library = self.folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(self.library), str(source), "-ldl"], check=True
        )

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self.library), "MOVED_CLOCK": str(self.file)}

    def move(self, seconds: int) -> None:
        """From now on it goes wrong by so much."""
        with self.file.open("r+b" if self.file.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))


@pytest.mark.chaos
@pytest.mark.parametrize("jump_s", [30 * 24 * HOUR_S, HOUR_S, -HOUR_S, -30 * 24 * HOUR_S])
def test_a_service_whose_clock_jumps_loses_no_stream_and_ends_none(
    scene: Scene, tmp_path: Path, record: Record, jump_s: int
) -> None:
    """The clock of a running service jumps by an hour or a month, either way: streams and leases are what they were."""
    clock = Clock(tmp_path)
    scene.kill_service("PROD")
    scene.start_service("PROD", environment=clock.environment)
    try:
        server = scene.apps.listen()
        stream = scene.open(server, uid="s", lease_s=30)
        ends = scene.converse(server, stream.listeners[0])
        record.struck()
        clock.move(jump_s)
        eventually(lambda: abs(time.time() + jump_s - said_at(scene)) < HOUR_S / 2)
        status = scene.status("PROD")
        record.detected()
        assert status.state == "STREAMING"
        assert 0 < (status.lease_remaining_s or 0) <= 30
        stream.renew()
        scene.apps.exchange(*ends, Payload(1, 3_000_000), Payload(2, 3_000_000))
        end = stream.release()
        assert end.reasons == {"PROD": "released", "CONS": "released"}
        again = scene.open(server, uid="s", lease_s=30)
        assert again.release().in_order
        scene.check_bystander()
    finally:
        scene.kill_service("PROD")
        scene.start_service("PROD")


def said_at(scene: Scene) -> float:
    """What time it is to a service, by its audit log; asking makes a line."""
    scene.client("PROD").request(read(Request, {"protocol": 1, "uid": "clock", "role": "PROD"}))
    scene.client("PROD").release(Release(uid="clock", role="PROD"))
    last = (scene.base / "site-a" / "audit.jsonl").read_text().splitlines()[-1]
    at = re.search(r'"at": "([^"]+)"', last)
    assert at
    return datetime.fromisoformat(at[1].replace("Z", "+00:00")).timestamp()


def test_only_what_a_relay_writes_down_has_the_time_of_day() -> None:
    """Leases, deadlines and rates of a relay are measured by the monotonic clock, which nobody can set."""
    users = {
        path.name
        for path in (ROOT / "relay" / "src").glob("*.rs")
        if "SystemTime" in path.read_text() or "UNIX_EPOCH" in path.read_text()
    }
    assert users == {"events.rs", "inspect.rs"}  # the field `at`, and the clock that `doctor` compares


@pytest.mark.chaos
@pytest.mark.parametrize("offset_s", [400 * 24 * HOUR_S, 1])
def test_a_relay_whose_machine_has_run_for_long_keeps_its_lease(
    gateway: Gateway, apps: Applications, record: Record, chance: random.Random, offset_s: int
) -> None:
    """A lease is a difference: where the monotonic clock stands does not matter, nor does the time of day."""
    tried = subprocess.run(["unshare", "--time", "--monotonic", str(offset_s), "true"], capture_output=True)
    if tried.returncode != 0:
        pytest.skip("a clock of its own needs the right to make a time namespace")
    server = apps.listen()
    lease_s = 2
    config = gateway.config("PROD", "tls", targets=[join(server.getsockname())], lease_s=lease_s)
    command = ["unshare", "--fork", "--time", "--monotonic", str(offset_s), "--boottime", str(offset_s)]
    done = subprocess.run(
        [*command, str(gateway.binary), "start", "--runtime-dir", str(gateway.directory)],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    relay = Relay(gateway, config, json.loads(done.stdout))
    gateway.relays.append(relay)
    time.sleep(chance.uniform(0.2, 1.2))
    relay.renew(lease_s)
    renewed = time.monotonic()
    end = relay.wait_end()
    lasted_s = time.monotonic() - renewed
    assert end["reason"] == "lease_expired"
    assert lease_s - 0.1 <= lasted_s <= lease_s + LEASE_SLACK_S
    record.notes[PAST] = round(max(0.0, lasted_s - lease_s), 3)
