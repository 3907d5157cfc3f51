"""A row: one request on its way through the network, and what one tick does to many of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.noise import Noise
from engine.postprocess import OFF, PostProcess
from engine.samplers import guide, step
from engine.trajectory import COLUMNS, Trajectory

Array = NDArray[np.float32]
Feed = dict[str, NDArray[np.generic]]
_X_NOISE = COLUMNS.index("x_noise")


@dataclass(slots=True)
class Row:
    """Solver state of one request; it belongs to the request, never to the sampler."""

    x: Array  # noise at first, the picture or its latents at the end; no batch axis
    conditioning: tuple[Feed, ...]  # one network evaluation each: (with condition[, without])
    trajectory: Trajectory | None = None  # none for a GAN, which is one step
    guidance_scale: float = 1.0
    index: int = 0  # steps done, or left out where the row starts from a picture
    noise: Noise | None = None  # the request's generator, for samplers that add noise
    seed: int = 0  # of the request, for messages
    postprocess: PostProcess = OFF  # of the finished picture
    x_previous: Array = field(init=False)
    x0_previous: Array = field(init=False)

    def __post_init__(self) -> None:
        self.x_previous = self.x0_previous = np.zeros_like(self.x)

    @property
    def steps(self) -> int:
        return 1 if self.trajectory is None else len(self.trajectory.timesteps)

    @property
    def done(self) -> bool:
        return self.index >= self.steps


def network_inputs(rows: Sequence[Row], x_name: str) -> Feed:
    """One network call for the next step of every row; a guided row is two evaluations.

    First the evaluation with the label of every row, then those without, in the order of rows.
    """
    evaluations = [(row, row.conditioning[0]) for row in rows]
    evaluations += [(row, row.conditioning[1]) for row in rows if len(row.conditioning) > 1]
    feed: Feed = {
        name: np.stack([conditioning[name] for _, conditioning in evaluations])
        for name in evaluations[0][1]
    }
    feed[x_name] = np.stack([_scaled(row) for row, _ in evaluations])
    if rows[0].trajectory is not None:
        feed["timestep"] = np.array([_timestep(row) for row, _ in evaluations], np.float32)
    return feed


def _scaled(row: Row) -> Array:
    return row.x if row.trajectory is None else row.x * row.trajectory.input_scale[row.index]


def _timestep(row: Row) -> np.float32:
    assert row.trajectory is not None
    return np.float32(row.trajectory.timesteps[row.index])


def advance(rows: Sequence[Row], output: Array) -> None:
    """Give every row the network's answer to `network_inputs`: guidance, then a solver step."""
    if rows[0].trajectory is None:
        for row, image in zip(rows, output, strict=True):
            row.x, row.index = image.copy(), 1
        return
    coefficients = np.stack(
        [row.trajectory.coefficients[row.index] for row in rows if row.trajectory is not None]
    )
    x, x0 = step(
        np.stack([row.x for row in rows]),
        _guided(rows, output),
        np.stack([row.x_previous for row in rows]),
        np.stack([row.x0_previous for row in rows]),
        np.stack([_fresh_noise(*pair) for pair in zip(rows, coefficients, strict=True)]),
        coefficients,
    )
    for row, row_x, row_x0 in zip(rows, x, x0, strict=True):
        row.x_previous, row.x, row.x0_previous = row.x, row_x, row_x0
        row.index += 1


def _fresh_noise(row: Row, coefficients: Array) -> Array:
    """The next draw of the row's generator, where its step adds noise."""
    if not coefficients[_X_NOISE]:
        return np.zeros_like(row.x)
    assert row.noise is not None
    return row.noise(row.x.shape)


def _guided(rows: Sequence[Row], output: Array) -> Array:
    prediction = output[: len(rows)]
    guided = [index for index, row in enumerate(rows) if len(row.conditioning) > 1]
    if not guided:
        return prediction
    scales = np.array([rows[index].guidance_scale for index in guided], np.float32)
    prediction = prediction.copy()
    prediction[guided] = guide(prediction[guided], output[len(rows) :], scales)
    return prediction
