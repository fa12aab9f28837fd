"""A user of the command line: the real commands as processes, at the services of two facilities of his."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from conftest import relay_pids
from serving import Served, serving

Done: TypeAlias = "subprocess.CompletedProcess[str]"


def program(name: str) -> list[str]:
    """The command, where every warning is an error."""
    return [sys.executable, "-W", "error", "-c", f"from scistream_flows.cli.{name} import main; main()"]


class Site(NamedTuple):
    """The pair of services, and how their user runs the commands."""

    prod: str
    cons: str
    served: tuple[Served, Served]
    environment: dict[str, str]

    def s2uc(self, *arguments: object, given: str = "", **variables: str) -> Done:
        return subprocess.run(
            [*program("s2uc"), *map(str, arguments)],
            input=given,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def begin(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program("s2uc"), *map(str, arguments)],
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def appctrl(self, *arguments: object, **variables: str) -> Done:
        return subprocess.run(
            [*program("appctrl"), *map(str, arguments)],
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def document(self, *arguments: object, **variables: str) -> dict[str, Any]:
        done = self.s2uc(*arguments, "--format", "json", **variables)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def inbound(self, target: str, *more: object, **variables: str) -> dict[str, Any]:
        host, _, port = target.rpartition(":")
        given = ("--remote-ip", host, "--receiver-ports", port, "--num-conn", 1, "--s2cs", self.prod)
        return self.document("inbound-request", *given, *more, **variables)

    def outbound(self, uid: str, listeners: str, *more: object, **variables: str) -> Done:
        given = (uid, listeners, "--num-conn", 1, "--s2cs", self.cons)
        return self.s2uc("outbound-request", *given, *more, **variables)


@contextlib.contextmanager
def two_facilities(base: Path) -> Iterator[tuple[Served, Served]]:
    """The development facilities `aps` and `alcf`, served, their state below `base`."""
    with serving(base, "aps", development=True) as aps, serving(base, "alcf", development=True) as alcf:
        yield aps, alcf


def user_of(served: tuple[Served, Served], base: Path, *, config: Path) -> Site:
    """Their user, whose own directory is `config`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SCISTREAM_", "S2UC_"))}
    clean |= {"SCISTREAM_STATE_DIR": str(base), "SCISTREAM_CONFIG_DIR": str(config)}
    prod, cons = (one.url.removeprefix("http://") for one in served)
    return Site(prod, cons, served, clean)


@contextlib.contextmanager
def released(site: Site, uid: str) -> Iterator[None]:
    """What the block has opened is released after it; whether no relay is left, the fixtures look."""
    try:
        yield
    finally:
        site.s2uc("release", uid)


def sha(data: bytes) -> str:
    """The hash by which payloads are compared."""
    return hashlib.sha256(data).hexdigest()


def assert_no_relay_below(state: Path) -> None:
    """No relay runs for a state directory; one that does is ended, so that it disturbs no other test."""
    left = relay_pids(state, patience_s=5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} relays were left running"
