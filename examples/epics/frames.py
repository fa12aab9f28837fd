"""What the detector sees: one real microscopy image that drifts, so that no frame is like another.

The image (a cell under a microscope) ships inside scikit-image. Detector and viewer each make the frames from it, so
the viewer knows what must arrive without being told.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray
from skimage import data

CHANNEL = "13SIM1:Pva1:Image"  # as areaDetector's simulated detector names it
STEP_PIXELS = 7

Frame = NDArray[np.uint16]


class Specimen:
    """The image on disk, with 16 bits in each pixel."""

    def __init__(self) -> None:
        self._image: Frame = data.cell().astype(np.uint16) * 257

    def frame(self, number: int) -> Frame:
        """The image after so many steps of the drift, its number in the first pixel."""
        frame = np.roll(self._image, STEP_PIXELS * number, axis=(0, 1))
        frame[0, 0] = number % (1 << 16)
        return frame


def digest(frame: Frame) -> str:
    """The SHA-256 of a frame's pixels."""
    return hashlib.sha256(np.ascontiguousarray(frame).data).hexdigest()
