"""What strangers and users say to a relay, chosen by a fuzzer (tools/fuzz): it finds nothing, and a planted fault."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "relay/fuzz/corpus"
TARGETS = ("preamble", "handshake", "records", "control", "configuration")

pytestmark = [
    pytest.mark.skipif(not shutil.which("cargo"), reason="cargo is not there: the fuzz targets are in Rust"),
    pytest.mark.timeout(900),  # the first of them builds
]


def fuzz(
    folder: Path, *targets: str, seconds: int = 3, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["tools/fuzz", str(seconds), *targets],
        cwd=ROOT,
        env=os.environ
        | {"CARGO_TARGET_DIR": str(ROOT / "relay/target"), "FUZZ_DIR": str(folder)}
        | environment,
        capture_output=True,
        text=True,
        timeout=880,
    )


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_short_run_finds_nothing_in_any_target_and_leaves_the_corpus_alone(tmp_path: Path) -> None:
    before = files(CORPUS)
    done = fuzz(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [int(count) for count in re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr)]
    assert len(runs) == len(TARGETS)
    assert min(runs) > min(len(files(CORPUS / target)) for target in TARGETS)
    for target in TARGETS:
        assert not files(tmp_path / target / "found")
    assert files(CORPUS) == before


def test_a_planted_fault_is_found_in_a_short_run(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "preamble", seconds=10, PLANTED="1")
    assert done.returncode != 0
    assert "planted" in done.stderr
    (found,) = files(tmp_path / "preamble/found")
    assert found.read_bytes()[25] == 0x5E


def test_the_corpus_is_small_and_has_something_for_each_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(files(CORPUS / target) for target in TARGETS)
    assert sum(path.stat().st_size for path in files(CORPUS)) < 300 << 10
