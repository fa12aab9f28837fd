"""What a stream carries: iperf3 through two relays.

    python examples/iperf3/throughput.py --seconds 5 --streams 4 --mode auth

Starts an iperf3 server at the producer's side, opens a stream to it, and runs the iperf3 client against the listener at
the consumer's side, as an application there would. Neither knows of the relays. The server takes one session only
(`iperf3 -s -1`): the connection by which READY was proven is the first of the session.

With facilities of your own (`--producer`, `--consumer`), start the server there and name it with `--target`; the client
runs here, so run this where the consumer's listeners can be reached, and name that network with `--consumers`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

from scistream_flows import open_stream
from scistream_flows.errors import ScistreamError
from scistream_flows.models import split_address


@contextlib.contextmanager
def iperf3_server() -> Iterator[str]:
    """A server for one session on this machine; its address. It is there when the probe has reached it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        host, port = free.getsockname()
    command = ["iperf3", "--server", "--one-off", "--bind", host, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"{host}:{port}"
    finally:
        server.terminate()
        server.wait(20)


def run(options: argparse.Namespace) -> dict[str, object]:
    """The figures of one run."""
    with contextlib.ExitStack() as stack:
        target = options.target or stack.enter_context(iperf3_server())
        stream = stack.enter_context(
            open_stream(
                options.producer,
                options.consumer,
                targets=[target],
                consumers=options.consumers,
                mode=options.mode,
                until="released",  # iperf3 resets its connections at the end, which is no end in order
            )
        )
        host, port = split_address(stream.listeners[0])
        command = ["iperf3", "--client", host, "--port", str(port), "--time", str(options.seconds), "--json"]
        command += ["--parallel", str(options.streams)] + (["--reverse"] if options.reverse else [])
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.seconds + 60, check=False
        )
        report = json.loads(done.stdout)
        if done.returncode or "error" in report:
            raise ScistreamError(
                f"iperf3 failed: {report.get('error', done.stderr)}", which=stream.listeners[0]
            )
        end = stream.release()
    received = report["end"]["sum_received"]
    direction = "to_consumer" if options.reverse else "to_producer"
    return {
        "mode": options.mode,
        "payload_bytes": received["bytes"],
        "gbits_per_s": received["bits_per_second"] / 1e9,
        "producer_relay_bytes": getattr(end.prod.bytes, direction),
        "consumer_relay_bytes": getattr(end.cons.bytes, direction),
        "end": end.reasons,
    }


def main() -> int:
    """Parse the options, run, and say what came of it."""
    parser = argparse.ArgumentParser(description="iperf3 through a stream")
    parser.add_argument("--producer", default="local:aps", help="facility of the iperf3 server")
    parser.add_argument("--consumer", default="local:alcf", help="facility of the iperf3 client")
    parser.add_argument("--target", help="host:port of a server that runs; by default one is started here")
    parser.add_argument("--consumers", action="append", default=[], help="network the client comes from")
    parser.add_argument("--mode", choices=["tls", "auth", "none"], default="tls")
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=1, help="TCP connections at a time")
    parser.add_argument("--reverse", action="store_true", help="from the server to the client")
    parser.add_argument("--json", action="store_true", help="one document, for programs")
    options = parser.parse_args()
    if shutil.which("iperf3") is None:
        print("iperf3 is not installed (Debian: apt-get install iperf3)", file=sys.stderr)
        return 1
    try:
        figures = run(options)
    except ScistreamError as wrong:
        print(wrong, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(figures))
        return 0
    print(f"{options.mode}: {figures['gbits_per_s']:.2f} Gbit/s, {figures['payload_bytes']} bytes of payload")
    print(
        f"producer's relay {figures['producer_relay_bytes']}, consumer's relay {figures['consumer_relay_bytes']} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
