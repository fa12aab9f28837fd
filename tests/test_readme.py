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


def test_the_script_typed_by_hand_runs(tmp_path: Path) -> None:
    """The commands that are not make targets run the script, from a file of the name they give it."""
    others = [shlex.split(command) for command in COMMANDS if not command.startswith("make ")]
    assert others
    for python, name in others:
        assert python == ".venv/bin/python"
        (tmp_path / name).write_text(SCRIPTS[0])
        done = subprocess.run(
            [sys.executable, name],
            cwd=tmp_path,
            env=os.environ | {"SCISTREAM_STATE_DIR": str(tmp_path / "state")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "bytes came through 127.0.0.1:" in done.stdout


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_a_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
