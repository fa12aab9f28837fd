"""Streams in Parsl workflows, with real workers in another process tree."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("parsl", reason="not installed: the extra parsl")

from serving import serving

from scistream_flows.config import load_facility
from scistream_flows.errors import BadRequest
from scistream_flows.parsl import Source

pytestmark = [
    pytest.mark.usefixtures("state_base", "own_temporary"),
    # Parsl leaves what its configuration opened to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# A workflow as a user writes it: its apps are in `__main__`, so that they travel by value.
WORKFLOW = """
import json, os, sys
import parsl
from parsl import File, python_app
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
from scistream_flows.parsl import Source, StreamStaging, streaming

run_dir, target, marker = sys.argv[1:]
facilities = {"producer": "local:aps", "consumer": "local:alcf", "targets": [target]}

def digest_of(address, marker):
    # where `marker` names a file that is not there yet, make it and be killed in the midst
    import hashlib, os, signal, socket
    host, _, port = address.rpartition(":")
    digest = hashlib.sha256()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        while piece := connection.recv(1 << 16):
            digest.update(piece)
            if marker and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
    return [digest.hexdigest(), os.getppid()]

@python_app
def receive(addresses=(), marker=None, digest_of=digest_of):  # a default travels with its function
    return digest_of(addresses[0], marker)

@python_app
def receive_file(inputs=(), marker=None, digest_of=digest_of):
    return digest_of(inputs[0].filepath, marker)

@python_app
def receive_late(tickets, addresses=(), marker=None, digest_of=digest_of):
    from scistream_flows import say_hello
    return digest_of(say_hello(tickets).addresses[0], marker)

@python_app
def fail(stream=None, inputs=()):
    raise ArithmeticError("no result")

workers = HighThroughputExecutor(
    address="127.0.0.1", loopback_address="127.0.0.1", max_workers_per_node=1, heartbeat_period=2,
    provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    storage_access=[StreamStaging(detector=Source(**facilities))],
)
with parsl.load(parsl.Config(run_dir=run_dir, executors=[workers], retries=1, initialize_logging=False)):
    task = eval(sys.stdin.read())
    try:
        print(json.dumps({"result": task.result(timeout=90)}))
    except Exception as wrong:
        print(json.dumps({"error": f"{type(wrong).__name__}: {wrong}"}))
