"""What processes have cost: all threads of them, and their children."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def family(pids: Iterable[int]) -> list[int]:
    """These processes and all below them."""
    found: list[int] = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return found


@contextmanager
def on_one_core() -> Iterator[None]:
    """What this thread starts while the block runs has one core, the last one of those that there are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time, also of threads and of children that have ended."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            # the clock of another process, CPUCLOCK_SCHED: nanoseconds, where /proc counts hundredths of a second
            total += time.clock_gettime((~pid << 3) | 2)
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK")
    return total


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def descriptors(pids: Iterable[int]) -> int:
    """Open descriptors."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - ten thousand of them
    return total
