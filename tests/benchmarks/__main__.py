"""The command of `make bench`."""

from __future__ import annotations

import datetime as dt
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from . import limits, machine
from .chains import KINDS
from .control import CONTROL
from .groups import CARRYING, FULL, QUICK, Bench
from .plots import draw
from .report import DOCUMENT, filled
from .results import GROUPS, Group, Results
from .tables import show

ROOT: Final = Path(__file__).resolve().parents[2]
MEASURE: Final = {**CARRYING, **CONTROL}


def _groups(_: click.Context, __: click.Parameter, value: str) -> tuple[Group, ...]:
    wanted = {one.strip() for one in value.split(",") if one.strip()}
    if unknown := sorted(wanted - set(GROUPS)):
        raise click.BadParameter(f"{', '.join(unknown)}: there is only {', '.join(GROUPS)}")
    return tuple(group for group in GROUPS if not wanted or group in wanted)


@click.command()
@click.option(
    "--full",
    is_flag=True,
    help="Longer, more rounds, 10,000 idle connections, 1,000 cycles: about 40 minutes.",
)
@click.option("--only", "groups", default="", callback=_groups, help=f"Some groups: {','.join(GROUPS)}.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "build" / "bench", help="Where it goes."
)
@click.option(
    "--cycles",
    type=click.IntRange(1),
    help="Streams opened and released one after the other: 50, 1,000 in full.",
)
@click.option("--report", is_flag=True, help="Write the tables into docs/performance.md too.")
def main(*, full: bool, groups: tuple[Group, ...], output: Path, report: bool, cycles: int | None) -> None:
    """Measure our relays beside their peers, in one run; the results, tables and plots go to build/bench."""
    # Told to end, it takes along what it has started, as for an interrupt.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    words, tables = Console(stderr=True), Console()
    here = machine.look()
    if here.was_busy:
        words.print(
            f"[yellow]The machine is busy: load average {here.load_average[0]:g}. Figures will be noise in part;"
            " ratios within a round suffer less."
        )
    began, started = dt.datetime.now(dt.timezone.utc), time.monotonic()
    with words.status("…") as status:
        plan = FULL if full else QUICK
        bench = Bench(replace(plan, cycles=cycles or plan.cycles), say=status.update)
        for group in groups:
            before = time.monotonic()
            with bench.cell(group):
                MEASURE[group](bench)
            words.print(f"{group}: {time.monotonic() - before:.0f} s")
    results = Results(
        began=began.isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        full=full,
        groups=groups,
        machine=here,
        limits=limits.measure() if "bulk" in groups else None,
        missing=tuple(sorted({missing for kind in KINDS.values() if (missing := kind.missing())})),
        runs=tuple(bench.runs),
        failures=tuple(bench.failures),
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(results.model_dump_json(indent=1) + "\n")
    show(results, tables)
    draw(results, output)
    if report:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), results))
    words.print(f"{output / 'results.json'}: {len(results.runs)} figures in {results.seconds:.0f} s")
    if results.missing:
        words.print(f"Not installed, and left out: {', '.join(results.missing)}")
    for failure in results.failures[:10]:
        words.print(f"[red]{failure.cell}: {failure.error}")
    if len(results.failures) > 10:
        words.print(f"[red]and {len(results.failures) - 10} more cells failed: see results.json")
    sys.exit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
