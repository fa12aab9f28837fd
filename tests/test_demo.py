"""The demo keeps its promises: verified frames, honest figures, and nothing left behind, however it ends."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from scistream_flows.config import load_facility
from scistream_flows.models import Role
from scistream_flows.s2cs import S2CS

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples/demo"
SHORT = ("--seconds", "1", "--bytes", "2e8")

pytestmark = [pytest.mark.demo, pytest.mark.timeout(180)]


class Run:
    """A demo that was started, with a folder for temporary files that is its own."""

    def __init__(self, temporary: Path, output: Path, *options: str) -> None:
        temporary.mkdir()
        self.temporary = temporary
        self.process = subprocess.Popen(
            [sys.executable, DEMO / "run.py", "--output", output, *options],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def started(self) -> list[psutil.Process]:
        """Every process it has started, detached relays included: they work in its temporary folder."""
        relays = [
            process
            for process in psutil.process_iter(["cwd"])
            if Path(process.info["cwd"] or "/").is_relative_to(self.temporary)
        ]
        return relays + psutil.Process(self.process.pid).children(recursive=True)

    def wait_until_frames_flow(self) -> list[psutil.Process]:
        """Wait until both applications and both relays run; answer all processes."""
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.output()
            started = self.started()
            names = [word for process in started if process.is_running() for word in commands(process)]
            if "consumer.py" in names and names.count("s2ds") >= 2:
                time.sleep(0.7)  # into the stream
                return self.started()
            time.sleep(0.05)
        raise AssertionError("no frames within 60 s")

    def output(self) -> str:
        """Wait for its end; answer all it printed."""
        said, _ = self.process.communicate(timeout=120)
        return said

    def left(self) -> list[str]:
        """Files it has left."""
        return [str(path) for path in self.temporary.iterdir()]


def commands(process: psutil.Process) -> list[str]:
    """The file names in a process's command line."""
    try:
        return [Path(word).name for word in process.cmdline()]
    except psutil.Error:
        return []


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    """Demos that a failing test must not leave running."""
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate(timeout=60)


