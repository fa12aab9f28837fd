"""A stream that is held, seen and drawn from the command line: in a terminal, in a log, for a program."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served
from users import Site, assert_no_relay_below, program, released, sha, two_facilities, user_of

from scistream_flows.cli.live import SPARKS, sparkline, why
from scistream_flows.models import Limiting, split_address

pytestmark = pytest.mark.timeout(100)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, tuple[Served, Served]]]:
    base = tmp_path_factory.mktemp("pair")
    with two_facilities(base) as served:
        yield base, served


@pytest.fixture
def site(pair: tuple[Path, tuple[Served, Served]], tmp_path: Path) -> Iterator[Site]:
    base, served = pair
    yield user_of(served, base, config=tmp_path / "config")
    assert_no_relay_below(base)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, site: Site, *arguments: object) -> None:
        self._terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            [*program("s2uc"), *map(str, arguments)],
            env=site.environment | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def until(self, pattern: str, *, timeout_s: float = 60) -> str:
        """What matches in all that was shown."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.shown)):
            assert select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))[0], (
                self.shown
            )
            self._read()
        return found[0]

    def end(self, by: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(by)
        with contextlib.suppress(OSError):  # that is how a terminal ends
            while select.select([self._terminal], [], [], 60)[0]:
                self._read()
        return self.process.wait(30)

    def _read(self) -> None:
        raw = os.read(self._terminal, 4096).decode(errors="replace")
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def terminal(site: Site) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as closing:

        def start(*arguments: object) -> Terminal:
            started = Terminal(site, *arguments)
            closing.callback(started.close)
            return started

        yield start


@contextlib.contextmanager
def pouring(address: str) -> Iterator[None]:
    """Bytes into a listener until the end of the block."""
    over = threading.Event()

    def pour() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(split_address(address), timeout=30) as out,
        ):
            while not over.is_set():
                out.sendall(b"x" * 65_536)
                time.sleep(0.001)
            out.shutdown(socket.SHUT_WR)
            while out.recv(65_536):
                pass

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


@pytest.fixture
def opened(site: Site, application: Any) -> Iterator[tuple[str, str]]:
    """A stream that is READY: its uid, and where to connect."""
    said = site.inbound(application.address)
    with released(site, said["uid"]):
        done = site.outbound(said["uid"], said["listeners"][0], "--wait-s", 20, "--format", "json")
        assert done.returncode == 0, done.stderr
        yield said["uid"], json.loads(done.stdout)["listeners"][0]


# --- stream


def test_one_command_opens_holds_and_releases_a_stream(
    site: Site, application: Any, talk: Any, terminal: Callable[..., Terminal]
) -> None:
    held = terminal("stream", site.prod, site.cons, "--target", application.address, "--uid", "held")
    entry = held.until(r'(?<=listeners: ")127[^"]+(?=")')
    assert talk(entry, b"to the producer") == sha(application.payload)
    held.until(r"open, until Ctrl-C: \d")
    assert {one["state"] for one in site.document("status", "held")["streams"]} == {"STREAMING"}
    assert held.end() == 0
    assert "releasing held" in held.shown
    assert site.document("list", "--s2cs", site.prod)["streams"] == []
    assert site.s2uc("status", "held").returncode == 1
    assert "Traceback" not in held.shown


def test_a_stream_that_ends_by_itself_ends_the_command(site: Site, application: Any, talk: Any) -> None:
    held = site.begin(
        *("stream", f"http://{site.prod}", "local:alcf", "--target", application.address),
        *("--until", "closed", "--format", "json"),
    )
    try:
        assert held.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            said += held.stdout.readline()
        talk(json.loads(said)["listeners"][0], b"x")
        assert held.wait(60) == 0
    finally:
        held.kill()
        _, stderr = held.communicate()
    assert "has ended: finished" in stderr


def test_a_stream_that_does_not_become_ready_leaves_nothing(site: Site, free_address: str) -> None:
    done = site.s2uc("stream", site.prod, site.cons, "--target", free_address, "--ready-timeout-s", 1)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot connect to its target {free_address}" in done.stderr
    assert site.document("list", "--s2cs", site.prod)["streams"] == []


# --- watch, renew, plot


