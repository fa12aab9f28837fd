"""A microscope at one facility, the analysis at another, the stream set up by Globus Compute functions.

    python examples/microscope/over_compute.py compute:ENDPOINT_UUID compute:ENDPOINT_UUID

Nobody reaches the gateways of the two facilities from here; their endpoints do (docs/compute.md). The functions start
the relays and are done; the frames go from relay to relay and see nothing of Globus. Either facility may be one that
answers at an address of its own; with_action_provider.py has one that is asked as Globus Flows asks it.

Microscope and analysis are the programs of the demo: one serves frames over ZeroMQ, the other compares each with the
image on disk and counts nuclei. Both run on this machine, so the facilities must be able to reach it; with
`local:aps local:alcf` they are here, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scistream_flows import open_stream
from scistream_flows.errors import ScistreamError

PROGRAMS = Path(__file__).resolve().parents[1] / "demo"


@contextlib.contextmanager
def microscope(options: argparse.Namespace) -> Iterator[str]:
    """The microscope's program, until the end of the block; where it listens."""
    sends = ["--seconds", str(options.seconds), "--bytes", str(options.bytes)]
    program = subprocess.Popen(
        [sys.executable, PROGRAMS / "producer.py", *sends], stdout=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        yield json.loads(program.stdout.readline())["listening"]
    finally:
        program.terminate()
        program.communicate()


def analyse(listener: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the analysis against the listener at its site, until the microscope has sent what it was told to."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "consumer.py"), listener],
        stdout=subprocess.PIPE,
        text=True,
        timeout=options.seconds + 120,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "frames": said["frames"],
        "verified": said["verified"],
        "nuclei": said["nuclei"],
        "payload_bytes": said["bytes"],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Stream from the microscope to the analysis; what came of it."""
    with (
        microscope(options) as target,
        open_stream(options.producer, options.consumer, targets=[target], mode=options.mode) as stream,
    ):
        print(f"{stream.uid} is open at {stream.listeners[0]}", file=sys.stderr)
        found = analyse(stream.listeners[0], options)
        end = stream.wait(timeout_s=60).check()
    return found | {
        "producer_relay_bytes": end.prod.bytes.to_consumer,
        "consumer_relay_bytes": end.cons.bytes.to_consumer,
        "end": end.reasons,
    }


def options_of(what: str) -> argparse.Namespace:
    """The command line of this example and of the one beside it."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("producer", help="facility of the microscope, such as compute:ENDPOINT_UUID")
    parser.add_argument("consumer", help="facility of the analysis")
    parser.add_argument("--mode", choices=["tls", "auth", "none"], default="tls")
    parser.add_argument("--seconds", type=float, default=2, help="send at least for so long")
    parser.add_argument("--bytes", type=float, default=1e8, help="send at least so much")
    return parser.parse_args()


def main() -> int:
    """Parse the options, run, and say what came of it."""
    options = options_of("A microscope's frames through a stream set up by Globus Compute")
    try:
        print(json.dumps(run(options), indent=2))
    except ScistreamError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
