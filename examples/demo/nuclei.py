"""What a pathologist asks of such a field: how many cell nuclei, and how much of the tissue carries the stain."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, feature, filters, measure, segmentation

import slide


@dataclass(frozen=True)
class Findings:
    """The analysis of one field of view.

    Attributes:
        nuclei: how many nuclei were found.
        stained_share: the share of the area in which DAB (the brown stain) lies above the threshold.
        view: the field as analysed, at half the camera's resolution.
        labels: for each pixel of `view` the number of its nucleus, or 0.
    """

    nuclei: int
    stained_share: float
    view: slide.Frame
    labels: NDArray[np.int32]

    def save(self, path: Path) -> None:
        """Write them to a file (.npz)."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "Findings":
        """Read what `save` wrote."""
        with np.load(path) as saved:
            return cls(
                nuclei=int(saved["nuclei"]),
                stained_share=float(saved["stained_share"]),
                view=saved["view"],
                labels=saved["labels"],
            )


def analyse(frame: slide.Frame) -> Findings:
    """Separate the stains, then find the nuclei and split those that touch."""
    view = np.ascontiguousarray(frame[::2, ::2])
    stains = color.rgb2hed(view)
    hematoxylin = filters.gaussian(stains[..., 0], 1.5)
    dab = filters.gaussian(stains[..., 2], 1)

    blue = (hematoxylin > filters.threshold_local(hematoxylin, 101, offset=-0.004)) & (hematoxylin > 0.02)
    blue = ndimage.binary_fill_holes(ndimage.binary_opening(blue, iterations=2))
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(blue), 1.5)
    centres = feature.peak_local_max(depth, min_distance=5, labels=measure.label(blue))
    markers = np.zeros(blue.shape, np.int32)
    markers[tuple(centres.T)] = np.arange(1, len(centres) + 1)
    labels = segmentation.watershed(-depth, markers, mask=blue)

    specks = np.flatnonzero(np.bincount(labels.ravel()) < 40)
    labels[np.isin(labels, specks)] = 0
    labels, _, _ = segmentation.relabel_sequential(labels)
    return Findings(
        nuclei=int(labels.max()),
        stained_share=float(np.mean(dab > 0.07)),
        view=view,
        labels=labels.astype(np.int32),
    )
