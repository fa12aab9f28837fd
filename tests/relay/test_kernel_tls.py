"""Mode tls by the kernel, on stock Debian kernels in a virtual machine.

One of them can give a running connection new keys (Linux 6.14), one cannot. The tests inside are those of
relay/tests/kernel_tls.rs.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import machine

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "relay/target"
pytestmark = pytest.mark.kernel
# Each key may make 2^24 records of AES-GCM, so a kernel that takes no new ones is not given it.
NEW_KEYS = (6, 14)


@pytest.fixture(scope="module")
def driver() -> Path:
    """The program with the tests inside, linked statically."""
    if not shutil.which("cargo"):
        pytest.skip("cargo is not there: the tests inside are written in Rust")
    built = subprocess.run(
        ["cargo", "test", "--locked", "--no-run", "--test", "kernel_tls"],
        cwd=ROOT / "relay",
        env=os.environ | {"CARGO_TARGET_DIR": str(TARGET)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stderr
    named = re.search(r"\((\S*kernel_tls-\w+)\)", built.stderr)
    assert named, built.stderr
    program = TARGET / "kernel_tls"
    # Where it is named from depends on the version of cargo.
    shutil.copy(
        next(place for place in (ROOT / named[1], ROOT / "relay" / named[1]) if place.exists()), program
    )
    return program


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suite", [None, "trixie-backports"])
def test_a_kernel_with_tls_carries_whole_streams_their_ends_and_their_aborts(
    driver: Path, binary: Path, suite: str | None
) -> None:
    try:
        kernel = machine.kernel(TARGET / "kernels", suite=suite)
    except machine.Unavailable as missing:
        pytest.skip(str(missing))
    cipher = "AES-256-GCM" if kernel.version >= NEW_KEYS else "ChaCha20-Poly1305"
    code, said = machine.run(
        kernel,
        "/kernel_tls --ignored --test-threads=1",
        files=[driver, binary.resolve()],
        environment={"S2DS": "/s2ds", "CIPHER": cipher},
        timeout_s=600,
    )
    print(said)
    assert code == 0, said
    assert " 0 failed; 0 ignored" in said
