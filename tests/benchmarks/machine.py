"""The machine on which it ran, as far as it explains the figures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from relay.gateway import find_binary

from .chains import find_program
from .results import Machine

SYSCTLS: Final = (
    "fs/pipe-max-size",
    "fs/pipe-user-pages-soft",
    "net/core/default_qdisc",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/tcp_slow_start_after_idle",
    "kernel/sched_autogroup_enabled",
)
VERSIONS: Final[dict[str, Sequence[str]]] = {
    "haproxy": ("-v",),
    "nginx": ("-v",),
    "stunnel": ("-version",),
    "socat": ("-V",),
    "iperf3": ("--version",),
    "openssl": ("version",),
}


def look() -> Machine:
    """Everything as it is now; `was_busy` when more runs than half a core can do."""
    kernel, cores = platform.release(), os.cpu_count() or 1
    averages = os.getloadavg()
    return Machine(
        kernel=f"{platform.system()} {kernel}",
        cpu=_first(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text()),
        cores=cores,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        congestion_control=_sysctl("net/ipv4/tcp_congestion_control"),
        sysctls={name.replace("/", "."): _sysctl(name) for name in SYSCTLS},
        versions={"s2ds": _said((str(find_binary()), "version"))}
        | {"python": platform.python_version()}
        | {name: _said((name, *options)) for name, options in VERSIONS.items()},
        load_average=(round(averages[0], 2), round(averages[1], 2), round(averages[2], 2)),
        was_busy=averages[0] > 0.5,
    )


def _sysctl(name: str) -> str:
    with suppress(OSError):
        return " ".join((Path("/proc/sys") / name).read_text().split())
    return "not there"


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "unknown"


def _said(command: Sequence[str]) -> str:
    """The version in what a program says of itself."""
    program = find_program(command[0])
    if program is None:
        return "not installed"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)
    return _first(r"(\d+\.\d+[\w.+-]*)", done.stdout + done.stderr)
