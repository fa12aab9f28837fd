"""The demo's picture: throughput over time beside the image that was analysed."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage import segmentation

import nuclei

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = {"tls": "#d9480f", "auth": "#0b7285"}


@dataclass(frozen=True)
class Curve:
    """One stream as the consumer saw it.

    Attributes:
        samples: pairs of seconds since the first frame and bytes received until then.
        path: how the relays moved the bytes.
    """

    samples: Sequence[tuple[float, int]]
    path: str

    def rates(self) -> tuple[list[float], list[float]]:
        """The middle of each interval and the Gbit/s within it; an interval too short to say anything is left out."""
        pairs = [
            (then, later)
            for then, later in zip(self.samples, self.samples[1:], strict=False)
            if later[0] - then[0] > 0.05
        ]
        middles = [(then[0] + later[0]) / 2 for then, later in pairs]
        return middles, [8e-9 * (later[1] - then[1]) / (later[0] - then[0]) for then, later in pairs]

    def mean_gbit_per_s(self) -> float:
        """Over the whole stream."""
        return 8e-9 * self.samples[-1][1] / self.samples[-1][0]


def draw_throughput(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """One line per mode, its mean dashed, its meaning in the legend."""
    top = 0.0
    for mode, curve in curves.items():
        times, rates = curve.rates()
        colour = COLOURS[mode]
        mean = curve.mean_gbit_per_s()
        axes.fill_between(times, rates, color=colour, alpha=0.10, linewidth=0)
        axes.plot(
            times, rates, color=colour, linewidth=2.2, solid_capstyle="round",
            label=f"mode {mode} (path {curve.path}): {mean:.1f} Gbit/s",
        )  # fmt: skip
        axes.axhline(mean, color=colour, linewidth=1, linestyle=(0, (4, 4)), alpha=0.7)
        top = max(top, *rates)
    axes.set_xlim(left=0)
    axes.set_ylim(0, top * 1.3)
    axes.set_xlabel("seconds since the first frame", color=QUIET)
    axes.set_ylabel("Gbit/s of pixels, verified by the consumer", color=QUIET)
    axes.set_title(
        "Throughput, producer to consumer through two relays", loc="left", color=INK, fontsize=13, pad=12
    )
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.legend(loc="upper left", frameon=False, labelcolor=INK, fontsize=10.5)


def draw_field(axes: Axes, findings: nuclei.Findings) -> None:
    """The field of view with each nucleus outlined."""
    scale = 2  # so that outlines are fine lines on the printed picture
    view = np.kron(findings.view, np.ones((scale, scale, 1), np.uint8))
    labels = np.kron(findings.labels, np.ones((scale, scale), np.int32))
    axes.imshow(
        segmentation.mark_boundaries(view, labels, color=(0.13, 0.95, 0.95), mode="inner"),
        interpolation="antialiased",
    )
    axes.set_title("What the consumer saw: nuclei outlined", loc="left", color=INK, fontsize=13, pad=12)
    axes.set_axis_off()
    axes.text(
        0.025, 0.035, f"{findings.nuclei} nuclei    {100 * findings.stained_share:.0f} % of the area stained",
        transform=axes.transAxes, color="white", fontsize=12.5, fontweight="bold",
        path_effects=[patheffects.withStroke(linewidth=3, foreground=INK)],
    )  # fmt: skip


def render(curves: Mapping[str, Curve], findings: nuclei.Findings) -> bytes:
    """Draw the picture; answer it as PNG."""
    figure = Figure(figsize=(14, 6.4), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_throughput(left, curves)
    draw_field(right, findings)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
