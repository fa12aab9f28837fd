"""`make bench` measures what it says: a tiny cell of each kind, over real relays; goals and report from them."""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks import arithmetic, machine
from benchmarks.chains import Chain, Wish, peer
from benchmarks.compare import ratio, verdicts
from benchmarks.control import CONTROL
from benchmarks.groups import CARRYING, QUICK, Bench
from benchmarks.places import LOOPBACK, Spot
from benchmarks.plots import draw
from benchmarks.report import BLOCK, DOCUMENT, filled
from benchmarks.results import GROUPS, Bulk, Failure, Group, Rate, Results, Run
from benchmarks.tables import tables
from benchmarks.workload import Workload, WorkloadError
from relay.apps import Applications
from relay.gateway import eventually

TINY = replace(
    QUICK,
    kinds=("direct", "none", "tls", "haproxy-expert"),
    elsewhere_kinds=("none", "haproxy-expert"),
    rounds=1,
    seconds=0.05,
    short_s=0.05,
    short_rounds=1,
    connections=(2,),
    elsewhere=(1,),
    at_once_connects=4,
    idle=(20,),
    slow_s=0.5,
    users_connections=4,
    rates_mbits_per_s=(1000,),
    rate_s=1.8,
    openings=2,
    compute_openings=1,
    at_once=3,
    cycles=3,
    waiting=3,
)
MEASURE = {**CARRYING, **CONTROL}
# This one starts an sshd and a Globus Compute endpoint; its way that needs nothing but relays has a test of its own.
LONG: tuple[Group, ...] = ("opening",)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """After the test there is no process that was not there before, and no thread."""
    ours = psutil.Process()
    before = {child.pid for child in ours.children(recursive=True)}
    threads = threading.active_count()
    yield
    assert [one for one in ours.children(recursive=True) if one.pid not in before] == []
    assert threading.active_count() <= threads


def results_of(runs: list[Run], failures: list[Failure]) -> Results:
    return Results(
        began="2026-01-01T00:00:00+00:00",
        seconds=1,
        full=False,
        groups=GROUPS,
        machine=machine.look(),
        runs=tuple(runs),
        failures=tuple(failures),
    )


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("group", [group for group in GROUPS if group not in LONG])
def test_a_tiny_cell_of_each_group_has_figures_that_make_a_report(group: Group, tmp_path: Path) -> None:
    bench = Bench(TINY, say=lambda _: None)
    MEASURE[group](bench)
    allowed = {"unprivileged", "namespaces"} if os.geteuid() else set()
    assert [one for one in bench.failures if one.cell not in allowed] == []
    written = results_of(bench.runs, bench.failures).model_dump_json()
    results = Results.model_validate_json(written)
    assert {run.group for run in results.runs} == {group}
    assert tables(results)
    assert all(verdict.measured for verdict in verdicts(results))
    assert f"| {tables(results)[-1].rows[0][0]} |" in filled(DOCUMENT.read_text(), results)
    assert all(picture.stat().st_size for picture in draw(results, tmp_path))


def living_relays() -> set[int]:
    return {
        one.pid
        for one in psutil.process_iter(["name", "status"])
        if one.info["name"] == "s2ds" and one.info["status"] != psutil.STATUS_ZOMBIE
    }


@pytest.mark.usefixtures("nothing_left")
def test_a_benchmark_that_is_told_to_end_takes_its_relays_along(tmp_path: Path) -> None:
    before = living_relays()
    argv = [sys.executable, "-m", "benchmarks", "--only", "latency", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: len(living_relays() - before) >= 2)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert living_relays() <= before


def test_an_order_to_end_outlives_a_relay_that_cannot_be_cleared_away(tmp_path: Path) -> None:
    bench = Bench(TINY, say=lambda _: None)

    def is_told_to_end() -> None:
        with bench.cell("cell"), contextlib.ExitStack() as relay:
            relay.callback(os.stat, tmp_path / "gone")
            sys.exit(128 + signal.SIGTERM)

    with pytest.raises(SystemExit):
        is_told_to_end()
    assert bench.failures == []


@pytest.mark.usefixtures("nothing_left", "state_base")
def test_a_stream_is_timed_from_open_stream_to_ready() -> None:
    bench = Bench(replace(TINY, ways=("local",)), say=lambda _: None)
    CONTROL["opening"](bench)
    assert bench.failures == []
    (run, *_) = bench.runs
    assert list(run.model_dump()["steps_s"]) == ["request-prod", "request-cons", "connect", "probe", "ready"]


@pytest.fixture
def load() -> Iterator[Workload]:
    load = Workload(LOOPBACK)
    yield load
    load.close()