"""

TASKS = {
    "app": 'streaming(receive, argument="addresses", **facilities)()',
    "file": 'receive_file(inputs=[File("scistream://detector")])',
}
KILLED = {
    "app": 'streaming(receive, argument="addresses", **facilities)(marker=marker)',
    "file": 'receive_file(inputs=[File("scistream://detector")], marker=marker)',
}
FAILS = {"app": "streaming(fail, **facilities)()", "file": 'fail(inputs=[File("scistream://detector")])'}

PAYLOAD = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))
DIGEST = hashlib.sha256(PAYLOAD).hexdigest()


@pytest.fixture
def producer() -> Iterator[str]:
    """An application that sends the payload to whoever connects, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ending = threading.Event()

        def send(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.sendall(PAYLOAD)
                except OSError:  # the consumer was killed
                    return

        def serve() -> None:
            while not ending.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                sender = threading.Thread(target=send, args=(connection,))
                senders.append(sender)
                sender.start()

        senders: list[threading.Thread] = []
        thread = threading.Thread(target=serve)
        thread.start()
        yield "{}:{}".format(*server.getsockname())
        ending.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        for sender in senders:
            sender.join(20)


@pytest.fixture
def workflow(tmp_path: Path, producer: str) -> Callable[[str], dict[str, Any]]:
    def run(task: str) -> dict[str, Any]:
        script = tmp_path / "workflow.py"
        script.write_text(WORKFLOW)
        done = subprocess.run(
            [sys.executable, script, tmp_path / "runs", producer, tmp_path / "killed"],
            input=task,
            capture_output=True,
            text=True,
            timeout=110,
            # Parsl's own programs are installed beside this Python
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said

    return run


def audited(facility: str, event: str) -> list[dict[str, Any]]:
    lines = (load_facility(facility).state_dir / "audit.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == event]


def assert_one_stream_released() -> None:
    """Opened once and closed once at each facility, for the reason `released`."""
    for facility in ("aps", "alcf"):
        assert len(audited(facility, "open")) == 1
        (end,) = audited(facility, "close")
        assert end["reason"] == "released"


@pytest.mark.parametrize("door", ["app", "file"])
@pytest.mark.timeout(180)
def test_a_task_gets_its_address_and_the_stream_ends_with_it(
    workflow: Callable[[str], dict[str, Any]],
    relays_below: Callable[..., list[int]],
    state_base: Path,
    door: str,
) -> None:
    said = workflow(TASKS[door])
    assert said.get("result", [said])[0] == DIGEST
    assert said["result"][1] != os.getpid()
    assert_one_stream_released()
    assert audited("alcf", "close")[0]["bytes"]["to_consumer"] >= len(PAYLOAD)
    assert audited("aps", "close")[0]["bytes"]["to_consumer"] >= len(PAYLOAD)
    assert relays_below(state_base) == []


@pytest.mark.parametrize("door", ["app", "file"])
@pytest.mark.timeout(180)
def test_a_task_whose_worker_was_killed_is_tried_again_with_the_same_stream(
    workflow: Callable[[str], dict[str, Any]],
    relays_below: Callable[..., list[int]],
    state_base: Path,
    door: str,
) -> None:
    said = workflow(KILLED[door])
    assert said.get("result", [said])[0] == DIGEST
    assert_one_stream_released()
    assert relays_below(state_base) == []


@pytest.mark.timeout(180)
def test_a_task_on_a_node_that_nobody_knew_says_hello_also_when_it_is_tried_again(
    workflow: Callable[[str], dict[str, Any]], relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    with serving(state_base, "alcf", development=True) as served:
        late = {"consumer": served.url, "consumers": ["127.0.0.77/32"]}  # loopback itself may not come in
        said = workflow(
            'streaming(receive_late, argument="addresses", tickets="tickets",'
            f" **(facilities | {late}))(marker=marker)"
        )
    assert said.get("result", [said])[0] == DIGEST
    assert len(audited("alcf", "ticket")) == 2  # one for each try
    assert {one["by_ticket"] for one in audited("alcf", "hello")} == {"127.0.0.1"}
    assert_one_stream_released()
    assert relays_below(state_base) == []


@pytest.mark.parametrize("door", ["app", "file"])
@pytest.mark.timeout(180)
def test_a_task_that_fails_releases_its_stream(
    workflow: Callable[[str], dict[str, Any]],
    relays_below: Callable[..., list[int]],
    state_base: Path,
    door: str,
) -> None:
    said = workflow(FAILS[door])
    assert "no result" in said["error"]
    for facility in ("aps", "alcf"):
        # with a file, each of the two tries opened and released
        assert (
            len(audited(facility, "open")) == len(audited(facility, "close")) == (1 if door == "app" else 2)
        )
    assert relays_below(state_base) == []


@pytest.mark.timeout(180)
def test_a_stream_that_cannot_be_opened_is_the_failure_of_the_task(
    workflow: Callable[[str], dict[str, Any]],
) -> None:
    said = workflow('streaming(fail, **{**facilities, "targets": ["192.0.2.1:5000"]})()')
    assert "DependencyError" in said["error"]
    assert "PolicyDenied" in said["error"]


@pytest.mark.timeout(180)
def test_a_workflow_that_is_left_waits_for_no_stream_that_is_being_opened(
    tmp_path: Path, free_address: str, relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    """Nobody listens at the target: until it is ready would be a minute."""
    script = tmp_path / "workflow.py"
    script.write_text(WORKFLOW)
    left = f"""(
        streaming(fail, **facilities)(),
        [__import__("time").sleep(0.1) for _ in range(300) if not os.path.exists({str(state_base / "alcf")!r})],
        sys.exit(3),
    )"""
    done = subprocess.run(
        [sys.executable, script, tmp_path / "runs", free_address, tmp_path / "killed"],
        input=left,
        capture_output=True,
        text=True,
        timeout=55,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 3, done.stderr
    assert relays_below(state_base, patience_s=5) == []


def test_a_source_gives_no_name_to_its_streams() -> None:
    with pytest.raises(BadRequest, match="uid is not possible"):
        Source("local:aps", "local:alcf", targets=["127.0.0.1:5000"], uid="mine")
