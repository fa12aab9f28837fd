"""`make demo` and `make test` set up everything; what they cannot set up, they name in one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("cut", "dirname", "env", "head", "make", "sed", "sh", "sort")


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH of one folder, in which every prerequisite looks present; a test takes one away."""
    folder = tmp_path / "home" / "toolchain" / "bin"
    folder.mkdir(parents=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    (folder / "python3").symlink_to(Path(sys.executable).resolve())
    executable(folder / "cc", "exit 0")
    executable(folder / "cargo", "echo 'cargo 99.0.0'")
    return folder


def sentence(machine: Path, *command: str) -> str:
    """Run a command that must stop at a missing prerequisite; answer the one sentence it says."""
    done = subprocess.run(
        command or (str(ROOT / "tools" / "setup"), "demo", "false"),
        cwd=ROOT,
        env={"PATH": str(machine), "HOME": str(machine.parent.parent)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("setup: ")
    assert lines[0].endswith((".", "…"))
    return lines[0]


def test_no_python_is_one_sentence(machine: Path) -> None:
    (machine / "python3").unlink()
    assert "python3 was not found" in sentence(machine)


def test_an_old_python_is_one_sentence_that_names_its_version(machine: Path) -> None:
    (machine / "python3").unlink()
    executable(machine / "python3", '[ "$1" = -V ] && echo "Python 3.9.2" || exit 1')
    assert "Python 3.9.2, but 3.10 or newer is needed" in sentence(machine)


def test_a_python_without_venv_is_one_sentence(machine: Path) -> None:
    (machine / "python3").unlink()
    executable(machine / "python3", 'case "$2" in *venv*) exit 1;; esac')
    assert "python3-venv" in sentence(machine)


def test_no_c_compiler_is_one_sentence(machine: Path) -> None:
    (machine / "cc").unlink()
    assert "no C compiler" in sentence(machine)


def test_no_cargo_is_one_sentence(machine: Path) -> None:
    (machine / "cargo").unlink()
    assert "cargo was not found" in sentence(machine)


@pytest.mark.parametrize("target", ["demo", "test", "bench", "check", "wheel"])
def test_make_without_cargo_says_the_same_sentence(machine: Path, target: str) -> None:
    (machine / "cargo").unlink()
    assert "cargo was not found" in sentence(machine, "make", "--no-print-directory", target)


def test_a_cargo_without_a_toolchain_is_one_sentence(machine: Path) -> None:
    executable(machine / "cargo", "echo 'rustup: a long story' >&2; exit 1")
    assert "has no toolchain" in sentence(machine)


def test_an_old_cargo_is_one_sentence_that_names_both_versions(machine: Path) -> None:
    executable(machine / "cargo", "echo 'cargo 1.63.0'")
    said = sentence(machine)
    assert "cargo is 1.63.0" in said
    assert "needs Rust 1." in said


def test_a_rustup_cargo_finds_its_toolchain_under_another_home(machine: Path) -> None:
    (machine.parent.parent / ".rustup").mkdir()
    executable(machine / "cargo", '[ -n "$RUSTUP_HOME" ] && echo "cargo 1.2.3"')
    assert "cargo is 1.2.3" in sentence(machine)


def test_the_scripts_are_executable() -> None:
    for script in ("tools/setup", "tools/check", "tools/fuzz", "tools/rustc-static", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), script
