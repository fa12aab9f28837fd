"""Pictures of a run: build/bench/*.png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

from .compare import bulk, relays, round_trips, spread
from .results import Bulk, Results

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def draw(results: Results, folder: Path) -> list[Path]:
    """One picture for each figure that was measured; the files."""
    runs = [run for run in bulk(results) if run.network == "loopback" and run.hops in (0, 2)]
    written = []
    figures: tuple[tuple[str, str, Callable[[Bulk], float]], ...] = (
        ("cpu", "relay CPU, seconds per GB, two hops", lambda run: run.relay_cpu_s_per_gb),
        ("throughput", "Gbit/s, two hops", lambda run: run.bits_per_s / 1e9),
    )
    for name, title, figure in figures:
        if runs:
            written.append(_by_connections(runs, title, figure, folder / f"{name}.png"))
    trips = round_trips(results, "one")
    if trips:
        picture, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        names = relays(trips)
        for shift, (label, part) in enumerate(
            (("p50", lambda run: run.p50_us), ("p99", lambda run: run.p99_us))
        ):
            heights = [found.median if (found := spread(trips, one, part)) else 0 for one in names]
            axes.bar([place + 0.4 * shift for place in range(len(names))], heights, 0.4, label=label)
        axes.set_xticks([place + 0.2 for place in range(len(names))], names, rotation=45, ha="right")
        axes.set(ylabel="us, logarithmic", title="64 bytes there and back, two hops, one core", yscale="log")
        axes.legend()
        written.append(_save(picture, folder / "latency.png"))
    return written


def _by_connections(runs: list[Bulk], title: str, figure: Callable[[Bulk], float], file: Path) -> Path:
    picture, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    counts = sorted({run.connections for run in runs})
    for name in relays(runs):
        if name == "direct" and file.stem == "cpu":
            continue
        found = [spread([run for run in runs if run.connections == count], name, figure) for count in counts]
        middle = [one.median if one else float("nan") for one in found]
        low = [one.median - one.least if one else 0 for one in found]
        high = [one.most - one.median if one else 0 for one in found]
        axes.errorbar(range(len(counts)), middle, yerr=[low, high], label=name, marker="o", capsize=2)
    axes.set_xticks(range(len(counts)), list(map(str, counts)))
    axes.set(xlabel="connections", title=title, yscale="log")
    for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_ticks("{x:g}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(picture, file)


def _save(picture: Figure, file: Path) -> Path:
    picture.savefig(file, dpi=120)
    plt.close(picture)
    return file
