"""The groups of cells that carry bytes: what is measured in which order, so that what is compared ran side by side."""

from __future__ import annotations

import contextlib
import os
import random
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from subprocess import SubprocessError
from typing import Final, Literal

from network.topology import CommandError
from relay.gateway import RefusedError

from scistream_flows.errors import ScistreamError

from . import processes
from .chains import KINDS, NOBODY, OURS, Chain, Kind, Wish
from .places import LOOPBACK, Place, namespaces
from .results import Bulk, Carried, Connects, Failure, Group, Idle, Latency, Rate, Run, Slow, Way
from .workload import Transfer, Workload, WorkloadError, load_average

SPARE_DESCRIPTORS: Final = 300


def names_of(kinds: Iterable[str], *, without: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in kinds if name not in set(without))


@dataclass(frozen=True)
class Plan:
    """How much of it.

    Attributes:
        elsewhere_kinds: What is measured with one hop and between namespaces.
        seconds: Of one transfer: so long that what 64 connections cost at their ends does not count.
        short_s, short_rounds: Of round trips, and of connections one after the other: shorter than its moods.
        short_sets: How often round trips on one core have new processes: where one lies in memory is some per cent.
        slow_kinds: What has the slow consumer.
        rates_mbits_per_s: For streams with a rate.
        rate_s: Of one transfer of these: longer than a second by what the first half second and some windows take.
        idle: How many connections say nothing.
        users_connections: Active ones, as root and as a user without privileges.
        ways: How the producer's facility is reached.
        openings: Streams opened in each way; `compute` has fewer.
        at_once, cycles, waiting: See results.Many.
    """

    full: bool = False
    kinds: tuple[str, ...] = tuple(KINDS)
    elsewhere_kinds: tuple[str, ...] = tuple(KINDS)
    rounds: int = 3
    seconds: float = 0.5
    short_s: float = 0.2
    short_rounds: int = 6
    short_sets: int = 2
    connections: tuple[int, ...] = (1, 5, 16, 64)
    elsewhere: tuple[int, ...] = (1, 16)
    at_once_connects: int = 32
    idle: tuple[int, ...] = (2000,)
    slow_s: float = 1.2
    slow_kinds: tuple[str, ...] = (*OURS, "haproxy-expert", "haproxy", "nginx")
    users_connections: int = 200
    rates_mbits_per_s: tuple[int, ...] = (10, 100, 1000)
    rate_s: float = 2.2
    rate_rounds: int = 2
    ways: tuple[Way, ...] = ("local", "actions", "compute", "ssh")
    openings: int = 15
    compute_openings: int = 5
    at_once: int = 100
    cycles: int = 50
    waiting: int = 50


QUICK: Final = Plan(
    kinds=tuple(kind.name for kind in KINDS.values() if kind.quick),
    elsewhere_kinds=("direct", *OURS, "haproxy-expert", "haproxy-scistream", "stunnel"),
)
FULL: Final = Plan(
    full=True,
    rounds=5,
    seconds=1.5,
    short_s=0.4,
    short_rounds=30,
    short_sets=6,
    elsewhere=(1, 5, 16, 64),
    idle=(2000, 10_000),
    slow_s=3.0,
    slow_kinds=names_of(KINDS, without=("direct", "socat", "socat-256k", "nginx-256k")),
    rates_mbits_per_s=(10, 100, 1000, 3000, 10_000),
    rate_s=4.0,
    rate_rounds=3,
    openings=50,
    compute_openings=50,
    cycles=1000,
    waiting=1000,
)


# What can be wrong with a cell, with the machine or with a relay; what is wrong with this program is none of it.
FAULTS: Final = (
    AssertionError,
    CommandError,
    OSError,
    RefusedError,
    RuntimeError,
    ScistreamError,
    SubprocessError,
    WorkloadError,
)


