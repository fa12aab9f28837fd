"""A microscope at one facility, the analysis at another, the stream set up by Globus Compute functions.

    python examples/microscope/over_compute.py compute:ENDPOINT_UUID compute:ENDPOINT_UUID
    python examples/microscope/over_compute.py compute:ENDPOINT_UUID https://scistream.alcf.example.org

Nobody reaches the gateways of the two facilities from here; their endpoints do (docs/compute.md). The functions start
the relays and are done; the frames go from relay to relay and see nothing of Globus. The second line has a consumer's
facility whose service, the same that is its action provider for Globus Flows, answers at an address of its own.

Microscope and analysis are the programs of the demo: one serves frames over ZeroMQ, the other compares each with the
image on disk and counts nuclei. Both run on this machine, so the facilities must be able to reach it; with
`local:aps local:alcf` they are here, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from scistream_flows import open_stream
from scistream_flows.errors import ScistreamError

PROGRAMS = Path(__file__).resolve().parents[1] / "demo"


def run(options: argparse.Namespace) -> dict[str, object]:
    """Stream until the microscope has sent what it was told to; what came of it."""
    sends = ["--seconds", str(options.seconds), "--bytes", str(options.bytes)]
    microscope = subprocess.Popen(
        [sys.executable, PROGRAMS / "producer.py", *sends], stdout=subprocess.PIPE, text=True
    )
    try:
        assert microscope.stdout is not None
        target = json.loads(microscope.stdout.readline())["listening"]
        with open_stream(options.producer, options.consumer, targets=[target], mode=options.mode) as stream:
            print(f"{stream.uid} is open at {stream.listeners[0]}", file=sys.stderr)
            analysis = [sys.executable, str(PROGRAMS / "consumer.py"), stream.listeners[0]]
            done = subprocess.run(
                analysis, stdout=subprocess.PIPE, text=True, timeout=options.seconds + 120, check=True
            )
            end = stream.wait(timeout_s=60).check()
    finally:
        microscope.terminate()
        microscope.communicate()
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "frames": said["frames"],
        "verified": said["verified"],
        "nuclei": said["nuclei"],
        "payload_bytes": said["bytes"],
        "producer_relay_bytes": end.prod.bytes.to_consumer,
        "consumer_relay_bytes": end.cons.bytes.to_consumer,
        "end": end.reasons,
    }


def main() -> int:
    """Parse the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(
        description="A microscope's frames through a stream set up by Globus Compute"
    )
    parser.add_argument("producer", help="facility of the microscope, such as compute:ENDPOINT_UUID")
    parser.add_argument("consumer", help="facility of the analysis")
    parser.add_argument("--mode", choices=["tls", "auth", "none"], default="tls")
    parser.add_argument("--seconds", type=float, default=2, help="send at least for so long")
    parser.add_argument("--bytes", type=float, default=1e8, help="send at least so much")
    options = parser.parse_args()
    try:
        print(json.dumps(run(options), indent=2))
    except ScistreamError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