@pytest.mark.parametrize("setup", ["flow", "python"])
def test_the_demo_streams_verifies_and_reports(tmp_path: Path, runs: list[Run], setup: str) -> None:
    run = Run(tmp_path / "tmp", tmp_path / "out", *SHORT, *(["--setup", setup] if setup != "flow" else []))
    runs.append(run)
    said = run.output()
    assert run.process.returncode == 0, said

    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result.keys() == {"setup", "relays_left", "streams"}
    assert result["setup"] == setup
    assert result["relays_left"] == 0
    assert [stream["mode"] for stream in result["streams"]] == ["tls", "auth"]
    tls, auth = (stream["path"] for stream in result["streams"])
    assert tls in {"tls-copy", "ktls-splice"}  # as the kernel here has TLS or not
    assert auth == "splice"
    for stream in result["streams"]:
        assert stream.keys() == {
            "mode", "path", "frames", "bytes", "verified", "gbit_per_s", "relay_cpu_s_per_gb", "setup_s",
            "end_reason", "relay_bytes",
        }  # fmt: skip
        assert stream["verified"] is True
        assert stream["bytes"] == stream["frames"] * 1024 * 1024 * 3 >= 2e8
        assert stream["end_reason"] == {"PROD": "finished", "CONS": "finished"}
        assert min(stream["relay_bytes"].values()) >= stream["bytes"]
        assert stream["gbit_per_s"] * stream["relay_cpu_s_per_gb"] * stream["setup_s"] > 0
    picture = (tmp_path / "out/stream.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 100_000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "stream.png"}
    assert "finished" in said
    assert ("flow: ReleaseProducerRelay: released" in said) is (setup == "flow")
    assert run.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_interrupted_in_mid_stream_leaves_nothing(
    tmp_path: Path, runs: list[Run], number: signal.Signals
) -> None:
    run = Run(tmp_path / "tmp", tmp_path / "out", "--seconds", "60")
    runs.append(run)
    started = run.wait_until_frames_flow()
    run.process.send_signal(number)
    said = run.output()
    assert run.process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []
    assert run.left() == []
    assert not (tmp_path / "out").exists()


def test_a_flow_cancelled_after_its_first_step_leaves_no_relay(
    state_base: Path,  # noqa: ARG001 - where the state goes
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    from by_flow import FlowStream, flow_stream
    from service import service

    see = FlowStream.see

    def see_and_cancel(self: FlowStream, event: Mapping[str, Any]) -> None:
        see(self, event)
        if event["code"] == "ActionCompleted":
            self.cancelled.set()

    monkeypatch.setattr(FlowStream, "see", see_and_cancel)
    with service("aps") as prod, service("alcf") as cons:
        services: dict[Role, tuple[str, str]] = {"PROD": ("aps", prod), "CONS": ("alcf", cons)}
        with flow_stream(services, targets=["127.0.0.1:9"], mode="tls", linger_s=1) as stream:
            assert stream.outcome.result(60).status == "ENDED"
            assert list(stream.steps) == ["StartProducerRelay"]
        with S2CS(load_facility("aps")) as facility:
            assert facility.survey().streams == []


@pytest.mark.parametrize("options", [["--seconds", "0"], ["--bytes", "nan"], ["--bytes", "-1"]])
def test_a_demo_of_nothing_is_wrong_usage(tmp_path: Path, runs: list[Run], options: list[str]) -> None:
    run = Run(tmp_path / "tmp", tmp_path / "out", *options)
    runs.append(run)
    assert "invalid positive value" in run.output()
    assert run.process.returncode == 2


def test_a_result_that_cannot_be_written_is_said(tmp_path: Path, runs: list[Run]) -> None:
    (tmp_path / "out").write_text("a file, no folder")
    run = Run(tmp_path / "tmp", tmp_path / "out", "--seconds", "0.1", "--bytes", "1e6", "--setup", "python")
    runs.append(run)
    said = run.output()
    assert "cannot be written" in said
    assert "Traceback" not in said
    assert run.process.returncode == 1


def test_two_demos_at_once_disturb_neither(tmp_path: Path, runs: list[Run]) -> None:
    runs.extend(Run(tmp_path / name, tmp_path / "out", *SHORT) for name in ("one", "two"))
    for run in runs:
        said = run.output()
        assert run.process.returncode == 0, said
        assert run.left() == []
    assert json.loads((tmp_path / "out/result.json").read_text())["relays_left"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"result.json", "stream.png"}


def test_the_applications_know_nothing_of_scistream() -> None:
    for script in ("producer.py", "consumer.py", "slide.py", "nuclei.py"):
        for node in ast.walk(ast.parse((DEMO / script).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("scistream")], script


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing frame", "a frame twice"])
def test_the_consumer_notices(damage: str) -> None:
    """The verdict `verified` is worth something: a producer of our own sends what the image on disk is not."""
    ask = "import sys; sys.path.insert(0, sys.argv[1]); import slide; sys.stdout.buffer.write(slide.fields()[0].data)"
    first = subprocess.run(
        [sys.executable, "-c", ask, DEMO], capture_output=True, check=True, timeout=60
    ).stdout
    numbers = {"a flipped bit": [0], "a missing frame": [1], "a frame twice": [0, 0]}[damage]
    pixels = bytes([first[0] ^ 1]) + first[1:] if damage == "a flipped bit" else first
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, 30_000)
        socket.bind("tcp://127.0.0.1:*")
        address = socket.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        with subprocess.Popen(
            [sys.executable, DEMO / "consumer.py", address], stdout=subprocess.PIPE, text=True
        ) as consumer:
            for number in numbers:
                socket.send_json({"frame": number, "shape": [1024, 1024, 3], "dtype": "uint8"}, zmq.SNDMORE)
                socket.send(pixels)
            socket.send_json({"end": True, "frames": len(numbers)})
            said, _ = consumer.communicate(timeout=60)
    assert consumer.returncode == 3
    assert json.loads(said.splitlines()[-1])["complete"] is False
