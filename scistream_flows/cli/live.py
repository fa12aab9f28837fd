"""A stream while it runs: what goes through it, where it is held up, and both over time."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scistream_flows.cli.console import in_time, in_units, plain
from scistream_flows.cli.listing import leg_in_words
from scistream_flows.cli.session import Sight
from scistream_flows.errors import MissingExtra, NotFound
from scistream_flows.models import Counts, Limiting, Rates, Role, Status
from scistream_flows.stream import ROLES, limiting_leg

SPARKS: Final = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH: Final = 60

_WHY: Final[Mapping[str, str]] = {
    "wan": "the network between the facilities takes no more, or loses some",
    "relay": "a relay's own processor is the limit",
    "producer_lan": "the network at the producer's side takes no more, or loses some",
    "consumer_lan": "the network at the consumer's side takes no more, or loses some",
    "producer": "the producer's side is slower than the rest",
    "consumer": "the consumer's side is slower than the rest",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The sides of a stream at one moment."""

    uid: str
    at_s: float
    sides: Mapping[Role, Status]

    @property
    def bits_per_s(self) -> Rates:
        """Payload per direction, as the relay nearest to the receiver counts."""
        cons, prod = self._nearest
        return Rates(to_consumer=cons.bits_per_s.to_consumer, to_producer=prod.bits_per_s.to_producer)

    @property
    def bytes(self) -> Counts:
        """The same, since the beginning."""
        cons, prod = self._nearest
        return Counts(to_consumer=cons.bytes.to_consumer, to_producer=prod.bytes.to_producer)

    @property
    def limiting(self) -> Limiting | None:
        """The leg that limits."""
        prod, cons = (self.sides[role].limiting if role in self.sides else None for role in ROLES)
        return limiting_leg(prod, cons)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return self._nearest[0].connections.active

    @property
    def ended(self) -> bool:
        """Whether every side is over."""
        return all(one.ended for one in self.sides.values())

    @property
    def total_bits_per_s(self) -> float:
        """Both directions together."""
        return self.bits_per_s.to_consumer + self.bits_per_s.to_producer

    @property
    def _nearest(self) -> tuple[Status, Status]:
        """The side of the consumer and that of the producer; where one is not known, the other."""
        some = next(iter(self.sides.values()))
        return self.sides.get("CONS", some), self.sides.get("PROD", some)

    def states(self) -> str:
        """`PROD STREAMING, CONS STREAMING`; of one that is over, why."""
        return ", ".join(
            f"{role} {one.state}{f' {one.reason}' if one.reason else ''}" for role, one in self.sides.items()
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "protocol": 1,
            "uid": self.uid,
            "at_s": round(self.at_s, 3),
            "states": {role: one.state for role, one in self.sides.items()},
            "reasons": {role: one.reason for role, one in self.sides.items()},
            "bytes": self.bytes.model_dump(),
            "bits_per_s": self.bits_per_s.model_dump(),
            "connections": self.connections,
            "lease_remaining_s": lease_s(self),
            "limiting": self.limiting.model_dump() if self.limiting else None,
            "limited_by": why(self.limiting),
        }

    def line(self) -> str:
        """One line for a log."""
        rates, held_up = self.bits_per_s, leg_in_words(self.limiting)
        return plain(
            f"{in_time(self.at_s):>9}  {self.states()}  to consumer {in_units(rates.to_consumer, 'bit/s')}"
            f" ({in_units(self.bytes.to_consumer, 'B')})  to producer {in_units(rates.to_producer, 'bit/s')}"
            f" ({in_units(self.bytes.to_producer, 'B')})  connections {self.connections}"
            f"  limited by {held_up or '-'}"
        )


def samples(
    sight: Sight, *, every_s: float, for_s: float | None = None, renews: bool = False
) -> Iterator[Sample]:
    """The stream again and again, until it is over, or for so long.

    Raises:
        NotFound: When it was not there from the beginning.
    """
    began = time.monotonic()
    number = 0
    while True:
        try:
            sides = sight.renew() if renews else sight.look()
        except NotFound:
            if number == 0:
                raise
            return  # it has ended so long ago that it is forgotten
        now = Sample(uid=sight.uid, at_s=time.monotonic() - began, sides=sides)
        yield now
        number += 1
        if now.ended or (for_s is not None and time.monotonic() - began + every_s > for_s):
            return
        time.sleep(max(0.0, began + number * every_s - time.monotonic()))


def picture(now: Sample, history: Sequence[float]) -> RenderableType:
    """What `watch` shows: figures, and the rate over the last samples."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    rates, counts, left_s = now.bits_per_s, now.bytes, lease_s(now)
    rows = [
        ("stream", f"{now.uid}, {next(iter(now.sides.values())).mode}"),
        ("state", now.states()),
        ("to consumer", f"{in_units(rates.to_consumer, 'bit/s')}, {in_units(counts.to_consumer, 'B')}"),
        ("to producer", f"{in_units(rates.to_producer, 'bit/s')}, {in_units(counts.to_producer, 'B')}"),
        ("connections", str(now.connections)),
        ("limited by", why(now.limiting)),
        ("lease", "-" if left_s is None else in_time(left_s)),
    ]
    for name, value in rows:
        table.add_row(name, Text(plain(value)))
    most = in_units(max(history, default=0), "bit/s")
    return Group(table, Text(sparkline(history)), Text(f"{most} at most, {in_time(now.at_s)}", style="dim"))


def sparkline(values: Sequence[float]) -> str:
    """The last values as a line of bars; the highest is full."""
    shown = values[-SPARKLINE_WIDTH:]
    most = max(shown, default=0.0)
    if most <= 0:
        return SPARKS[0] * len(shown)
    return "".join(SPARKS[round((len(SPARKS) - 1) * value / most)] for value in shown)


def why(limiting: Limiting | None) -> str:
    """The leg that limits and the reason, in words."""
    leg = leg_in_words(limiting)
    if limiting is None or not leg:
        return "nothing moves"
    words = _WHY.get(limiting.leg or "")
    if words is None and leg.endswith(" application"):
        side = leg.split()[0]
        sends = (side == "producer") == (limiting.direction != "to_producer")
        words = f"the {side}'s application {'sends' if sends else 'reads'} no faster"
    share = f", {100 * limiting.share:.0f} % of the time" if limiting.share is not None else ""
    return f"{leg}: {words}{share}" if words else f"{leg}{share}"


def lease_s(now: Sample) -> float | None:
    """Seconds until the first side ends that nothing renews."""
    return min((one.lease_remaining_s for one in now.sides.values() if one.lease_remaining_s), default=None)


def require_plot() -> None:
    """Raise MissingExtra unless a plot can be drawn: said before the waiting, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "a plot needs matplotlib", which="matplotlib", hint="pip install 'scistream-flows[plot]'"
        )


def draw(seen: Sequence[Sample], file: Path) -> None:
    """The rates over time as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = max((one.total_bits_per_s for one in seen), default=0.0)
    factor, unit = (1e9, "Gbit/s") if most >= 1e9 else (1e6, "Mbit/s")
    times = [one.at_s for one in seen]
    for name in ("to_consumer", "to_producer"):
        rates = [getattr(one.bits_per_s, name) / factor for one in seen]
        axes.plot(times, rates, label=name.replace("_", " "))
        axes.fill_between(times, rates, alpha=0.15)
    axes.set_xlabel("time in s")
    axes.set_ylabel(f"payload in {unit}")
    axes.set_ylim(bottom=0)
    axes.set_title(f"stream {seen[0].uid}, limited by {leg_in_words(seen[-1].limiting) or 'nothing'}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png")
