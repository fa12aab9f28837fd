"""What is tested inside the relay, because no door leads there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not shutil.which("cargo"), reason="cargo is not there: the tests inside are written in Rust"
)
@pytest.mark.timeout(300)
def test_the_tests_inside_the_relay_pass() -> None:
    done = subprocess.run(
        ["cargo", "test", "--quiet", "--locked", "--workspace", "--lib"],
        cwd=ROOT / "relay",
        env=os.environ | {"CARGO_TARGET_DIR": str(ROOT / "relay/target")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
