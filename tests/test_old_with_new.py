"""Old with new: a facility that runs the last release, and one that runs this, carry a stream, each in both roles.

The last release is the newest tag, built from the history of this checkout; as long as there is no tag, the commit
below stands for it. Where the two cannot work together, both say so with the typed error, and no stream is opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from scistream_flows import ProtocolMismatch, open_stream
from scistream_flows.relay import find_s2ds

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_A_TAG = "3c59d07"

pytestmark = [pytest.mark.package, pytest.mark.timeout(600)]


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the last release is what Python imports and what relays run."""
    revision = git("describe", "--tags", "--abbrev=0", "HEAD~1").stdout.strip() or WITHOUT_A_TAG
    if git("cat-file", "-e", f"{revision}^{{commit}}").returncode:
        pytest.skip(f"nothing was tried against {revision}: this checkout has no history that reaches it")
    folder = tmp_path_factory.mktemp("released")
    assert git("archive", "--output", str(folder / "source.tar"), revision).returncode == 0
    with tarfile.open(folder / "source.tar") as archive:
        archive.extractall(folder / "source", filter="data")
    # what the wheel maps: the folder actions is installed as scistream_flows.actions
    (folder / "source/scistream_flows/actions").symlink_to("../actions")
    if (ROOT / "relay/target/release").is_dir():  # spares compiling the relay's dependencies again
        shutil.copytree(ROOT / "relay/target/release", folder / "target/release", symlinks=True)
    done = subprocess.run(
        ["cargo", "build", "--quiet", "--release", "--locked", "--manifest-path", "relay/Cargo.toml"],
        cwd=folder / "source",
        env={**os.environ, "CARGO_TARGET_DIR": str(folder / "target")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(folder / "source"), "S2DS": str(folder / "target/release/s2ds")}


@pytest.fixture(params=["producer", "consumer"])
def two_facilities(
    request: pytest.FixtureRequest, released: dict[str, str], state_base: Path
) -> Iterator[tuple[str, str]]:
    """The addresses of the facilities of producer and consumer, of which one runs the last release."""
    old = request.param
    environment = {role: released if role == old else {} for role in ("producer", "consumer")}
    with (
        serving(state_base, "aps", development=True, port=0, environment=environment["producer"]) as aps,
        serving(state_base, "alcf", development=True, port=0, environment=environment["consumer"]) as alcf,
    ):
        facilities = {"producer": aps, "consumer": alcf}
        (pid, *_) = facilities[old].pids
        assert released["PYTHONPATH"] in Path(f"/proc/{pid}/environ").read_text()
        yield aps.url.removeprefix("http://"), alcf.url.removeprefix("http://")


def test_the_last_release_is_another_program(released: dict[str, str], tmp_path: Path) -> None:
    assert Path(released["S2DS"]).read_bytes() != Path(find_s2ds()).read_bytes()
    origin = "import scistream_flows as a, scistream_flows.actions as b; print(a.__file__, b.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", origin],
        env=os.environ | released,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(file.startswith(released["PYTHONPATH"]) for file in done.stdout.split())


@pytest.mark.parametrize("mode", ["tls", "auth", "none"])
def test_a_stream_between_the_last_release_and_this(
    two_facilities: tuple[str, str],
    application: Any,
    talk: Callable[[str, bytes], str],
    relays_below: Callable[..., list[int]],
    state_base: Path,
    mode: Any,
) -> None:
    payload = bytes(reversed(application.payload))
    try:
        with open_stream(*two_facilities, targets=[application.address], mode=mode, linger_s=1) as stream:
            assert talk(stream.listeners[0], payload) == hashlib.sha256(application.payload).hexdigest()
            assert stream.wait(timeout_s=30).check().reasons == {"PROD": "finished", "CONS": "finished"}
        assert application.received == [hashlib.sha256(payload).hexdigest()]
    except ProtocolMismatch:  # both numbers are in its words
        assert application.accepted == 0
    assert relays_below(state_base, patience_s=5) == []
