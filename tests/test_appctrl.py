"""`appctrl`: hello for applications, and real applications through a real stream."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from serving import Served
from users import Site, assert_no_relay_below, program, released, sha, two_facilities, user_of

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


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def begin(site: Site, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*program("appctrl"), *map(str, arguments)],
        env=site.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], by: signal.Signals = signal.SIGTERM) -> int:
    if process.poll() is None:
        process.send_signal(by)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("command", ["create_appctrl", "mock"])
def test_hello_of_both_sides_as_in_the_developer_guide(
    site: Site, application: Any, talk: Any, command: str
) -> None:
    """prod-req waits, appctrl says hello; cons-req, and appctrl for the other side."""
    host, _, port = application.address.rpartition(":")
    waiting = site.begin("prod-req", "--num_conn", 1, "--s2cs", site.prod)
    try:
        assert waiting.stdout is not None
        waiting.stdout.readline()
        uid = waiting.stdout.readline().split()[0]
        hello = site.appctrl(command, uid, site.prod, "-", "PROD", host, "--ports", port)
        assert hello.returncode == 0, hello.stderr
        assert "Hello message sent successfully" in hello.stderr
        stdout, stderr = waiting.communicate(timeout=30)
    finally:
        waiting.kill()
        waiting.wait()
    assert waiting.returncode == 0, stderr
    with released(site, uid):
        assert re.findall(r'^listeners: "(.+)"$', stdout, re.MULTILINE) == re.findall(
            r'^listeners: "(.+)"$', hello.stdout, re.MULTILINE
        )
        (listener,) = re.findall(r'^listeners: "(.+)"$', stdout, re.MULTILINE)
        assert site.s2uc("cons-req", uid, listener, "--num_conn", 1, "--s2cs", site.cons).returncode == 0
        other = site.appctrl(command, uid, site.cons, "INVALID_TOKEN", "cons")
        (entry,) = re.findall(r'^listeners: "(.+)"$', other.stdout, re.MULTILINE)
        assert talk(entry, b"to the producer") == sha(application.payload)


def test_a_token_on_the_command_line_is_refused_and_not_repeated(site: Site) -> None:
    done = site.appctrl("create-appctrl", "u", site.prod, "AgSecretSecretSecret", "PROD")
    assert (done.returncode, done.stdout) == (2, "")
    assert "s2uc login" in done.stderr
    assert "AgSecret" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("u",),
        ("u", "-"),
        ("u", "x:1", "-", "BOTH"),
        ("u", "-", "PROD", "127.0.0.1", "x"),
        ("../u", "-", "PROD"),
    ],
)
def test_words_that_do_not_fit_are_wrong_usage(site: Site, words: tuple[str, ...]) -> None:
    done = site.appctrl("create-appctrl", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_hello_for_no_stream_says_so(site: Site) -> None:
    done = site.appctrl("create-appctrl", "never-was", site.prod, "-", "PROD")
    assert (done.returncode, done.stdout) == (1, "")
    assert "never-was" in done.stderr


@pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed")
def test_iperf3_through_a_stream(site: Site, free_port: int) -> None:
    server = begin(site, "iperf-server", free_port)
    try:
        held = site.begin(
            "stream", site.prod, site.cons, "--target", f"127.0.0.1:{free_port}", "--format", "default"
        )
        try:
            assert held.stdout is not None
            entry = re.findall(r'"(.+)"', [held.stdout.readline() for _ in range(2)][1])[0]
            done = site.appctrl("iperf_client", entry, "--time-s", 1)
            assert done.returncode == 0, done.stderr
            assert "receiver" in done.stdout
        finally:
            held.send_signal(signal.SIGINT)
            held.communicate(timeout=30)
        assert held.returncode == 0
    finally:
        ended(server)


@pytest.mark.skipif(not shutil.which("iperf3"), reason="iperf3 is not installed")
def test_whoever_has_the_port_keeps_it(site: Site) -> None:
    """SciStream killed the program that listened there."""
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        port = theirs.getsockname()[1]
        for command in ("iperf-server", "run-producer"):
            done = site.appctrl(command, port)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_server_that_never_comes_is_said(site: Site, free_port: int) -> None:
    if shutil.which("iperf3"):
        done = site.appctrl("iperf-client", f"127.0.0.1:{free_port}", "--wait-s", 1)
        assert done.returncode == 1
        assert "iperf3:" in done.stderr
    done = site.appctrl("subscribe", f"127.0.0.1:{free_port}", "--timeout-s", 1)
    assert done.returncode == 1
    assert "no message has come" in done.stderr


def test_messages_are_published_and_read(site: Site) -> None:
    producer = begin(site, "run-producer", 0, "--every-s", "0.1")
    try:
        assert producer.stdout is not None
        address = producer.stdout.readline().removeprefix("publishing at ").strip()
        done = site.appctrl("subscribe", address, "--count", 3, "--timeout-s", "20s")
        assert done.returncode == 0, done.stderr
        numbers = [int(line.removeprefix("message ")) for line in done.stdout.splitlines()]
        assert numbers == list(range(numbers[0], numbers[0] + 3))
    finally:
        assert ended(producer) == 130


def test_a_publisher_cannot_steer_the_terminal(site: Site) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.linger = 0
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        reader = begin(site, "subscribe", f"127.0.0.1:{port}", "--count", 1, "--timeout-s", "20s")
        try:
            while reader.poll() is None:
                publisher.send_multipart([b"\x1b]0;title\x07", b"\xff \xc3\xa9"])
                time.sleep(0.05)
            assert reader.stdout is not None
            assert reader.stdout.read() == "\\x1b]0;title\\x07 \\xff é\n"
        finally:
            reader.kill()
            reader.communicate()
    assert reader.returncode == 0
