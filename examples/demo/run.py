"""The demo: microscopy frames streamed between two facilities on this machine, set up and torn down by a flow.

    producer.py -> S2DS (facility aps) == WAN ==> S2DS (facility alcf) -> consumer.py

The applications are ordinary ZeroMQ programs, each a process of its own; the consumer is told only the CONS listener.
Each facility has its service, `s2cs`; the flow is the one that Globus Flows would run, on the runner of this package.
With `--setup python` the same stream is opened by a few lines of Python instead.
The stream runs in mode `tls`, then in `auth`, to show what encryption costs here and that splice carries the other.
Leaves result.json and stream.png in build/demo, and nothing else: no process, no port, no state.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, TypeAlias

from rich.console import Console
from rich.live import Live

import nuclei
import picture
import screen
from application import Application, ApplicationError, application
from by_flow import FlowStream, flow_stream
from by_python import PythonStream, python_stream
from scistream_flows import ScistreamError
from scistream_flows.models import Mode, Role, Status
from scistream_flows.stream import limiting_leg
from service import service

Setup: TypeAlias = Literal["flow", "python"]
MODES: tuple[Mode, ...] = ("tls", "auth")
LINGER_S = 1
POLL_EVERY_S = 0.25
PATIENCE_S = 5
NOT_AS_EXPECTED = 3  # the consumer's exit code when a frame was wrong
CLOCK_SLACK_S = 0.25  # producer and consumer start their clocks at different frames


@dataclass
class Relays:
    """What the relays of a stream say about themselves while they live."""

    paths: set[str] = field(default_factory=set)
    cpu_s: dict[str, float] = field(default_factory=dict)

    def look(self, stream: FlowStream | PythonStream) -> Sequence[Status]:
        """Ask both sides."""
        sides = stream.sides()
        for relay in (relay for side in sides for relay in side.relays):
            self.paths.update(path for one in relay.streams if (path := one.path.get("to_consumer")))
            if relay.resources and relay.resources.cpu_s is not None:
                self.cpu_s[relay.relay_id] = relay.resources.cpu_s
        return sides


def follow(stream: FlowStream | PythonStream, consumer: Application, watch: screen.Watch) -> Relays:
    """Keep what is watched up to date until the consumer has ended.

    Raises:
        ApplicationError: When the stream is over, but not for the consumer.
    """
    relays = Relays()
    ended_s: float | None = None
    while consumer.running:
        prod, cons = relays.look(stream)
        limiting = limiting_leg(prod.limiting, cons.limiting)
        if limiting is not None and limiting.leg:
            watch.limiting = limiting.leg.replace("_", " ")
        if prod.ended and cons.ended:
            ended_s = ended_s or time.monotonic()
            if time.monotonic() - ended_s > PATIENCE_S:
                reasons = f"{prod.reason} at PROD, {cons.reason} at CONS"
                raise ApplicationError(
                    f"the stream ended ({reasons}), but the consumer waits for more frames"
                )
        time.sleep(POLL_EVERY_S)
    return relays


def processes_of(state_dir: Path) -> list[int]:
    """The processes that work in this run's state directory: its relays."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink().is_relative_to(state_dir):
                found.append(int(entry.name))
    return found


@dataclass
class Facilities:
    """The two facilities of the demo, and how streams between them are set up.

    Attributes:
        producer: The name of the producer's facility.
        consumer: The name of the consumer's.
        urls: Where their services are; None sets up without them.
    """

    producer: str
    consumer: str
    urls: tuple[str, str] | None = None

    @contextlib.contextmanager
    def stream(self, target: str, mode: Mode) -> Iterator[FlowStream | PythonStream]:
        """A stream from the producer at `target`."""
        if self.urls is None:
            names: dict[Role, str] = {"PROD": self.producer, "CONS": self.consumer}
            with python_stream(names, targets=[target], mode=mode, linger_s=LINGER_S) as by_python:
                yield by_python
        else:
            prod, cons = self.urls
            services: dict[Role, tuple[str, str]] = {
                "PROD": (self.producer, prod),
                "CONS": (self.consumer, cons),
            }
            with flow_stream(services, targets=[target], mode=mode, linger_s=LINGER_S) as by_flow:
                yield by_flow


@contextlib.contextmanager
def facilities(setup: Setup) -> Iterator[Facilities]:
    """The facilities, with their services where a flow is to find them."""
    token = secrets.token_hex(4)
    producer, consumer = f"aps-{token}", f"alcf-{token}"
    if setup == "python":
        yield Facilities(producer, consumer)
        return
    with service(producer) as producer_url, service(consumer) as consumer_url:
        yield Facilities(producer, consumer, (producer_url, consumer_url))