def test_watch_shows_a_stream_live_in_a_terminal(
    opened: tuple[str, str], terminal: Callable[..., Terminal]
) -> None:
    uid, entry = opened
    with pouring(entry):
        seen = terminal("watch", uid, "--interval-s", "0.2")
        seen.until(r"to producer\W+[\d.]+ [kMG]bit/s")
        seen.until(f"[{SPARKS[1:]}]")
        seen.until(r"limited by\W+\w+")
        assert seen.end() == 0
    assert "Traceback" not in seen.shown


def test_watch_in_a_log_writes_a_line_for_each_look(site: Site, opened: tuple[str, str]) -> None:
    uid, entry = opened
    with pouring(entry):
        done = site.s2uc("watch", uid, "--interval-s", "0.3", "--for-s", "1.5")
        documents = site.s2uc(
            "watch", uid, "--interval-s", "0.3", "--for-s", "1", "--format", "json", "--renew"
        )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert "PROD STREAMING, CONS STREAMING" in done.stdout
    last = json.loads(documents.stdout.splitlines()[-1])
    assert last["uid"] == uid
    assert last["bytes"]["to_producer"] > 0
    assert last["lease_remaining_s"] > 3500
    assert last["limited_by"]


def test_watch_ends_with_the_stream(site: Site, opened: tuple[str, str]) -> None:
    uid, _ = opened
    seen = site.begin("watch", uid, "--interval-s", "0.2")
    try:
        assert seen.stdout is not None
        assert "READY" in seen.stdout.readline()
        assert site.s2uc("release", uid).returncode == 0
        stdout, stderr = seen.communicate(timeout=30)
    finally:
        seen.kill()
        seen.wait()
    assert seen.returncode == 0, stderr
    assert "PROD ENDED released, CONS ENDED released" in stdout.splitlines()[-1]


def test_a_lease_is_renewed_once_or_as_long_as_one_likes(site: Site, opened: tuple[str, str]) -> None:
    uid, _ = opened
    once = site.s2uc("renew", uid, "--lease-s", "10m")
    assert once.returncode == 0, once.stderr
    assert re.fullmatch(
        rf"{uid} \(PROD\): lease 9 min 59 s\n{uid} \(CONS\): lease 9 min 59 s\n|.*10 min.*",
        once.stdout,
        re.DOTALL,
    )
    keeping = site.begin("renew", uid, "--lease-s", 2, "--keep")
    try:
        time.sleep(4)
        assert {one["state"] for one in site.document("status", uid)["streams"]} == {"READY"}
        keeping.send_signal(signal.SIGINT)
        assert keeping.wait(30) == 130
    finally:
        keeping.kill()
        keeping.communicate()
    site.s2uc("renew", uid, "--lease-s", "1h")


def test_plot_draws_what_went_through(site: Site, opened: tuple[str, str], tmp_path: Path) -> None:
    uid, entry = opened
    picture = tmp_path / "picture.png"
    with pouring(entry):
        said = site.document("plot", uid, "--seconds", 2, "--interval-s", "0.4", "--output", picture)
    assert said["file"] == str(picture)
    assert said["samples"][-1]["bits_per_s"]["to_producer"] > 0
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 10_000


def test_without_matplotlib_plot_says_at_once_what_is_missing(site: Site) -> None:
    hide = "import sys; sys.modules['matplotlib'] = None; from scistream_flows.cli.s2uc import main; main()"
    done = subprocess.run(
        [program("s2uc")[0], "-c", hide, "plot", "any"],
        env=site.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "scistream-flows[plot]" in done.stderr


# --- words


def test_a_sparkline_has_its_highest_value_full() -> None:
    assert sparkline([0, 1, 2, 4]) == "▁▃▅█"
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 1000)) == 60


@pytest.mark.parametrize(
    ("leg", "direction", "words"),
    [
        (
            "wan",
            "to_consumer",
            "wan: the network between the facilities takes no more, or loses some, 80 % of the time",
        ),
        ("producer_application", "to_consumer", "the producer's application sends no faster"),
        ("consumer_application", "to_consumer", "the consumer's application reads no faster"),
        ("producer_application", "to_producer", "the producer's application reads no faster"),
        ("consumer_application", "to_producer", "the consumer's application sends no faster"),
        ("relay", "to_consumer", "a relay's own processor is the limit"),
    ],
)
def test_why_a_leg_limits_is_said_in_words(leg: str, direction: str, words: str) -> None:
    assert words in why(Limiting(direction=direction, leg=leg, share=0.8))
    assert why(None) == "nothing moves"
