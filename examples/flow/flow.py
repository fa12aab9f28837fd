"""A stream as a flow, on this machine: two facilities, an instrument, an analysis.

    python examples/flow/flow.py

Starts the services of two facilities (`aps`, `alcf`) and the instrument, renders the flow for the two, and runs it
with the local flow runner, which calls the facilities over HTTP as Globus Flows would. When the relays are connected,
the analysis connects to the consumer's relay. At the end: what was sent, what was received, what the relays carried.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from scistream_flows.actions.language import Definition
from scistream_flows.actions.render import render
from scistream_flows.actions.runner import run
from scistream_flows.config import load_facility
from scistream_flows.errors import ScistreamError
from scistream_flows.models import ListQuery, Release
from scistream_flows.s2cs import S2CS
from scistream_flows.tokens import Tokens

HERE = Path(__file__).resolve().parent
FACILITIES = ("aps", "alcf")
S2CS_COMMAND = "from scistream_flows.actions.administration import main; main()"  # what `s2cs` is


@contextlib.contextmanager
def program(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def first_line(stream: IO[str] | None, pattern: str) -> str:
    """What `pattern` finds in the first line in which it finds something."""
    assert stream is not None
    said = ""
    for line in stream:
        said += line
        if found := re.search(pattern, line):
            return found[0]
    raise ScistreamError(f"a program did not start: {said}")


def address_of(facility: subprocess.Popen[str]) -> str:
    """The base URL of a facility's service, which it says on stderr when it serves."""
    url = first_line(facility.stderr, r"http://[^ ]+")
    assert facility.stderr is not None
    # what it logs from now on is read, so that it never waits for a reader
    threading.Thread(target=facility.stderr.read, daemon=True).start()
    return url


def example() -> dict[str, Any]:
    """Run the flow, and answer what came of it."""
    with contextlib.ExitStack() as programs:
        aps, alcf = (
            programs.enter_context(program("-c", S2CS_COMMAND, "--facility", name, "--port", "0"))
            for name in FACILITIES
        )
        instrument = programs.enter_context(
            program(HERE / "instrument.py", "--blocks", "2000", "--seconds", "3")
        )
        target = json.loads(first_line(instrument.stdout, r"\{.*\}"))["listening"]
        flow = render("slices", producer=address_of(aps), consumer=address_of(alcf), slice_s=5)
        listeners: list[str] = []
        analyses: list[subprocess.Popen[str]] = []

        def watch(event: Mapping[str, Any]) -> None:
            details = event["details"]
            name, output = details.get("state_name"), details.get("output")
            if event["code"] == "ActionStarted":
                print(f"{name} ...", file=sys.stderr)
            elif event["code"] in ("ActionPolled", "ActionCompleted") and isinstance(output, dict):
                print(f"    {output['display_status']}", file=sys.stderr)
            elif event["code"] == "ActionFailed":
                print(f"    failed: {details['cause']}", file=sys.stderr)
            if event["code"] == "ActionCompleted" and name == "StartConsumerRelay":
                listeners.extend(output["details"]["listeners"])
            if event["code"] == "ActionCompleted" and name == "ConnectRelays":
                analyses.append(programs.enter_context(program(HERE / "analysis.py", listeners[0])))

        ended = run(
            Definition(flow.definition),
            {"targets": [target], "linger_s": 1},
            input_schema=flow.input_schema,
            authorizer=Tokens([]),
            label="the example",
            on_event=watch,
        ).check()
        sent, _ = instrument.communicate(timeout=60)
        received, _ = analyses[0].communicate(timeout=60)
        return {
            "status": ended.status,
            "sent": json.loads(sent),
            "received": json.loads(received),
            "relay_bytes": {
                "PROD": ended.output["producer_release"]["details"]["final"]["bytes"],
                "CONS": ended.output["consumer_release"]["details"]["final"]["bytes"],
            },
            "ended_by": ended.output["stream"]["details"]["ended_by"],
        }


def release_all() -> None:
    """Release what an interrupted run has left open: nobody would, before its lease ends."""
    for name in FACILITIES:
        with S2CS(load_facility(name)) as service:
            for stream in service.list(ListQuery()).streams:
                service.release(Release(uid=stream.uid, role=stream.role))


def interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every `finally`; a second signal must not break the tidying."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the example in a state directory of its own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    with tempfile.TemporaryDirectory(prefix="scistream-flow-") as folder:
        os.environ["SCISTREAM_STATE_DIR"] = folder
        try:
            result = example()
        except ScistreamError as wrong:
            print(f"example: {wrong}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("example: interrupted", file=sys.stderr)
            return 130
        finally:
            release_all()
    print(json.dumps(result, indent=2))
    return 0 if result["sent"] == result["received"] else 1


if __name__ == "__main__":
    sys.exit(main())