def run_stream(
    mode: Mode, *, seconds: float, at_least_bytes: float, between: Facilities, folder: Path, console: Console
) -> tuple[dict[str, Any], picture.Curve]:
    """Carry one stream from producer to consumer; answer its element of result.json and its curve.

    Raises:
        ApplicationError: When producer or consumer did not end well.
        ScistreamError: When the stream could not be opened, or did not end by itself.
    """
    analysis = folder / "analysis.npz"
    watch = screen.Watch(mode, goal_s=seconds, goal_bytes=at_least_bytes)
    with (
        Live(watch, console=console, refresh_per_second=8),
        application(
            "producer.py", f"--seconds={seconds + CLOCK_SLACK_S}", f"--bytes={at_least_bytes}"
        ) as producer,
    ):
        target = producer.first_line(timeout_s=30)["listening"]
        began_s = time.monotonic()
        with between.stream(target, mode) as stream:
            watch.steps = stream.steps
            stream.wait_connected()
            setup_s = time.monotonic() - began_s
            watch.listener = stream.listener
            with application("consumer.py", watch.listener, "--save", str(analysis)) as consumer:
                watch.lines = consumer.lines
                relays = follow(stream, consumer, watch)
                counted = consumer.finish(timeout_s=30, well=(0, NOT_AS_EXPECTED))
                producer.finish(timeout_s=30)
            relays.look(stream)
            ends = stream.finish(timeout_s=LINGER_S + 30)
    payload_bytes = counted["bytes"]
    outcome = {
        "mode": mode,
        "path": "+".join(sorted(relays.paths)),
        "frames": counted["frames"],
        "bytes": payload_bytes,
        "verified": counted["complete"],
        "gbit_per_s": 8e-9 * payload_bytes / counted["elapsed_s"],
        "relay_cpu_s_per_gb": sum(relays.cpu_s.values()) / (payload_bytes / 1e9),
        "setup_s": setup_s,
        "end_reason": {role: end.reason for role, end in ends.items()},
        "relay_bytes": {role: end.bytes.to_consumer for role, end in ends.items()},
    }
    return outcome, picture.Curve(samples=watch.samples(), path=outcome["path"])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step, so that two demos at once leave one or the other result, never a mixture.

    Raises:
        ApplicationError: When it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as wrong:
        raise ApplicationError(f"{path} cannot be written: {wrong.strerror}; choose an --output") from None


def shortcomings(result: dict[str, Any]) -> list[str]:
    """What the demo promises and this run did not keep."""
    wrong = [f"{result['relays_left']} relays are still running"] if result["relays_left"] else []
    for one in result["streams"]:
        if not one["verified"]:
            wrong.append(f"mode {one['mode']}: not every frame was as the image on disk")
        if set(one["end_reason"].values()) != {"finished"}:
            wrong.append(f"mode {one['mode']}: ended with {one['end_reason']}, not finished on both sides")
        if min(one["relay_bytes"].values()) < one["bytes"]:
            wrong.append(f"mode {one['mode']}: the relays counted fewer bytes than the consumer received")
    return wrong


def demo(*, seconds: float, at_least_bytes: float, output: Path, setup: Setup, console: Console) -> int:
    """Run the stream in each mode, then show and write what came of it; answer the exit code."""
    console.print("producer → S2DS (facility aps) ═ WAN ═ S2DS (facility alcf) → consumer\n")
    streams: list[dict[str, Any]] = []
    curves: dict[str, picture.Curve] = {}
    with tempfile.TemporaryDirectory(prefix="scistream-demo-") as folder:
        state_dir = Path(folder) / "state"
        os.environ["SCISTREAM_STATE_DIR"] = str(state_dir)
        with facilities(setup) as between:
            for mode in MODES:
                outcome, curves[mode] = run_stream(
                    mode,
                    seconds=seconds,
                    at_least_bytes=at_least_bytes,
                    between=between,
                    folder=Path(folder),
                    console=console,
                )
                streams.append(outcome)
                console.print()
        findings = nuclei.Findings.load(Path(folder) / "analysis.npz")
        result = {"setup": setup, "relays_left": len(processes_of(state_dir)), "streams": streams}
    write_whole(output / "result.json", json.dumps(result, indent=2).encode() + b"\n")
    write_whole(output / "stream.png", picture.render(curves, findings))
    console.print(screen.summary(streams))
    wrong = shortcomings(result)
    for sentence in wrong:
        console.print(f"demo: {sentence}", style="bold red")
    if not wrong:
        console.print("* of both relays together. No relay is left running.")
        console.print(f"The picture: {output / 'stream.png'}", highlight=False)
    return 1 if wrong else 0


def interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every `finally`; a second signal must not break the tidying."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def positive(text: str) -> float:
    """A number on the command line that the demo can come to."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=positive, default=5, help="each stream lasts at least so long (5)")
    parser.add_argument(
        "--bytes", type=positive, default=1e9, help="and carries at least so many bytes (1e9)"
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder of the results")
    parser.add_argument(
        "--setup", choices=("flow", "python"), default="flow", help="who sets up the streams (flow)"
    )
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    console = Console()
    try:
        return demo(
            seconds=options.seconds,
            at_least_bytes=options.bytes,
            output=options.output,
            setup=options.setup,
            console=console,
        )
    except (ScistreamError, ApplicationError) as wrong:
        console.print(f"\ndemo: {wrong}", style="bold red")
        return 1
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted; the applications are stopped and the stream is released")
        return 130


if __name__ == "__main__":
    sys.exit(main())
