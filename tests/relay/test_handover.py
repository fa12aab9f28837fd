"""Mode auth: not one byte is lost where TLS ends and clear text begins, in whatever pieces it comes.

The peer is written in Rust (relay/tests/handover.rs), because Python's TLS knows no raw public keys.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANDOVERS = 1000


@pytest.mark.skipif(
    not shutil.which("cargo"), reason="cargo is not there: the peer of this test is written in Rust"
)
@pytest.mark.timeout(600)
def test_a_thousand_hand_overs_in_each_direction_lose_nothing(binary: Path) -> None:
    """The last records of TLS, close_notify and 1 MiB of clear text are one write; so after fragments."""
    done = subprocess.run(
        ["cargo", "test", "--quiet", "--locked", "--test", "handover", "--", "--ignored"],
        cwd=ROOT / "relay",
        env=os.environ
        | {"S2DS": str(binary), "HANDOVERS": str(HANDOVERS), "CARGO_TARGET_DIR": str(ROOT / "relay/target")},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
