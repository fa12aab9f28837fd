"""The specimen: fields of view of one real microscopy image, as a stage that moves over the slide would see them.

The image (colon tissue; FHL2 stained brown with DAB, cell nuclei blue with hematoxylin) ships inside scikit-image.
Producer and consumer each read it from disk, so the consumer knows what must arrive without being told.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import data

SIDE_PIXELS = 1024
MAGNIFICATION = 3
STAGE_POSITIONS = [(y, x) for y in (0, 170, 340, 512) for x in (0, 170, 340, 512)]

Frame = NDArray[np.uint8]


def fields() -> list[Frame]:
    """Look at the image on disk at each position of the stage: 1024 x 1024 pixels of RGB (3 MiB) each."""
    image: Frame = data.immunohistochemistry()
    magnified = ndimage.zoom(image, (MAGNIFICATION, MAGNIFICATION, 1), order=1)
    return [
        np.ascontiguousarray(magnified[y : y + SIDE_PIXELS, x : x + SIDE_PIXELS]) for y, x in STAGE_POSITIONS
    ]


def digest(pixels: memoryview) -> bytes:
    """The SHA-256 of a frame's pixels."""
    return hashlib.sha256(pixels).digest()
