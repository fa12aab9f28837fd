"""A scientist's analysis: pulls frames over ZeroMQ from one address, checks each, and counts cell nuclei in some.

It knows nothing of relays: the address it is given is that of the CONS listener, but the producer's own would do as
well. Prints a JSON line several times a second and a last one at the end; exits 3 when a frame was not what the image
on disk says, was missing, or came twice.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import zmq

import nuclei
import slide

REPORT_EVERY_S = 0.2
ANALYSE_EVERY_S = 2.0


class Analyst(threading.Thread):
    """Analyses the newest frame every two seconds, beside the stream, which does not wait for it."""

    def __init__(self) -> None:
        super().__init__(name="analyst", daemon=True)
        self.findings: nuclei.Findings | None = None
        self.analysed = 0
        self._newest: slide.Frame | None = None
        self._there_is_one = threading.Event()
        self._finished = threading.Event()

    def show(self, frame: slide.Frame) -> None:
        """Offer a frame; the analysis takes the newest when it is free."""
        self._newest = frame
        self._there_is_one.set()

    def run(self) -> None:
        """Analyse until told to finish; at least one frame, if there was one."""
        while self._there_is_one.wait():
            self._there_is_one.clear()
            if self._newest is not None:
                self.findings = nuclei.analyse(self._newest)
                self._newest = None
                self.analysed += 1
            if self._finished.wait(ANALYSE_EVERY_S):
                return

    def finish(self) -> None:
        """Wait for the analysis under way."""
        self._finished.set()
        self._there_is_one.set()
        self.join()


class Report:
    """Counts what arrived and says so on stdout."""

    def __init__(self, analyst: Analyst) -> None:
        self.analyst = analyst
        self.frames = self.bytes = self.verified = 0
        self.began_s: float | None = None
        self.said_s = 0.0

    def say(self, **more: object) -> None:
        """Print one JSON line."""
        now_s = time.monotonic()
        self.said_s = now_s
        found = self.analyst.findings
        line = {
            "elapsed_s": now_s - self.began_s if self.began_s is not None else 0.0,
            "frames": self.frames,
            "bytes": self.bytes,
            "verified": self.verified,
            "nuclei": found.nuclei if found else None,
            "stained_share": found.stained_share if found else None,
        }
        print(json.dumps(line | more), flush=True)

    def saw(self, *, size_bytes: int, as_expected: bool) -> None:
        """Count one frame."""
        self.frames += 1
        self.bytes += size_bytes
        self.verified += as_expected
        if time.monotonic() - self.said_s >= REPORT_EVERY_S:
            self.say()


def receive(socket: zmq.Socket[bytes], report: Report, *, expected: list[bytes]) -> int:
    """Receive until the end message; answer the number of frames it announces."""
    while True:
        header = json.loads(socket.recv())
        if report.began_s is None:
            report.began_s = time.monotonic()
        if header.get("end"):
            return int(header["frames"])
        pixels = socket.recv(copy=False).buffer
        in_order = header["frame"] == report.frames
        as_expected = in_order and slide.digest(pixels) == expected[report.frames % len(expected)]
        report.analyst.show(np.frombuffer(pixels, header["dtype"]).reshape(header["shape"]))
        report.saw(size_bytes=len(pixels), as_expected=as_expected)


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Receive, check and analyse frames of a microscopy image.")
    parser.add_argument("address", help="HOST:PORT to connect to")
    parser.add_argument("--save", type=Path, help="write the last analysis to this file (.npz)")
    options = parser.parse_args()

    fields = slide.fields()
    expected = [slide.digest(field.data) for field in fields]
    nuclei.analyse(fields[0])  # the first call is slow: it loads half of scipy
    analyst = Analyst()
    analyst.start()
    report = Report(analyst)
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVHWM, 8)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(f"tcp://{options.address}")
        announced = receive(socket, report, expected=expected)
    elapsed_s = time.monotonic() - (report.began_s or 0.0)
    analyst.finish()
    complete = report.frames == announced == report.verified
    report.say(end=True, elapsed_s=elapsed_s, complete=complete, analysed=analyst.analysed)
    if options.save and analyst.findings:
        analyst.findings.save(options.save)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
