"""What a person sees of the demo in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

COLOURS = {"tls": "dark_orange3", "auth": "dark_cyan"}
MEANING = {"tls": "peers proven, encrypted", "auth": "peers proven, clear text"}


@dataclass
class Watch:
    """A stream as it is watched: rendered anew each time something changed.

    Attributes:
        mode: the mode of the WAN leg.
        goal_s: how long the stream is to run at least.
        goal_bytes: how much it is to carry at least.
        listener: what the consumer was told; empty until the stream is ready.
        lines: what the consumer has said so far.
        limiting: the leg that limits.
        steps: the states that the flow has come through, each with the last thing it showed.
    """

    mode: str
    goal_s: float
    goal_bytes: float
    listener: str = ""
    lines: Sequence[dict[str, Any]] = ()
    limiting: str = "-"
    steps: Mapping[str, str] = field(default_factory=dict)

    def samples(self) -> list[tuple[float, int]]:
        """Seconds since the first frame and bytes received until then."""
        return [(0.0, 0), *((line["elapsed_s"], line["bytes"]) for line in self.lines)]

    def __rich__(self) -> RenderableType:
        """What, how fast, what the scientist gets, and how far the flow is."""
        samples = self.samples()
        (then_s, then_bytes), (elapsed_s, received_bytes) = samples[-6:][0], samples[-1]
        gbit_per_s = (
            8e-9 * (received_bytes - then_bytes) / (elapsed_s - then_s) if elapsed_s > then_s else 0.0
        )
        done = min(elapsed_s / self.goal_s, received_bytes / self.goal_bytes, 1.0)
        colour = COLOURS[self.mode]
        where = f"   consumer is told {self.listener}" if self.listener else "   opening the stream …"
        head = Text.assemble(
            (f" {self.mode} ", f"bold white on {colour}"), f" {MEANING[self.mode]}", (where, "bright_black")
        )
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=1, completed=done, width=18, complete_style=colour, finished_style=colour),
            f"{received_bytes / 1e9:6.2f} GB",
            f"[bold]{gbit_per_s:5.1f} Gbit/s[/bold]",
            f"limited by: [bold]{self.limiting}[/bold]",
        )
        found = Text(style="bright_black")
        if self.lines:
            latest = self.lines[-1]
            found.append(f"{latest['verified']} of {latest['frames']} frames as the image on disk")
            if latest["nuclei"] is not None:
                found.append(f"; {latest['nuclei']} nuclei in view, {latest['stained_share']:.0%} stained")
        if not self.steps:
            return Group(head, bar, found)
        step, shown = list(self.steps.items())[-1]
        return Group(head, bar, found, Text(f"flow: {step}: {shown}", style="bright_black"))


def summary(streams: Sequence[dict[str, Any]]) -> Table:
    """The table at the end, from the `streams` of result.json."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("mode")
    table.add_column("path")
    for name in ("GB", "Gbit/s", "CPU s/GB*", "set-up", "frames"):
        table.add_column(name, justify="right")
    table.add_column("verified")
    table.add_column("end")
    for one in streams:
        table.add_row(
            one["mode"],
            one["path"],
            f"{one['bytes'] / 1e9:.2f}",
            f"{one['gbit_per_s']:.1f}",
            f"{one['relay_cpu_s_per_gb']:.2f}",
            f"{1000 * one['setup_s']:.0f} ms",
            str(one["frames"]),
            "all" if one["verified"] else "[bold red]NOT ALL[/bold red]",
            " / ".join(dict.fromkeys(str(reason) for reason in one["end_reason"].values())),
        )
    return table
