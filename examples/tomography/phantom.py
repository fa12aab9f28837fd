"""The sample: the Shepp-Logan phantom in three dimensions, ten ellipsoids, whose projections are known exactly.

Beamline and workflow each know it, so the workflow can say how good a reconstruction is, and what must have arrived.
"""

import numpy as np
from numpy.typing import NDArray

WIDTH_PIXELS = 256
ROWS = 16
ANGLES = 180
PASSES = 6
OPEN_BEAM_COUNTS = 40_000  # in a pixel with no sample before it
ATTENUATION_PER_PIXEL = 0.03  # where the density is 1

Picture = NDArray[np.float64]
Projection = NDArray[np.uint16]

# density, semi-axes, centre, and the angle by which it is turned about the axis of rotation, in degrees
ELLIPSOIDS = [
    (1.0, (0.69, 0.92, 0.81), (0.0, 0.0, 0.0), 0),
    (-0.8, (0.6624, 0.874, 0.78), (0.0, -0.0184, 0.0), 0),
    (-0.2, (0.11, 0.31, 0.22), (0.22, 0.0, 0.0), -18),
    (-0.2, (0.16, 0.41, 0.28), (-0.22, 0.0, 0.0), 18),
    (0.1, (0.21, 0.25, 0.41), (0.0, 0.35, -0.15), 0),
    (0.1, (0.046, 0.046, 0.05), (0.0, 0.1, 0.25), 0),
    (0.1, (0.046, 0.046, 0.05), (0.0, -0.1, 0.25), 0),
    (0.1, (0.046, 0.023, 0.05), (-0.08, -0.605, 0.0), 0),
    (0.1, (0.023, 0.023, 0.02), (0.0, -0.606, 0.0), 0),
    (0.1, (0.023, 0.046, 0.02), (0.06, -0.605, 0.0), 0),
]
HEIGHTS = np.linspace(-0.3, 0.3, ROWS)


def angles_deg() -> Picture:
    """The angles of the scan in their order: interlaced, so that each pass sees the sample from all around."""
    grid = np.linspace(0, 180, ANGLES, endpoint=False)
    return np.concatenate([grid[first::PASSES] for first in range(PASSES)])


def _positions() -> Picture:
    """Of the pixels in a row of the detector, and of the columns and rows of a slice: -1 to 1."""
    return (np.arange(WIDTH_PIXELS) - WIDTH_PIXELS // 2) / (WIDTH_PIXELS / 2)


def slices() -> Picture:
    """The attenuation per pixel at each of the heights: what a reconstruction should find."""
    x, y = np.meshgrid(_positions(), -_positions())
    found = np.zeros((ROWS, WIDTH_PIXELS, WIDTH_PIXELS))
    for density, (a, b, c), (x0, y0, z0), turned in ELLIPSOIDS:
        cosine, sine = np.cos(np.radians(turned)), np.sin(np.radians(turned))
        along, across = (x - x0) * cosine + (y - y0) * sine, (y - y0) * cosine - (x - x0) * sine
        for row, height in enumerate(HEIGHTS):
            inside = (along / a) ** 2 + (across / b) ** 2 + ((height - z0) / c) ** 2 <= 1
            found[row] += density * inside
    return found * ATTENUATION_PER_PIXEL


def projection(number: int) -> Projection:
    """What the detector counts at the angle of this number, with the noise of photons."""
    angle = np.radians(angles_deg()[number])
    lengths = np.zeros((ROWS, WIDTH_PIXELS))
    for density, (a, b, c), (x0, y0, z0), turned in ELLIPSOIDS:
        level = np.clip(1 - ((HEIGHTS - z0) / c) ** 2, 0, None)[
            :, np.newaxis
        ]  # how much is left at this height
        turn = angle - np.radians(turned)
        square = (a * np.cos(turn)) ** 2 + (b * np.sin(turn)) ** 2
        from_centre = _positions() - (x0 * np.cos(angle) + y0 * np.sin(angle))
        chord = np.sqrt(np.clip(square * level - from_centre**2, 0, None))
        lengths += density * 2 * a * b / square * chord
    expected = OPEN_BEAM_COUNTS * np.exp(-lengths * ATTENUATION_PER_PIXEL * WIDTH_PIXELS / 2)
    counts: Projection = np.random.default_rng(number).poisson(expected).astype(np.uint16)
    return counts
