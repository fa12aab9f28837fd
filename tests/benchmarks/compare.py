"""What the runs say: medians over the rounds, ratios within a round, and how far from the goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from .chains import KINDS
from .results import Bulk, Carried, Connects, Idle, Latency, Many, Opening, Rate, Results, Slow

R = TypeVar("R", bound=Carried)
CLEAR_PEERS: Final = (
    "haproxy-expert",
    "haproxy-scistream",
    "haproxy",
    "nginx",
    "nginx-256k",
    "socat",
    "socat-256k",
)
TLS_PEERS: Final = ("stunnel", "stunnel-null", "haproxy-tls")
PEERS: Final = (*CLEAR_PEERS, *TLS_PEERS)
FLAT_BYTES: Final = 2_000_000


def of(results: Results, kind: type[R]) -> list[R]:
    """The runs of one kind."""
    return [run for run in results.runs if isinstance(run, kind)]


def bulk(results: Results) -> list[Bulk]:
    """All that goes through, users apart."""
    return [run for run in of(results, Bulk) if run.group == "bulk"]


def two_hops(results: Results, connections: int) -> list[Bulk]:
    """Those on loopback, with so many connections, which the goals are about."""
    place = (2, "loopback", connections)
    return [run for run in bulk(results) if run.place == place]


def relays(runs: Iterable[Carried]) -> list[str]:
    """In the order of KINDS, whatever order they ran in; behind them what has a name of its own."""
    found = dict.fromkeys(run.relay for run in runs)
    return [*(name for name in KINDS if name in found), *(name for name in found if name not in KINDS)]


@dataclass(frozen=True)
class Spread:
    """A median and the least and the most."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of nothing."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


def spread(runs: Sequence[R], relay: str, figure: Callable[[R], float]) -> Spread | None:
    """A figure of a relay over the rounds."""
    return Spread.of([figure(run) for run in runs if run.relay == relay])


def ratio(runs: Sequence[R], ours: str, peer: str, figure: Callable[[R], float]) -> Spread | None:
    """Ours against a peer in the same place: one ratio for each round in which both have run."""
    theirs = {(run.place, run.round): figure(run) for run in runs if run.relay == peer}
    pairs = [
        (figure(run), theirs[run.place, run.round])
        for run in runs
        if run.relay == ours and (run.place, run.round) in theirs
    ]
    return Spread.of([one / other for one, other in pairs if other])


@dataclass(frozen=True)
class Verdict:
    """A goal, and what was measured.

    Attributes:
        what: The figure.
        of: Whose, and where.
        measured: The median; None where it was not measured.
        must: The limit that has to be kept, as the project's plan has it; None where there is none.
        prize: The limit beyond it.
        at_least: Whether more is better.
    """

    what: str
    of: str
    measured: Spread | None
    must: float | None
    prize: float
    at_least: bool = False

    def keeps(self, limit: float | None) -> bool | None:
        """Whether a limit is kept; None where that cannot be said."""
        if self.measured is None or limit is None:
            return None
        return self.measured.median >= limit if self.at_least else self.measured.median <= limit


def verdicts(results: Results) -> list[Verdict]:
    """Every goal of which something was measured."""
    found = [
        *_bulk(results),
        *_latency(results),
        *_connects(results),
        *_idle(results),
        *_slow(results),
        *_unprivileged(results),
        *_rate(results),
        *_opening(results),
        *_many(results),
    ]
    return [one for one in found if one.measured is not None]


CPU_EXPERT: Final[dict[int, float | None]] = {1: 1.0, 5: None, 16: 0.85, 64: 0.9}


def _bulk(results: Results) -> Iterable[Verdict]:
    for connections in (1, 5, 16, 64):
        runs = two_hops(results, connections)
        limits: list[tuple[str, tuple[str, ...], float | None, float, float | None, float]] = [
            ("haproxy-expert", ("none", "auth"), CPU_EXPERT[connections], 0.8, 1.0, 1.1),
            ("haproxy-scistream", ("none", "auth"), 0.45, 0.45, 1.25, 1.3),
            ("haproxy", ("none", "auth"), 0.27, 0.25, 2.0, 2.1),
            ("stunnel", ("tls",), 0.5, 0.4, 2.0, 2.5),
            ("haproxy-tls", ("tls",), None, 1.0, None, 1.0),
        ]
        for peer, modes, cpu_must, cpu_prize, through_must, through_prize in limits:
            for mode in modes:
                who = f"{mode} / {peer}, {connections} conn."
                cost = ratio(runs, mode, peer, lambda run: run.relay_cpu_s_per_gb)
                through = ratio(runs, mode, peer, lambda run: run.bits_per_s)
                yield Verdict("CPU s/GB", who, cost, cpu_must, cpu_prize)
                yield Verdict("throughput", who, through, through_must, through_prize, at_least=True)


def _worst(
    runs: Sequence[R], mode: str, peers: Sequence[str], figure: Callable[[R], float], *, most: bool
) -> Spread | None:
    """Against the peer that is hardest to beat."""
    found = [one for peer in peers if (one := ratio(runs, mode, peer, figure)) is not None]
    return (max if most else min)(found, key=lambda one: one.median, default=None)