def _order_behind(error: BaseException) -> BaseException | None:
    """SystemExit or KeyboardInterrupt, if what went wrong went wrong in the clearing up for it."""
    while error.__context__ is not None:
        error = error.__context__
        if not isinstance(error, Exception):
            return error
    return None


@dataclass
class Bench:
    """A run in the making; `say` is told what is being measured."""

    plan: Plan
    say: Callable[[str], object]
    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @contextlib.contextmanager
    def cell(self, name: str) -> Iterator[None]:
        """One cell: what goes wrong in it is written down, and the run goes on, unless it was told to end."""
        self.say(name)
        try:
            yield
        except FAULTS as error:
            if (order := _order_behind(error)) is not None:
                raise order from None
            self.failures.append(Failure(cell=name, error=f"{type(error).__name__}: {error}"[:600]))
            self.say(f"{name}: {error}")

    def kinds(self, *, hops: int, names: Iterable[str] | None = None) -> list[Kind]:
        """The relays that this plan has and this machine too; `direct` with every length."""
        wanted = set(self.plan.kinds if names is None else names) & set(self.plan.kinds)
        return [
            kind
            for kind in KINDS.values()
            if kind.name in wanted and not kind.missing() and (hops in kind.hops or kind.hops == (0,))
        ]

    def turns(self, kinds: Sequence[Kind], rounds: int) -> Iterator[tuple[int, Kind]]:
        """Every round, every relay in it once, in an order of its own: nobody always has the same one before it."""
        for number in range(rounds):
            for kind in random.Random(number).sample(kinds, len(kinds)):  # noqa: S311 - an order, no secret
                yield number, kind


@contextlib.contextmanager
def standing(bench: Bench, kinds: Sequence[Kind], wish: Wish) -> Iterator[Mapping[str, Chain]]:
    """A chain of each kind while the block runs: those that wait their turn cost nothing."""
    chains: dict[str, Chain] = {}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            with bench.cell(f"start {kind.name}, {wish.hops} hops, {wish.place.name}"):
                chains[kind.name] = stack.enter_context(kind.start(wish))
        yield chains


def bulk(bench: Bench) -> None:
    """All that goes through: two hops and one on loopback, two between namespaces."""
    plan = bench.plan
    _bulk_at(bench, LOOPBACK, 2, plan.connections, bench.kinds(hops=2))
    _bulk_at(bench, LOOPBACK, 1, plan.elsewhere, bench.kinds(hops=1, names=plan.elsewhere_kinds))
    with bench.cell("namespaces"), namespaces() as place:
        # no host forwards: there is no way without relays
        kinds = bench.kinds(hops=2, names=names_of(plan.elsewhere_kinds, without=("direct",)))
        _bulk_at(bench, place, 2, plan.elsewhere, kinds)


def _bulk_at(bench: Bench, place: Place, hops: int, counts: Sequence[int], kinds: Sequence[Kind]) -> None:
    with _workload(place) as load, standing(bench, kinds, Wish(place, load.target, hops=hops)) as chains:
        for connections in counts:
            for number, kind in bench.turns(kinds, bench.plan.rounds):
                if kind.name not in chains:
                    continue
                name = f"bulk {kind.name}, {hops} hops, {place.name}, {connections} connections"
                with bench.cell(name):
                    frame = Carried(
                        relay=kind.name,
                        hops=hops,
                        network=place.name,
                        connections=connections,
                        round=number,
                        load_average=load_average(),
                    )
                    done = load.transfer(chains[kind.name], connections, duration_s=bench.plan.seconds)
                    bench.runs.append(_as_bulk(frame, done))


def _as_bulk(frame: Carried, done: Transfer, group: Literal["bulk", "unprivileged"] = "bulk") -> Bulk:
    return Bulk(
        **frame.model_dump(),
        group=group,
        bytes=done.bytes,
        seconds=done.seconds,
        bits_per_s=done.bits_per_s,
        relay_cpu_s_per_gb=done.relay_cpu_s / done.gb,
        load_cpu_s_per_gb=done.load_cpu_s / done.gb,
        samples=done.samples,
        rss_bytes=done.rss_bytes,
    )


