"""A run as tables: for the terminal and for docs/performance.md, the same ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import rich.table
from rich.console import Console

from .compare import (
    PEERS,
    Spread,
    Verdict,
    bulk,
    of,
    ratio,
    relays,
    round_trips,
    spread,
    verdicts,
)
from .results import Bulk, Carried, Connects, Idle, Many, Opening, Rate, Results, Slow

NOTHING: Final = "-"
GOALS: Final = ("figure", "of", "measured", "must", "kept", "goal", "reached")


@dataclass(frozen=True)
class Table:
    """Cells that are ready to be shown; the first column names the row."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Results) -> list[Table]:
    """Every table of which there is something to say."""
    found = [
        _machine(results),
        _goals(results),
        _behind(results),
        *_bulk(results),
        *_ratios(results),
        _limits(results),
        _latency(results),
        _idle(results),
        _slow(results),
        _unprivileged(results),
        _rate(results),
        _opening(results),
        _many(results),
    ]
    return [table for table in found if table.rows]


def show(results: Results, console: Console) -> None:
    """The tables on a terminal."""
    for table in tables(results):
        shown = rich.table.Table(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(table: Table) -> str:
    """The same for a document."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def median(found: Spread | None, scale: float = 1) -> str:
    return NOTHING if found is None else number(found.median * scale)


def with_spread(found: Spread | None) -> str:
    """The median, and in brackets the least and the most of the rounds."""
    if found is None:
        return NOTHING
    least, most = number(found.least), number(found.most)
    return number(found.median) + (f" ({least} to {most})" if found.count > 1 else "")


# --- one by one ------------------------------------------------------------------------------------------------------


def _machine(results: Results) -> Table:
    machine = results.machine
    loads = [run.load_average for run in results.runs if isinstance(run, Carried)]
    rows = [
        ["kernel", machine.kernel],
        ["processor", f"{machine.cores} cores, {machine.cpu}"],
        ["memory", f"{machine.memory_bytes / 2**30:.1f} GiB"],
        ["congestion control", machine.congestion_control],
        *[[name, value] for name, value in machine.sysctls.items()],
        ["versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())],
        ["run", f"{results.began}, {'full' if results.full else 'quick'}, {results.seconds:.0f} s"],
        ["load average at the start", f"{machine.load_average[0]:g}"],
    ]
    if results.limits:
        rows.append(
            ["a copy out of the cache", f"{number(results.limits.copy_bytes_per_s / 1e9)} GB per CPU second"]
        )
    if loads:
        shown = f"{min(loads):g} to {max(loads):g}, median {statistics.median(loads):g}"
        rows.append(["load average while it ran, its own load included", shown])
    if results.missing:
        rows.append(["not installed, left out", ", ".join(results.missing)])
    if results.failures:
        rows.append(["cells that failed", str(len(results.failures))])
    return Table("machine", "The machine", ["what", "value"], rows)


def _goals(results: Results) -> Table:
    return Table("goals", "Goals", GOALS, _judged(verdicts(results)))


def _behind(results: Results) -> Table:
    behind = [
        one for one in verdicts(results) if one.keeps(one.must) is False or one.keeps(one.prize) is False
    ]
    return Table("behind", "Where we are behind", GOALS, _judged(behind))


def _judged(found: Iterable[Verdict]) -> list[list[str]]:
    words = {True: "yes", False: "behind", None: NOTHING}
    rows = []
    for one in found:
        sign = ">=" if one.at_least else "<="
        rows.append(
            [
                one.what,
                one.of,
                with_spread(one.measured),
                NOTHING if one.must is None else f"{sign} {one.must:g}",
                words[one.keeps(one.must)],
                f"{sign} {one.prize:g}",
                words[one.keeps(one.prize)],
            ]
        )
    return rows


def _bulk(results: Results) -> Iterable[Table]:
    everything = bulk(results)
    places = {(run.hops, run.network) for run in everything}
    for hops, network in sorted(places, key=lambda place: (-place[0], place[1])):
        runs = [run for run in everything if (run.hops, run.network) == (hops, network)]
        counts = sorted({run.connections for run in runs})
        columns = ["relay"]
        for count in counts:
            columns += [f"{count}: Gbit/s", f"{count}: CPU s/GB"]
        rows = []
        for relay in relays(runs):
            row = [relay]
            for count in counts:
                same = [run for run in runs if run.connections == count]
                row += [median(spread(same, relay, lambda run: run.bits_per_s), 1e-9)]
                cost = spread(same, relay, lambda run: run.relay_cpu_s_per_gb)
                row += [NOTHING if relay == "direct" else median(cost)]
            most = max((run.rss_bytes for run in runs if run.relay == relay), default=0)
            rows.append([*row, NOTHING if relay == "direct" else number(most / 1e6)])
        title = f"Bulk, {hops} hop{'s' if hops > 1 else ''}, {network}; by connections; RSS of the relays"
        yield Table(f"bulk-{hops}-{network}", title, [*columns, "MB"], rows)


def _ratios(results: Results) -> Iterable[Table]:
    figures: tuple[tuple[str, str, Callable[[Bulk], float]], ...] = (
        ("cpu", "CPU s/GB", lambda run: run.relay_cpu_s_per_gb),
        ("throughput", "throughput", lambda run: run.bits_per_s),
    )
    runs = [run for run in bulk(results) if (run.hops, run.network) == (2, "loopback")]
    counts = sorted({run.connections for run in runs})
    for name, title, figure in figures:
        rows = []
        for ours in ("none", "auth", "tls"):
            for peer in PEERS:
                found = [
                    ratio([run for run in runs if run.connections == count], ours, peer, figure)
                    for count in counts
                ]
                if any(found):
                    rows.append([f"{ours} / {peer}", *map(with_spread, found)])
        columns = ["ours / peer", *[f"{count} conn." for count in counts]]
        yield Table(f"ratio-{name}", f"Ratio of {title} within a round, two hops, loopback", columns, rows)


def _limits(results: Results) -> Table:
    """`tls` beside the sum of what it cannot do without: the way of `none`, the cipher twice, four copies."""
    rows = []
    limits = results.limits
    runs = [run for run in bulk(results) if (run.hops, run.network) == (2, "loopback")]
    for count in sorted({run.connections for run in runs}):
        same = [run for run in runs if run.connections == count]
        plain, tls = (spread(same, mode, lambda run: run.relay_cpu_s_per_gb) for mode in ("none", "tls"))
        if limits and plain and tls:
            cipher, copies = 2e9 / limits.cipher_bytes_per_s, 4e9 / limits.copy_bytes_per_s
            least = plain.median + cipher + copies
            figures = (plain.median, cipher, copies, least, tls.median)
            rows.append([str(count), *map(number, figures), f"{least / tls.median:.0%}"])
    columns = ["connections", "`none`", f"{limits.cipher if limits else ''} twice", "four copies"]
    return Table(
        "limits", "What `tls` could cost at least, CPU s/GB", [*columns, "sum", "`tls`", "share"], rows
    )


def _latency(results: Results) -> Table:
    one, every = round_trips(results, "one"), round_trips(results, "all")
    connections = of(results, Connects)
    rows = []
    for relay in relays([*one, *every, *connections]):
        trip_cpu = spread(one, relay, lambda run: run.relay_cpu_us)
        connection_cpu = spread(connections, relay, lambda run: run.relay_cpu_us)
        rows.append(
            [
                relay,
                median(spread(one, relay, lambda run: run.p50_us)),
                median(spread(one, relay, lambda run: run.p99_us)),
                NOTHING if relay == "direct" else median(trip_cpu),
                median(spread(every, relay, lambda run: run.p50_us)),
                median(spread(every, relay, lambda run: run.p99_us)),
                median(spread(connections, relay, lambda run: run.per_s)),
                NOTHING if relay == "direct" else median(connection_cpu),
            ]
        )
    columns = [
        *("relay", "one core: p50 us", "p99 us", "its CPU us", "all cores: p50 us", "p99 us"),
        *("connections per s", "CPU us for one"),
    ]
    return Table("latency", "64 bytes there and back; connect, one byte back, close; two hops", columns, rows)


def _idle(results: Results) -> Table:
    rows = [
        [
            run.relay,
            str(run.connections),
            number(run.descriptors),
            number(run.rss_before_bytes / 1e6),
            number(run.rss_bytes / 1e6),
            number(run.seconds),
        ]
        for run in of(results, Idle)
    ]
    columns = [
        "relay",
        "idle connections",
        "descriptors each",
        "MB before",
        "MB of both relays",
        "s to connect",
    ]
    return Table("idle", "Connections that say nothing, two hops", columns, rows)


def _slow(results: Results) -> Table:
    rows = [
        [
            run.relay,
            number(run.bytes / 1e6),
            *(number(one / 1e6) for one in (run.rss_before_bytes, run.rss_early_bytes, run.rss_bytes)),
        ]
        for run in of(results, Slow)
    ]
    columns = ["relay", "MB carried", "MB of both relays before", "after a third", "at most from then on"]
    return Table("slow", "16 connections to a consumer that hardly reads", columns, rows)


def _unprivileged(results: Results) -> Table:
    runs = [run for run in of(results, Bulk) if run.group == "unprivileged"]
    rows = [
        [
            relay,
            with_spread(spread(runs, relay, lambda run: run.bits_per_s / 1e9)),
            with_spread(spread(runs, relay, lambda run: run.relay_cpu_s_per_gb)),
        ]
        for relay in relays(runs)
    ]
    return Table("unprivileged", "200 active connections, two hops", ["relay", "Gbit/s", "CPU s/GB"], rows)


def _rate(results: Results) -> Table:
    runs = of(results, Rate)
    rows = []
    for key in dict.fromkeys((run.asked_bits_per_s, run.relay, run.by, run.idle) for run in runs):
        asked, relay, by, idle = key
        same = [run for run in runs if (run.asked_bits_per_s, run.relay, run.by, run.idle) == key]

        def middle(figure: Callable[[Rate], float], same: list[Rate] = same) -> str:
            return median(Spread.of([figure(run) for run in same]))

        rows.append(
            [
                f"{relay}, {asked / 1e6:g} Mbit/s",
                by,
                f"{idle} of {idle + 1} idle" if idle else "1",
                middle(lambda run: run.bits_per_s / 1e6),
                middle(lambda run: run.off * 100),
                middle(lambda run: run.relay_cpu_s_per_gb),
            ]
        )
    columns = ["asked", "paced by", "connections", "Mbit/s", "worst second, % off", "CPU s/GB"]
    return Table("rate", "Streams with a rate, two hops", columns, rows)


def _opening(results: Results) -> Table:
    rows = []
    runs = [run for run in results.runs if isinstance(run, Opening)]
    for way in dict.fromkeys(run.way for run in runs):
        same = [run for run in runs if run.way == way]
        parts: dict[str, list[float]] = {}
        for run in same:
            names = list(run.steps_s)
            for name, following in pairwise(names):
                parts.setdefault(name, []).append(run.steps_s[following] - run.steps_s[name])
        whole = sorted(run.steps_s["ready"] for run in same)
        shares = ", ".join(f"{name} {number(statistics.median(times))}" for name, times in parts.items())
        rows.append(
            [
                way,
                str(len(same)),
                number(statistics.median(whole)),
                number(whole[min(len(whole) - 1, len(whole) * 99 // 100)]),
                shares,
                number(statistics.median(run.release_s for run in same)),
            ]
        )
    columns = ["way", "runs", "p50 s", "p99 s", "of it, median s", "release s"]
    return Table("opening", "From open_stream to READY", columns, rows)


def _many(results: Results) -> Table:
    words: dict[str, tuple[Any, str]] = {
        "at-once": ("opened at the same time", "fastest fifth / slowest"),
        "cycles": ("opened and released, one after the other", "first fifth / last"),
        "waiting": ("waiting for their application", "a new one without / beside them"),
    }
    rows = [
        [
            f"{run.count} {words[run.what][0]}",
            number(run.seconds),
            words[run.what][1],
            f"{number(run.first_s)} / {number(run.last_s)}",
            ", ".join(f"{name} {count}" for name, count in run.left.items() if count > 0) or "nothing",
        ]
        for run in results.runs
        if isinstance(run, Many)
    ]
    return Table(
        "many", "Many streams", ["streams", "s", "time until READY of", "s each", "left behind"], rows
    )
