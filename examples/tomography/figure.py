"""The picture of a reconstruction: what was measured, what was found early and in the end, and how wrong it is."""

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from phantom import Picture

INK = "#1f2933"


def render(
    *, sinogram: Picture, early: Picture, found: Picture, truth: Picture, words: dict[str, str]
) -> bytes:
    """Draw one slice; answer it as PNG. `words` go below the panels."""
    figure = Figure(figsize=(16, 4.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    top = float(truth.max())
    panels = [
        ("Sinogram, sorted by angle", sinogram, "viridis", 0.0, float(sinogram.max()), words["sinogram"]),
        ("Reconstruction after the first pass", early, "gray", 0.0, top / 2, words["early"]),
        ("Reconstruction at the end", found, "gray", 0.0, top / 2, words["found"]),
        ("Error: reconstruction - phantom", found - truth, "RdBu", -top / 4, top / 4, words["error"]),
    ]
    for axes, (title, picture, colours, low, high, below) in zip(figure.subplots(1, 4), panels, strict=True):
        shown = axes.imshow(
            picture, cmap=colours, vmin=low, vmax=high, aspect=picture.shape[1] / picture.shape[0]
        )
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        axes.set_xlabel(below, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(shown, ax=axes, shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