@contextlib.contextmanager
def _workload(place: Place) -> Iterator[Workload]:
    load = Workload(place)
    try:
        yield load
    finally:
        load.close()


def _two_hops(
    bench: Bench,
    kinds: Sequence[Kind],
    title: str,
    connections: int,
    measure: Callable[[Workload, Chain, Carried], Run],
    *,
    rounds: int,
    first_round: int = 0,
) -> None:
    """A group on loopback, over chains that stand all the time."""
    with _workload(LOOPBACK) as load, standing(bench, kinds, Wish(LOOPBACK, load.target)) as chains:
        for number, kind in bench.turns(kinds, rounds):
            if kind.name in chains:
                with bench.cell(f"{title} {kind.name}"):
                    frame = Carried(
                        relay=kind.name,
                        hops=2,
                        connections=connections,
                        round=first_round + number,
                        load_average=load_average(),
                    )
                    bench.runs.append(measure(load, chains[kind.name], frame))


def latency(bench: Bench) -> None:
    """Round trips of 64 bytes: all processes on one core, and where the scheduler has them."""
    plan, kinds = bench.plan, bench.kinds(hops=2)

    def on(cores: Literal["one", "all"]) -> Callable[[Workload, Chain, Carried], Run]:
        def measure(load: Workload, chain: Chain, frame: Carried) -> Run:
            trips = load.round_trips(chain, duration_s=plan.short_s)
            return Latency(**frame.model_dump(), cores=cores, **trips)

        return measure

    rounds = max(1, plan.short_rounds // plan.short_sets)
    with processes.on_one_core():
        for number in range(plan.short_sets):
            title = "latency on one core"
            _two_hops(bench, kinds, title, 1, on("one"), rounds=rounds, first_round=number * rounds)
    _two_hops(bench, kinds, "latency", 1, on("all"), rounds=max(1, plan.short_rounds // 3))


def connects(bench: Bench) -> None:
    """Connections per second."""
    at_once = bench.plan.at_once_connects

    def measure(load: Workload, chain: Chain, frame: Carried) -> Run:
        return Connects(**frame.model_dump(), **load.connects(chain, at_once, duration_s=bench.plan.short_s))

    _two_hops(bench, bench.kinds(hops=2), "connects", at_once, measure, rounds=bench.plan.short_rounds)


def slow(bench: Bench) -> None:
    """A consumer that hardly reads."""

    def measure(load: Workload, chain: Chain, frame: Carried) -> Run:
        done = load.transfer(chain, 16, duration_s=bench.plan.slow_s, slow_s=bench.plan.slow_s)
        later = done.rss_while_slow[len(done.rss_while_slow) // 3 :]
        return Slow(
            **frame.model_dump(),
            bytes=done.bytes,
            rss_before_bytes=done.rss_before_bytes,
            rss_early_bytes=later[0],
            rss_bytes=max(later),
        )

    kinds = [kind for kind in bench.kinds(hops=2, names=bench.plan.slow_kinds) if kind.name != "direct"]
    _two_hops(bench, kinds, "slow consumer", 16, measure, rounds=1)


def idle(bench: Bench) -> None:
    """Thousands of connections that say nothing; each relay has them alone, and is new."""
    kinds = [one for one in bench.kinds(hops=2) if one.idle and one.name != "direct"]
    for wanted in bench.plan.idle:
        count = min(wanted, most_connections())
        for kind in kinds:
            with bench.cell(f"idle {kind.name}, {count} connections"), _workload(LOOPBACK) as load:
                wish = Wish(LOOPBACK, load.target, connections=count + 8)
                with kind.start(wish) as chain:
                    bench.runs.append(_idle(load, chain, kind.name, count))


def _idle(load: Workload, chain: Chain, name: str, count: int) -> Idle:
    family = chain.family()
    before, had, average = processes.rss_bytes(family), processes.descriptors(family), load_average()
    with load.holding(chain, count) as seconds:
        family = chain.family()
        descriptors = processes.descriptors(family) - had
        rss = processes.rss_bytes(family)
    return Idle(
        relay=name,
        hops=2,
        connections=count,
        round=0,
        load_average=average,
        descriptors=descriptors / 2 / count,
        rss_bytes=rss,
        rss_before_bytes=before,
        seconds=seconds,
    )


def most_connections() -> int:
    """How many every relay holds within the descriptors that a process may have here.

    Two descriptors each; HAProxy sets half a one more aside for its pipes, and lets the others wait.
    """
    return (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS) * 2 // 5


def unprivileged(bench: Bench) -> None:
    """Many active connections, as root and as a user whose pipes are limited."""
    if os.geteuid() != 0:
        bench.failures.append(Failure(cell="unprivileged", error="only root can be somebody else"))
        return
    users = {"none, as root": None, "none, unprivileged": NOBODY}
    count = bench.plan.users_connections
    with _workload(LOOPBACK) as load, contextlib.ExitStack() as stack:
        start = KINDS["none"].start
        chains = {
            name: stack.enter_context(start(Wish(LOOPBACK, load.target, connections=count + 8, user=user)))
            for name, user in users.items()
        }
        for number in range(bench.plan.rounds):
            for name, chain in chains.items() if number % 2 else reversed(chains.items()):
                with bench.cell(f"unprivileged {name}"):
                    frame = Carried(
                        relay=name, hops=2, connections=count, round=number, load_average=load_average()
                    )
                    done = load.transfer(chain, count, duration_s=bench.plan.seconds)
                    bench.runs.append(_as_bulk(frame, done, "unprivileged"))


def rate(bench: Bench) -> None:
    """Streams with a rate: how well it is kept, what it costs beside the producer's own pacing, and who gets it."""
    plan = bench.plan
    with _workload(LOOPBACK) as load:
        for mode in OURS if plan.full else ("none",):
            for asked in plan.rates_mbits_per_s:
                for by, number, connections in (
                    *((by, number, 1) for number in range(plan.rate_rounds) for by in ("relay", "producer")),
                    ("relay", 0, 8),
                ):
                    with bench.cell(f"rate {asked} Mbit/s by {by}, {mode}, {connections} connections"):
                        bench.runs.append(_rate(load, mode, asked, by, number, connections, plan.rate_s))


def _rate(
    load: Workload, mode: str, asked: int, by: str, number: int, connections: int, duration_s: float
) -> Rate:
    """One stream, held to `asked` Mbit/s by the relay or by its producer; all of its connections but one are idle."""
    limit = asked if by == "relay" else 0
    with KINDS[mode].start(Wish(LOOPBACK, load.target, rate_mbits_per_s=limit)) as chain:
        average = load_average()
        done = load.transfer(
            chain,
            connections,
            duration_s=duration_s,
            idle=connections - 1,
            timeline=True,
            pacing_bits_per_s=0 if limit else asked * 1e6,
            # What it sends goes into buffers of megabytes at once, and at 10 Mbit/s they take long to empty.
            most_bytes=int(asked * 1e6 / 8 * duration_s),
        )
    return Rate(
        relay=mode,
        hops=2,
        connections=connections,
        round=number,
        load_average=average,
        asked_bits_per_s=asked * 1_000_000,
        by="relay" if limit else "producer",
        bits_per_s=done.settled_bits_per_s,
        off=done.off(asked * 1e6),
        idle=connections - 1,
        relay_cpu_s_per_gb=done.relay_cpu_s / done.gb,
    )


CARRYING: Mapping[Group, Callable[[Bench], None]] = {
    "bulk": bulk,
    "latency": latency,
    "connects": connects,
    "idle": idle,
    "slow": slow,
    "unprivileged": unprivileged,
    "rate": rate,
}
