"""The functions run by another version of Python, packed and unpacked by the real serializer of Globus Compute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("globus_compute_sdk", reason="not installed: the extra compute")

from globus_compute_sdk.serialize import ComputeSerializer, JSONData, PureSourceTextInspect

from scistream_flows.functions import source

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.13", "3.12", "3.11", "3.10", "3.14")

pytestmark = [
    pytest.mark.package,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

# What a worker does with a task, and nothing more: unpack, run, pack.
WORKER = """
import sys
from globus_compute_sdk.serialize import ComputeSerializer, JSONData
serializer = ComputeSerializer(strategy_data=JSONData())
function, arguments, keywords = serializer.unpack_and_deserialize(sys.stdin.read())
sys.stdout.write(serializer.serialize(function(*arguments, **keywords)))
"""


def other_python() -> str | None:
    """Another version of Python on this machine: on PATH, beside this one, or named by $PYTHON_OTHER."""
    beside = sorted(Path(sys.base_prefix).parent.glob("*/bin/python3"), reverse=True)
    named = [
        os.environ.get("PYTHON_OTHER"),
        *(shutil.which(f"python{one}") for one in VERSIONS),
        *map(str, beside),
    ]
    for python in filter(None, named):
        tells = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([python, "-c", tells], capture_output=True, text=True, timeout=30)
        version = done.stdout.strip()
        if done.returncode == 0 and version in VERSIONS and version != "{}.{}".format(*sys.version_info[:2]):
            return python
    return None


@pytest.fixture(scope="module")
def worker_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    python = other_python()
    if python is None:
        pytest.skip("there is no second version of Python on this machine; name one with PYTHON_OTHER")
    environment = tmp_path_factory.mktemp("other") / "venv"
    subprocess.run([python, "-m", "venv", environment], check=True, timeout=120)
    needs = ["globus-compute-sdk>=4.15,<5", "click", "paramiko>=4,<6", "pydantic>=2.6,<3", "rich", "tomli"]
    installed = subprocess.run(
        [
            environment / "bin/python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *needs,
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert installed.returncode == 0, installed.stderr
    return str(environment / "bin/python")


def test_a_function_runs_in_another_version_of_python(
    worker_python: str, state_base: Path, relays_below: Callable[..., list[int]]
) -> None:
    serializer = ComputeSerializer(strategy_code=PureSourceTextInspect(), strategy_data=JSONData())

    def ask(verb: str, document: dict[str, Any]) -> dict[str, Any]:
        # as the service does with source text that was registered
        function = f"{PureSourceTextInspect.identifier}scistream_{verb}:{source(verb, facility='aps')}"
        arguments = [serializer.serialize([{"protocol": 1, **document}]), serializer.serialize({})]
        done = subprocess.run(
            [worker_python, "-c", WORKER],
            input=serializer.pack_buffers([function, *arguments]),
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": str(ROOT), "S2DS": str(ROOT / "relay/target/release/s2ds")},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(JSONData.identifier)
        answer: dict[str, Any] = serializer.deserialize(done.stdout)
        return answer

    stream = {"uid": "run-1", "role": "PROD"}
    opened = ask("request", {**stream, "targets": ["127.0.0.1:9"]})
    assert opened["ok"], opened
    assert not sys.version.startswith(opened["worker"]["python"])
    assert len(relays_below(state_base)) == 1
    assert ask("status", stream)["value"]["state"] == "LISTENING"
    assert ask("status", {"uid": "another", "role": "PROD"})["error"]["code"] == "not-found"
    assert ask("release", stream)["value"]["end"]["reason"] == "released"
    assert relays_below(state_base) == []
