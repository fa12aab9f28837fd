"""A facility served by a process of its own, as its users meet it: over HTTP, with real relays behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from scistream_flows.actions.auth import DevelopmentToken

# With a name of a step, the process kills or stops itself there, once: the service's own log says how far it has come.
PROGRAM = """
import json, logging, os, signal, sys
from pathlib import Path
from scistream_flows.config import load_facility
from scistream_flows.actions.service import serve

class Strike(logging.Handler):
    def emit(self, record):
        if record.getMessage().split()[0] == struck_at:
            logger.removeHandler(self)
            os.kill(os.getpid(), by)

if __name__ == "__main__":
    name, file, struck_at, by, options = json.loads(sys.argv[1])
    if struck_at:
        logger = logging.getLogger("scistream_flows.s2cs")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(Strike())
    serve(load_facility(name, file=file), **options)
"""

TOML = """
[facility]
name = "{name}"

{gateway}

[policy]
targets = ["127.0.0.0/8"]
peers = ["127.0.0.0/8"]
consumers = ["127.0.0.0/8"]
modes = ["tls", "auth", "none"]
users = ["all_authenticated_users"]
"""

LOCAL = """
[[gateway]]
name = "local"
wan_bind = "127.0.0.1"
lan_bind = "127.0.0.1"
"""


@dataclass
class Served:
    """The process; `url` is where it serves."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    state_dir: Path
    scope: str = ""

    @property
    def token(self) -> str:
        """The development token."""
        return str(DevelopmentToken.read(self.state_dir))

    @property
    def pids(self) -> list[int]:
        """The process and its workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(one.pid for one in children if "s2ds" not in one.name())]

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        try:
            return self.process.wait(30)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the process and its workers."""
        if self.process.poll() is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(30)


@contextlib.contextmanager
def serving(
    base: Path,
    name: str,
    *,
    gateway: str = LOCAL,
    more: str = "",
    development: bool = False,
    killed_at: str = "",
    stopped_at: str = "",
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """The facility `name`, its state below `base`, served until the end of the block."""
    file = base / f"{name}.toml"
    file.write_text(TOML.format(name=name, gateway=gateway) + more)
    program = base / "serve.py"
    program.write_text(PROGRAM)
    log = base / f"{name}-{uuid.uuid4().hex}.log"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SCISTREAM_")}
    clean |= {
        "SCISTREAM_STATE_DIR": str(base),
        "SCISTREAM_CONFIG_DIR": str(base / "none"),
        **(environment or {}),
    }
    by = signal.SIGSTOP if stopped_at else signal.SIGKILL
    told = [name, None if development else str(file), killed_at or stopped_at, by, options]
    arguments = json.dumps(told)
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, program, arguments], stderr=stderr, env=clean)
    served = Served(process, "", log, base / name)
    try:
        served.url = _serving_at(served)
        yield served
    finally:
        served.stop()


def _serving_at(served: Served) -> str:
    deadline = time.monotonic() + 30
    while True:
        said = served.log.read_text()
        if " serving at " in said:
            return said.partition(" serving at ")[2].split()[0]
        assert served.process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.02)


@dataclass
class Caller:
    """Somebody with a token at a facility."""

    served: Served
    token: str
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"} | more.pop("headers", {})
        return self.http.request(method, self.served.url + path, headers=headers, **more)

    def run(self, action: str, body: Mapping[str, Any], **more: Any) -> httpx.Response:
        document = {"request_id": str(uuid.uuid4()), "body": body} | more
        return self.ask("POST", f"/actions/{action}/run", json=document)

    def done(self, action: str, body: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The status document of the action when it is final."""
        return self.until_final(action, self.run(action, body, **more).raise_for_status().json())

    def details(self, action: str, body: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The result of an action that has to succeed."""
        status = self.done(action, body, **more)
        assert status["status"] == "SUCCEEDED", status
        details: dict[str, Any] = status["details"]
        return details

    def status(self, action: str, action_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = (
            self.ask("GET", f"/actions/{action}/{action_id}/status").raise_for_status().json()
        )
        return answer

    def until_final(self, action: str, status: dict[str, Any], *, timeout_s: float = 40) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while status["status"] == "ACTIVE":
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
            status = self.status(action, status["action_id"])
        return status

    def close(self) -> None:
        self.http.close()