@pytest.fixture
def between(load: Workload) -> Iterator[Callable[[Callable[[bytes], bytes]], Chain]]:
    """A function that puts something between the applications that changes what it forwards to the consumer."""
    apps = Applications()

    def start(change: Callable[[bytes], bytes]) -> Chain:
        server = apps.listen()

        def pump(source: Any, destination: Any, what: Callable[[bytes], bytes]) -> None:
            while piece := source.recv(1 << 16):
                destination.sendall(what(piece))
            destination.shutdown(1)

        def serve() -> None:
            near = apps.accept(server)
            far = apps.dial(load.target)
            apps.task(lambda: pump(near, far, lambda piece: piece))
            pump(far, near, change)

        apps.task(serve)
        return Chain(server.getsockname())

    yield start
    apps.close()


def test_what_arrives_is_what_was_sent(
    load: Workload, between: Callable[[Callable[[bytes], bytes]], Chain]
) -> None:
    done = load.transfer(between(lambda piece: piece), 1, duration_s=0.05)
    assert done.samples >= 1
    assert done.bytes > 1 << 16


@pytest.mark.parametrize("fault", ["a byte changed", "a byte lost", "bytes exchanged"])
def test_a_relay_that_spoils_bytes_has_no_figures(
    load: Workload, between: Callable[[Callable[[bytes], bytes]], Chain], fault: str
) -> None:
    def spoil(piece: bytes) -> bytes:
        if len(piece) < 1000:  # the answer before the payload
            return piece
        changed = {
            "a byte changed": piece[:9] + bytes([piece[9] ^ 1]) + piece[10:],
            "a byte lost": piece[:-1],
            "bytes exchanged": piece[100:200] + piece[:100] + piece[200:],
        }
        return changed[fault]

    with pytest.raises(WorkloadError, match="received"):
        load.transfer(between(spoil), 1, duration_s=0.05)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("taken", "error"), [(True, "somebody listens at"), (False, "false does not listen")]
)
def test_a_peer_that_does_not_start_is_a_failed_cell_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, *, taken: bool, error: str
) -> None:
    bench = Bench(TINY, say=lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        if taken:
            monkeypatch.setattr(Spot, "free_address", lambda _: server.getsockname())
        with bench.cell("start"), peer(lambda _: ["false"])(Wish(LOOPBACK, ("127.0.0.1", 9))):
            pass
    assert [(one.cell, error in one.error) for one in bench.failures] == [("start", True)]


def carried(relay: str, number: int = 0, *, cost: float = 1, bits_per_s: float = 8) -> Bulk:
    return Bulk(
        relay=relay,
        hops=2,
        connections=1,
        round=number,
        load_average=0,
        bytes=1,
        seconds=1,
        bits_per_s=bits_per_s,
        relay_cpu_s_per_gb=cost,
        load_cpu_s_per_gb=0,
        samples=1,
        rss_bytes=0,
    )


def test_ratios_are_taken_within_a_round() -> None:
    runs = [
        carried("none", 0, cost=1),
        carried("haproxy", 0, cost=2),
        carried("none", 1, cost=30),
        carried("haproxy", 1, cost=60),
        carried("none", 2, cost=9),
    ]
    found = ratio(runs, "none", "haproxy", lambda one: one.relay_cpu_s_per_gb)
    assert found is not None
    assert (found.median, found.least, found.most, found.count) == (0.5, 0.5, 0.5, 2)


def test_a_rate_that_the_machine_has_no_room_for_is_no_goal() -> None:
    def paced(asked_bits_per_s: int) -> Rate:
        return Rate(
            relay="tls",
            hops=2,
            connections=1,
            round=0,
            load_average=0,
            asked_bits_per_s=asked_bits_per_s,
            by="relay",
            bits_per_s=asked_bits_per_s,
            off=0.01,
            idle=0,
            relay_cpu_s_per_gb=1,
        )

    def judged(*others: Run) -> set[str]:
        found = verdicts(results_of([paced(9_000_000_000), paced(10_000_000_000), *others], []))
        return {verdict.of for verdict in found if verdict.what.startswith("rate")}

    assert judged(carried("tls", bits_per_s=10.5e9)) == {"tls, 9000 Mbit/s"}
    assert judged() == {"tls, 9000 Mbit/s", "tls, 10000 Mbit/s"}


def test_the_arithmetic_is_computed() -> None:
    done = doctest.testmod(arithmetic)
    assert done.attempted > 8
    assert done.failed == 0


def test_the_report_has_one_place_for_every_table() -> None:
    marks = [mark for _, mark, _ in BLOCK.findall(DOCUMENT.read_text())]
    assert len(marks) == len(set(marks)) > 10
    assert DOCUMENT.read_text().count("<!-- bench:") == len(marks)


def test_the_report_refuses_a_table_without_a_place() -> None:
    with pytest.raises(ValueError, match="no place for"):
        filled(re.sub(r"<!-- bench: machine -->", "", DOCUMENT.read_text()), results_of([], []))


def test_the_schema_of_the_results_is_the_one_that_readers_know() -> None:
    schema = json.loads((Path(__file__).parent / "benchmarks" / "results.schema.json").read_text())
    assert schema == Results.model_json_schema()
