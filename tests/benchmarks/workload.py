"""A producer and a consumer at a place, and what they measure over a chain; every answer is checked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import load, processes
from .chains import Chain
from .places import Address, Place, Spot

SCRIPT: Final = Path(load.__file__)
MARGIN_S: Final = 60.0
WINDOW_S: Final = 1.0
SETTLE_S: Final = 0.5


class WorkloadError(Exception):
    """Bytes that are missing, too many or others than were sent; or a load that gave up."""


@dataclass(frozen=True)
class Transfer:
    """What one transfer was."""

    bytes: int
    seconds: float
    relay_cpu_s: float
    load_cpu_s: float
    samples: int
    rss_before_bytes: int
    rss_bytes: int
    rss_while_slow: list[int]
    timeline: list[tuple[float, int]]

    @property
    def bits_per_s(self) -> float:
        return self.bytes * 8 / self.seconds

    @property
    def gb(self) -> float:
        return self.bytes / 1e9

    @property
    def settled_bits_per_s(self) -> float:
        """The mean, what began it left out."""
        (began, before), (ended, count) = self._settled[0], self._settled[-1]
        return (count - before) * 8 / (ended - began)

    @property
    def _settled(self) -> list[tuple[float, int]]:
        began = self.timeline[0][0] + SETTLE_S
        return [(at, count) for at, count in self.timeline if at >= began]

    def off(self, bits_per_s: float) -> float:
        """How far the worst window of a second is from this rate, as a part of it; what began it is left out."""
        ends = self._settled
        worst, first = 0.0, 0
        for at, count in ends:
            while ends[first + 1][0] <= at - WINDOW_S:
                first += 1
            since, before = ends[first]
            if at - since >= WINDOW_S:
                worst = max(worst, abs((count - before) * 8 / (at - since) / bits_per_s - 1))
        return worst


class Worker:
    """A process of the load."""

    def __init__(self, spot: Spot, *arguments: str) -> None:
        self._process = subprocess.Popen(
            spot.command(sys.executable, "-I", str(SCRIPT), *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """One answer to one command."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout
        timer = threading.Timer(load.DEADLINE_S + MARGIN_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        if not line:
            raise WorkloadError(f"the load has gone: exit {self._process.wait(5)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkloadError(answer["error"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


class Workload:
    """Both applications."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._producer = Worker(place.producer, "produce", place.producer.ip)
        host, port = self._producer.answer()["address"]
        self.target: Address = (host, port)
        self._consumer = Worker(place.consumer, "consume")

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()

    def transfer(
        self,
        chain: Chain,
        connections: int,
        *,
        duration_s: float,
        idle: int = 0,
        slow_s: float = 0,
        timeline: bool = False,
        pacing_bits_per_s: float = 0,
        most_bytes: int = 0,
    ) -> Transfer:
        """Everything that goes through in `duration_s`, and what it cost.

        Raises:
            WorkloadError: Not every byte arrived, or another one did.
        """
        self._consumer.ask(
            do="bulk",
            addresses=[chain.address] * connections,
            duration_s=duration_s,
            preamble=chain.preamble,
            idle=idle,
            slow_s=slow_s,
            timeline=timeline,
            pacing_bytes_per_s=int(pacing_bits_per_s / 8),
            most_bytes=most_bytes,
        )
        self._producer.ask()  # from here on counts what it has cost and sent
        family = chain.family()
        rss_before, cpu_before = processes.rss_bytes(family), processes.cpu_s(family)
        with _watching(family, slow_s) as seen:
            answer = self._consumer.ask()
        cpu = processes.cpu_s(family) - cpu_before
        sent = self._producer.ask()
        received = answer["received"]
        if answer["wrong"] or any(sent["sent"].get(one) != count for one, count in received.items()):
            raise WorkloadError(f"sent {sent['sent']}, received {received}, wrong bytes: {answer['wrong']}")
        return Transfer(
            bytes=sum(received.values()),
            seconds=answer["seconds"],
            relay_cpu_s=cpu,
            load_cpu_s=answer["cpu_s"] + sent["cpu_s"],
            samples=answer["samples"],
            rss_before_bytes=rss_before,
            rss_bytes=processes.rss_bytes(family),
            rss_while_slow=seen,
            timeline=answer["timeline"],
        )

    def round_trips(self, chain: Chain, *, duration_s: float) -> dict[str, Any]:
        """`count`, `p50_us`, `p99_us`, `relay_cpu_us`."""
        self._consumer.ask(do="round_trips", address=chain.address, duration_s=duration_s)
        return self._counted(chain)

    def connects(self, chain: Chain, at_once: int, *, duration_s: float) -> dict[str, Any]:
        """How many connections were made, asked and ended: `count`, `per_s`, `relay_cpu_us`."""
        self._consumer.ask(do="connects", address=chain.address, duration_s=duration_s, at_once=at_once)
        answer = self._counted(chain)
        if answer["failed"]:
            raise WorkloadError(
                f"{answer['failed']} of {answer['failed'] + answer['count']} connections failed"
            )
        return {
            "count": answer["count"],
            "per_s": answer["count"] / answer["seconds"],
            "relay_cpu_us": answer["relay_cpu_us"],
        }

    def _counted(self, chain: Chain) -> dict[str, Any]:
        """The consumer's answer, and what the relays have spent meanwhile on each of its `count`."""
        family = chain.family()
        before = processes.cpu_s(family)
        answer = self._consumer.ask()
        cpu = processes.cpu_s(family) - before
        return {**answer, "relay_cpu_us": cpu / max(answer["count"], 1) * 1e6}

    @contextlib.contextmanager
    def holding(self, chain: Chain, connections: int) -> Iterator[float]:
        """So many connections that say nothing, while the block runs; the seconds that it took to make them."""
        began = time.monotonic()
        self._consumer.ask(do="idle", address=chain.address, connections=connections)
        yield time.monotonic() - began
        answer = self._consumer.ask()
        if answer["alive"] != connections:
            raise WorkloadError(f"of {connections} idle connections {answer['alive']} are left")


@contextlib.contextmanager
def _watching(family: list[int], seconds: float) -> Iterator[list[int]]:
    """The resident memory every tenth of a second, while the block runs; nothing without `seconds`."""
    seen: list[int] = []
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.wait(0.1):
            seen.append(processes.rss_bytes(family))

    watcher = threading.Thread(target=watch)
    if seconds:
        watcher.start()
    try:
        yield seen
    finally:
        stopping.set()
        if seconds:
            watcher.join()


def load_average() -> float:
    """Over one minute."""
    return round(os.getloadavg()[0], 2)
