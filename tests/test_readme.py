"""What README.md tells a newcomer to type works as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
SCRIPTS = [text for kind, text in BLOCKS if kind == "python"]


def test_every_block_says_what_it_is() -> None:
    assert {kind for kind, _ in BLOCKS} <= {"sh", "python", "text"}


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_a_make_command_is_a_target(command: str) -> None:
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_the_script_is_ten_lines() -> None:
    (script,) = SCRIPTS
    assert len([line for line in script.splitlines() if line.strip()]) == 10


@pytest.mark.timeout(180)
def test_the_other_commands_typed_by_hand_run(tmp_path: Path) -> None:
    """One after the other, in one folder: the script is in a file of the name they give it."""
    others = [shlex.split(command) for command in COMMANDS if not command.startswith("make ")]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    said = {}
    for program, *arguments in others:
        if arguments[0].endswith(".py") and "/" not in arguments[0]:
            (tmp_path / arguments[0]).write_text(SCRIPTS[0])
        done = subprocess.run(
            [Path(sys.executable).with_name(Path(program).name), *arguments],
            cwd=tmp_path,
            env=os.environ | {"SCISTREAM_STATE_DIR": str(tmp_path / "state")},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert program.startswith(".venv/bin/")
        assert done.returncode == 0, done.stderr
        said[arguments[0]] = done.stdout
    assert "bytes came through 127.0.0.1:" in said["stream.py"]
    assert said["init"] == "facility/facility.toml\n"
    assert "gateway gw1" in said["--config"]
    assert len(said) == len(others) == 4


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_a_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
