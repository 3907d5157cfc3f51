"""A sampler's whole way as a table of coefficients, one row a network call."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.errors import OptionError

# The columns of a coefficient table, in order:
#   x0     = clip(x0_x * x + x0_output * output, -clip, clip)
#   x_next = x_x * x + x_x0 * x0 + x_output * output
#            + x_x_previous * x_previous + x_x0_previous * x0_previous + x_noise * noise
COLUMNS = (
    "x0_x", "x0_output", "clip",
    "x_x", "x_x0", "x_output", "x_x_previous", "x_x0_previous", "x_noise",
)  # fmt: skip

Array = NDArray[np.float32]
Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Everything a sampler needs to know for M network calls; the arrays are read-only.

    Start from `x = noise * init_noise_sigma`. At call i give the network `x * input_scale[i]` and
    `timesteps[i]`, then `step` with `coefficients[i]`. M is num_inference_steps, but for heun
    2 * num_inference_steps - 1.

    To start from a picture x0, let i be `start(strength)` and
    `x = signal[i] * x0 + noise_level[i] * noise`, and go on from call i of `begun_at(i)`.
    """

    timesteps: Array  # [M], what the network is called with
    input_scale: Array  # [M]
    signal: Array  # [M]
    noise_level: Array  # [M], in units of x
    coefficients: Array  # [M, len(COLUMNS)]
    init_noise_sigma: float
    num_inference_steps: int
    is_flow: bool

    def __post_init__(self) -> None:
        for array in (
            self.timesteps, self.input_scale, self.signal, self.noise_level, self.coefficients,
        ):  # fmt: skip
            array.setflags(write=False)

    def start(self, strength: float) -> int:
        """The first network call of a picture that is changed by `strength` in (0, 1].

        Where the steps do not divide, flow matching rounds the steps to be done up and the others
        round them down, as diffusers' image-to-image pipelines do.

        Raises:
            OptionError: `strength` is out of range, or so small that no step is left.
        """
        if not 0 < strength <= 1:
            raise OptionError(f"strength must be more than 0 and at most 1, got {strength}")
        steps = self.num_inference_steps
        skipped = int(steps - steps * strength) if self.is_flow else steps - int(steps * strength)
        if skipped == steps:
            raise OptionError(
                f"strength {strength} of {steps} steps leaves no step; it must be at least "
                f"{1 / steps:.3g}, or num_inference_steps more"
            )
        calls_a_step = 2 if len(self.timesteps) > steps else 1
        return skipped * calls_a_step

    def begun_at(self, index: int) -> "Trajectory":
        """This trajectory for a row whose first call is `index`, as `start` gives it.

        A multistep sampler knows no x0 from before its first step, which is of first order.
        """
        if index == 0:
            return self
        coefficients = self.coefficients.copy()
        x_x0, x_x0_previous = COLUMNS.index("x_x0"), COLUMNS.index("x_x0_previous")
        coefficients[index, x_x0] += coefficients[index, x_x0_previous]
        coefficients[index, x_x0_previous] = 0
        return replace(self, coefficients=coefficients)


def table(
    *,
    x0_x: Column | float,
    x0_output: Column | Array,
    clip: float = np.inf,
    x_x: Column | float,
    x_x0: Column | float = 0.0,
    x_output: Column | Array | float = 0.0,
    x_x_previous: Column | float = 0.0,
    x_x0_previous: Column | float = 0.0,
    x_noise: Column | float = 0.0,
) -> Array:
    """[M, len(COLUMNS)], in the order of COLUMNS; rounded to float32 only here."""
    columns = (
        x0_x, x0_output, clip, x_x, x_x0, x_output, x_x_previous, x_x0_previous, x_noise,
    )  # fmt: skip
    stacked: NDArray[np.float64] = np.stack(np.broadcast_arrays(*columns), axis=-1)
    return stacked.astype(np.float32)
