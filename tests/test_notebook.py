"""Streams in Jupyter: real kernels, one driven by nbclient and one that is interrupted."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient", reason="not installed: nbclient")
pytest.importorskip("ipykernel", reason="not installed: ipykernel")

import nbclient
import nbformat
from jupyter_client.manager import start_new_kernel

from scistream_flows.config import load_facility

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/notebook/stream.ipynb"

pytestmark = [
    pytest.mark.usefixtures("state_base", "jupyter"),
    pytest.mark.timeout(180),
    # what jupyter_client leaves of its loops and sockets to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that find and leave nothing in the home of whoever runs the tests."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))


def ends(facility: str) -> list[str]:
    lines = (load_facility(facility).state_dir / "audit.jsonl").read_text().splitlines()
    return [one["reason"] for one in map(json.loads, lines) if one["event"] == "close"]


def outputs(notebook: Any) -> list[Any]:
    return [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]


def test_the_notebook_runs_and_shows_its_streams(
    relays_below: Callable[..., list[int]], state_base: Path, tmp_path: Path
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not outputs(notebook), "the notebook is kept without outputs"
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = outputs(notebook)
    printed = "".join(one.text for one in shown if one.output_type == "stream" and one.name == "stdout")
    assert "48 of 48 frames as the detector made them" in printed
    counts = [int(line.split()[-2]) for line in printed.splitlines() if line.endswith(" bytes")]
    assert counts[0] == 48 * 512 * 512
    assert min(counts[1:]) >= counts[0]
    assert "after many ticks" in printed
    pictures = [one.data for one in shown if one.output_type in ("display_data", "execute_result")]
    (live,) = [one for one in pictures if "<svg" in one.get("text/html", "")]
    # drawn when the cell ran, and again after the stream had been released by a later one
    assert "released" in live["text/html"]
    assert "12.6 MB" in live["text/plain"]
    (plot,) = [one["image/png"] for one in pictures if "image/png" in one]
    assert base64.b64decode(plot).startswith(b"\x89PNG")
    assert ends("aps") == ends("alcf") == ["released", "released"]
    assert relays_below(state_base) == []


@pytest.fixture
def kernel() -> Iterator[tuple[Any, Any]]:
    manager, client = start_new_kernel(env=dict(os.environ))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        if manager.is_alive():
            manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


OPEN = """
from scistream_flows.notebook import open_stream
stream = open_stream("local:aps", "local:alcf", targets=["127.0.0.1:{port}"])
"""


def run(client: Any, code: str) -> dict[str, Any]:
    reply: dict[str, Any] = client.execute_interactive(code, timeout=60, output_hook=lambda _: None)[
        "content"
    ]
    return reply


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupting_the_kernel_releases_its_streams(
    kernel: tuple[Any, Any], relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    manager, client = kernel
    with socket.create_server(("127.0.0.1", 0)) as producer:
        assert run(client, OPEN.format(port=producer.getsockname()[1]))["status"] == "ok"
        assert len(relays_below(state_base)) == 2
        busy = client.execute("print('waiting', flush=True)\nimport time; time.sleep(100)")
        while client.get_iopub_msg(timeout=30)["content"].get("text") != "waiting\n":
            pass
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != busy:
            pass
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        eventually(lambda: relays_below(state_base) == [])
        assert ends("aps") == ends("alcf") == ["released"]
        # the kernel goes on, and another stream can be opened
        assert run(client, OPEN.format(port=producer.getsockname()[1]))["status"] == "ok"
        assert run(client, "stream.release().check()")["status"] == "ok"


def test_the_end_of_the_kernel_releases_its_streams(
    kernel: tuple[Any, Any], relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    manager, client = kernel
    with socket.create_server(("127.0.0.1", 0)) as producer:
        assert run(client, OPEN.format(port=producer.getsockname()[1]))["status"] == "ok"
        manager.shutdown_kernel()
        eventually(lambda: relays_below(state_base) == [])
    assert ends("aps") == ends("alcf") == ["released"]


def test_the_end_of_a_program_without_a_kernel_releases_its_streams(
    relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as producer:
        program = OPEN.format(port=producer.getsockname()[1])
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert relays_below(state_base) == []
    assert ends("aps") == ends("alcf") == ["released"]


def test_a_stream_that_was_left_open_in_a_block_is_released(
    kernel: tuple[Any, Any], relays_below: Callable[..., list[int]], state_base: Path
) -> None:
    _, client = kernel
    with socket.create_server(("127.0.0.1", 0)) as producer:
        code = OPEN.format(port=producer.getsockname()[1]) + "with stream:\n    1 / 0\n"
        assert run(client, code)["ename"] == "ZeroDivisionError"
    assert relays_below(state_base) == []
    assert ends("aps") == ends("alcf") == ["released"]
