"""Calibration: what the denoiser is called with along the model's own sampling trajectories."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.errors import ArtifactError, OptionError
from engine.options import Options
from engine.pipeline import DEFAULT_MAX_ROWS, Pipeline
from engine.request import Request
from engine.row import Feed
from export.requests import CALIBRATION_SEED, varied_requests

LEAST_ROWS = 32  # under which one odd row decides a range
BATCH = 16  # rows of a call when ranges are measured


class CalibrationOptions(Options):
    """Which rows are recorded; the same options give the same rows."""

    rows: int = Field(384, ge=1, description="network evaluations kept, from all steps alike")
    seed: int = Field(0, ge=0, lt=900)

    def check(self) -> None:
        """Raises OptionError for too few rows."""
        if self.rows < LEAST_ROWS:
            raise OptionError(
                f"calibration needs at least {LEAST_ROWS} rows, got {self.rows}: "
                "with fewer one odd row decides a range"
            )

    @property
    def file(self) -> str:
        """Where an artifact keeps them."""
        return f"calibration/{self.rows}-rows-seed-{self.seed}.npz"


def calibrate(
    pipeline: Pipeline, options: CalibrationOptions, size: tuple[int, int] | None = None
) -> Feed:
    """Rows of the denoiser's inputs, `[rows, ...]` each, drawn at random from whole trajectories.

    `size`: of a build that makes one only. Raises OptionError for too few rows.
    """
    options.check()
    first_seed = CALIBRATION_SEED + 1000 * options.seed
    evaluations = 1 if pipeline.model.defaults is None else 4  # of a request, at least
    count = max(32, -(-options.rows // evaluations))
    requests = varied_requests(pipeline.model, count, size, first_seed)
    kept = _draw(_evaluations(pipeline, requests), options.rows, options.seed)
    return {name: np.stack([row[name] for row in kept]) for name in kept[0]}


def save_rows(path: Path, rows: Feed) -> None:
    """Write rows as `.npz`: plain arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **rows)


def load_rows(path: Path) -> Feed:
    """The rows that `save_rows` wrote. Raises ArtifactError."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"calibration '{path}' is not readable: {error}") from None


def batches(rows: Feed, size: int = BATCH) -> list[dict[str, NDArray[np.generic]]]:
    """The rows as network calls of `size`; a rest that is smaller is left out."""
    (count,) = {len(array) for array in rows.values()}
    starts = range(0, count - size + 1, size)
    return [{name: array[i : i + size] for name, array in rows.items()} for i in starts]


def _evaluations(pipeline: Pipeline, requests: Sequence[Request]) -> Iterator[Feed]:
    """One row of inputs for every evaluation, in the order in which they happen."""
    for start in range(0, len(requests), DEFAULT_MAX_ROWS):
        rows = [pipeline.admit(request) for request in requests[start : start + DEFAULT_MAX_ROWS]]
        while running := [row for row in rows if not row.done]:
            feed = pipeline.feed(running)
            for index in range(len(next(iter(feed.values())))):
                yield {name: array[index] for name, array in feed.items()}
            pipeline.tick(running)


def _draw(items: Iterable[Feed], count: int, seed: int) -> list[Feed]:
    """`count` of the items, each as likely as any other, in memory for as many (algorithm R).

    Source: Vitter 1985, Random sampling with a reservoir.
    """
    generator = np.random.default_rng(seed)
    kept: list[Feed] = []
    for index, item in enumerate(items):
        if index < count:
            kept.append(item)
        elif (slot := int(generator.integers(index + 1))) < count:
            kept[slot] = item
    return kept