def _peers_of(mode: str) -> tuple[str, ...]:
    return ("stunnel", "haproxy-tls") if mode == "tls" else CLEAR_PEERS


def round_trips(results: Results, cores: Literal["one", "all"]) -> list[Latency]:
    """Those that had so many."""
    return [run for run in of(results, Latency) if run.cores == cores]


def _latency(results: Results) -> Iterable[Verdict]:
    # On several cores it depends on where the scheduler has the four processes, more than on what they do.
    runs = round_trips(results, "one")
    for mode in ("none", "auth", "tls"):
        for name, figure in (
            ("round trip p50", lambda run: run.p50_us),
            ("round trip p99", lambda run: run.p99_us),
        ):
            worst = _worst(runs, mode, _peers_of(mode), figure, most=True)
            yield Verdict(name, f"{mode} / best peer, one core", worst, 1.0, 1.0)


def _connects(results: Results) -> Iterable[Verdict]:
    runs = of(results, Connects)
    best = _worst(runs, "none", CLEAR_PEERS, lambda run: run.per_s, most=False)
    yield Verdict("connections per second", "none / best peer", best, 1.0, 1.0, at_least=True)
    for mode in ("auth", "tls"):  # both shake hands for each connection
        found = ratio(runs, mode, "stunnel", lambda run: run.per_s)
        yield Verdict("connections per second", f"{mode} / stunnel", found, 3.0, 3.0, at_least=True)


def _idle(results: Results) -> Iterable[Verdict]:
    runs = of(results, Idle)
    for connections in sorted({run.connections for run in runs}):
        same = [run for run in runs if run.connections == connections]
        for mode in ("none", "auth", "tls"):
            who = f"{mode}, {connections} idle"
            each = spread(same, mode, lambda run: run.descriptors)
            yield Verdict("descriptors per connection", who, each, 2.1, 2.1)
            for peer in ("haproxy", *(("haproxy-tls",) if mode == "tls" else ())):
                rss = ratio(same, mode, peer, lambda run: float(run.rss_bytes))
                yield Verdict("RSS", f"{who} / {peer}", rss, 0.5, 0.5)


def _slow(results: Results) -> Iterable[Verdict]:
    runs = of(results, Slow)
    for mode in ("none", "auth", "tls"):
        grown = spread(runs, mode, lambda run: (run.rss_bytes - run.rss_early_bytes) / 1e6)
        yield Verdict("RSS gained, slow consumer, MB", mode, grown, FLAT_BYTES / 1e6, FLAT_BYTES / 1e6)


def _unprivileged(results: Results) -> Iterable[Verdict]:
    runs = [run for run in of(results, Bulk) if run.group == "unprivileged"]
    found = ratio(runs, "none, unprivileged", "none, as root", lambda run: run.bits_per_s)
    yield Verdict("throughput", "unprivileged / root, 200 conn.", found, 0.95, 0.95, at_least=True)


MOST_PACED: Final = 0.9


def _is_within_reach(results: Results, mode: str, asked_bits_per_s: float) -> bool:
    """Whether the machine has room for this rate, by what it has carried without one; yes if that is not known."""
    carried = spread(two_hops(results, 1), mode, lambda run: run.bits_per_s)
    return carried is None or asked_bits_per_s <= MOST_PACED * carried.median


def _rate(results: Results) -> Iterable[Verdict]:
    runs = of(results, Rate)
    for asked, mode in sorted({(run.asked_bits_per_s, run.relay) for run in runs}):
        if not _is_within_reach(results, mode, asked):
            continue
        same = [run for run in runs if run.asked_bits_per_s == asked and run.relay == mode]
        paced = [run for run in same if run.by == "relay" and not run.idle]
        who = f"{mode}, {asked / 1e6:g} Mbit/s"
        yield Verdict("rate, worst second off by", who, Spread.of([run.off for run in paced]), 0.05, 0.05)
        active = Spread.of([run.bits_per_s / asked for run in same if run.idle])
        yield Verdict("rate, share of 1 active of 8", who, active, 0.95, 0.95, at_least=True)
        if asked >= 1e9:
            by_producer = {run.round: run.relay_cpu_s_per_gb for run in same if run.by == "producer"}
            extra = [
                run.relay_cpu_s_per_gb / by_producer[run.round] for run in paced if by_producer.get(run.round)
            ]
            yield Verdict("rate, CPU s/GB / the producer's own pacing", who, Spread.of(extra), 1.1, 1.1)


READY_S: Final = {"local": 0.1, "actions": 0.3, "compute": 1.2, "ssh": 1.0}


def _opening(results: Results) -> Iterable[Verdict]:
    for way, goal_s in READY_S.items():
        times = [run.steps_s["ready"] for run in results.runs if isinstance(run, Opening) and run.way == way]
        yield Verdict("s from open_stream to READY", way, Spread.of(times), goal_s, goal_s)


def _many(results: Results) -> Iterable[Verdict]:
    for run in results.runs:
        if isinstance(run, Many):
            left = Spread.of([float(max(run.left.values()))])
            yield Verdict("left behind", f"{run.count} {run.what}", left, 0, 0)
            if run.what != "at-once":
                slower = Spread.of([run.last_s / run.first_s])
                yield Verdict("time until READY, last / first", f"{run.count} {run.what}", slower, 1.25, 1.1)
