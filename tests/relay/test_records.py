"""Mode tls where the relay makes its records itself, with a peer whose records are another's (rustls').

The tests are written in Rust (relay/tests/kernel_tls.rs), because Python's TLS knows no raw public keys. On a
kernel that has TLS the same streams are its own, and test_kernel_tls.py says more.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not shutil.which("cargo"), reason="cargo is not there: the peer of this test is written in Rust"
)
@pytest.mark.timeout(600)
def test_records_of_a_peer_are_opened_and_what_is_none_ends_the_stream(binary: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CIPHER"}
    done = subprocess.run(
        ["cargo", "test", "--quiet", "--locked", "--test", "kernel_tls", "--", "--ignored"],
        cwd=ROOT / "relay",
        env=environment | {"S2DS": str(binary), "CARGO_TARGET_DIR": str(ROOT / "relay/target")},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed; 0 ignored" in done.stdout
