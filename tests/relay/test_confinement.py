"""A relay gives up what streams do not need, before it says that it is ready."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .apps import Applications, Payload
from .gateway import Gateway

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not shutil.which("cargo"), reason="cargo is not there: only from inside can it be seen what is left"
)
@pytest.mark.timeout(300)
def test_a_confined_process_can_carry_streams_and_little_else(tmp_path: Path) -> None:
    done = subprocess.run(
        ["cargo", "test", "--quiet", "--locked", "--test", "confinement", "--", "--ignored"],
        cwd=ROOT / "relay",
        env=os.environ | {"TMPDIR": str(tmp_path), "CARGO_TARGET_DIR": str(ROOT / "relay/target")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_relay_that_serves_is_confined_and_says_so(gateway: Gateway, apps: Applications, mode: str) -> None:
    server = apps.listen()
    pair = gateway.pair(mode, [server.getsockname()])
    consumer, producer = apps.established(server, pair.cons)
    for relay in pair:
        status = relay.status()
        assert status["confinement"]["seccomp"] == "applied"
        for part in ("memory", "privileges", "limits"):
            assert status["confinement"][part] == "applied"
        assert status["confinement"]["landlock"] in ("applied", "partly", "not in this kernel")
        for task in Path(f"/proc/{status['pid']}/task").iterdir():
            said = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
            assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
        limits = dict(
            re.findall(
                r"^(Max .+?) {2,}(\S+ +\S+)", Path(f"/proc/{status['pid']}/limits").read_text(), re.MULTILINE
            )
        )
        for resource, most in (("core file size", 0), ("locked memory", 0), ("file size", 2 << 20)):
            assert limits[f"Max {resource}"].split() == [str(most)] * 2
        soft, hard = limits["Max open files"].split()
        assert soft == hard
    apps.exchange(consumer, producer, Payload(1, 3_000_000), Payload(2, 3_000_000))
