"""What a variant drew beside what torch drew, and the worst of it as a picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint import file_sha256
from engine.images import Picture, grid, resized, to_uint8
from engine.request import Request

Image = NDArray[np.float32]  # [H, W, C] in [0, 1]
EVIDENCE = 3  # of the worst seeds
LEAST_SIDE, LARGEST_SIDE = 192, 384  # pixels of a panel: a report holds nine for each variant


@dataclass(frozen=True)
class Comparison:
    """What a variant drew, beside what torch drew."""

    requests: Sequence[Request]
    references: Sequence[Image]
    results: Sequence[Image]
    psnrs_db: Sequence[float]
    ssims: Sequence[float]
    isrs_db: Sequence[float]

    @property
    def worst(self) -> list[int]:
        """Indices of the worst pictures, the worst first."""
        return [int(index) for index in np.argsort(self.psnrs_db, kind="stable")[:EVIDENCE]]


def save_evidence(folder: Path, name: str, comparison: Comparison) -> str:
    """The worst pictures, a row each: reference | result | difference, its largest value white.

    Returns the path in the artifact `folder`. It ends with a part of the file's hash, so that older
    evidence stays what it is.
    """
    panels, captions = [], []
    for index in comparison.worst:
        reference, result = comparison.references[index], comparison.results[index]
        difference = np.abs(reference - result)
        largest = float(difference.max())
        panels += [reference, result, difference / largest if largest else difference]
        seed = comparison.requests[index].seed
        decibels = f"{comparison.psnrs_db[index]:.1f} dB"
        captions += [f"reference, seed {seed}", f"result, {decibels}", f"max {largest:.1e}"]
    side = max(panels[0].shape[:2])
    (folder / "quality").mkdir(exist_ok=True)
    partial = folder / "quality" / f"{name}.partial.png"
    grid(
        [_fitted(to_uint8(panel)) for panel in panels], 3, captions, max(1, LEAST_SIDE // side)
    ).save(partial)
    worst = comparison.requests[comparison.worst[0]].seed
    path = f"quality/{name}-{worst}-{file_sha256(partial)[:8]}.png"
    os.replace(partial, folder / path)
    return path


def _fitted(panel: Picture) -> Picture:
    """A panel no larger than a report can bear."""
    height, width = panel.shape[:2]
    share = min(1.0, LARGEST_SIDE / max(height, width))
    return resized(panel, max(1, round(height * share)), max(1, round(width * share)))
