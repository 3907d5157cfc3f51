"""Samplers as tables of coefficients, so that rows of different samplers share one solver step."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.errors import OptionError
from engine.schedules import (
    SchedulerConfig,
    alphas_cumprod,
    ddim_timesteps,
    dpmpp_2m_timesteps,
    euler_timesteps,
    flow_sigmas,
    noise_sigmas,
)

DISCRETE_SAMPLERS = ("ddim", "euler", "dpmpp_2m")
FLOW_SAMPLERS = ("flow_euler",)
SAMPLERS = DISCRETE_SAMPLERS + FLOW_SAMPLERS

# The columns of a coefficient table, in order:
#   x0     = clip(x0_x * x + x0_output * output, -clip, clip)
#   x_next = x_x * x + x_x0 * x0 + x_x0_previous * x0_previous + x_output * output
COLUMNS = ("x0_x", "x0_output", "clip", "x_x", "x_x0", "x_x0_previous", "x_output")

Array = NDArray[np.float32]
_Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Everything a sampler needs to know for N steps; the arrays are read-only.

    Start from `x = noise * init_noise_sigma`. At step i call the network with
    `x * input_scale[i]` and `timesteps[i]`, then `step` with `coefficients[i]`.
    """

    timesteps: Array  # [N], what the network is called with
    input_scale: Array  # [N]
    coefficients: Array  # [N, len(COLUMNS)]
    init_noise_sigma: float


def samplers_for(config: SchedulerConfig) -> tuple[str, ...]:
    """The samplers that can run a checkpoint with this scheduler config."""
    return FLOW_SAMPLERS if config.is_flow else DISCRETE_SAMPLERS


@lru_cache(maxsize=256)
def trajectory(sampler: str, config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """The timesteps and coefficients of one request; equal to diffusers' scheduler of that name.

    Raises:
        OptionError: the sampler does not fit the config, or the number of steps is out of range.
    """
    _check(sampler, config, num_inference_steps)
    match sampler:
        case "ddim":
            built = _ddim(config, num_inference_steps)
        case "euler":
            built = _euler(config, num_inference_steps)
        case "dpmpp_2m":
            built = _dpmpp_2m(config, num_inference_steps)
        case _:
            built = _flow_euler(config, num_inference_steps)
    for array in (built.timesteps, built.input_scale, built.coefficients):
        array.setflags(write=False)
    return built


def step(x: Array, output: Array, x0_previous: Array, coefficients: Array) -> tuple[Array, Array]:
    """One solver step of every row: (x_next, x0), both [B, ...].

    A row's result has the same bytes in any batch: there are only elementwise operations.

    Args:
        x: [B, ...] state, before `input_scale`.
        output: [B, ...] raw network output, after guidance.
        x0_previous: [B, ...] the x0 that the step before returned; zeros at the first step.
        coefficients: [B, len(COLUMNS)] one row of a `Trajectory.coefficients` for each row of x.
    """
    rows = (len(x),) + (1,) * (x.ndim - 1)
    x0_x, x0_output, clip, x_x, x_x0, x_x0_previous, x_output = (
        column.reshape(rows) for column in coefficients.T
    )
    x0 = np.clip(x0_x * x + x0_output * output, -clip, clip)
    x_next = x_x * x + x_x0 * x0 + x_x0_previous * x0_previous + x_output * output
    return x_next, x0


def guide(conditional: Array, unconditional: Array, guidance_scale: Array) -> Array:
    """Classifier-free guidance (https://arxiv.org/abs/2207.12598) with one scale a row.

    Args:
        conditional: [B, ...] network output with the condition.
        unconditional: [B, ...] network output without it.
        guidance_scale: [B]; 1 gives the conditional output, up to rounding.
    """
    scale = guidance_scale.reshape((-1,) + (1,) * (conditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)


def _check(sampler: str, config: SchedulerConfig, num_inference_steps: int) -> None:
    allowed = samplers_for(config)
    if sampler not in allowed:
        raise OptionError(f"sampler must be one of {', '.join(allowed)}, got {sampler!r}")
    limit = config.num_train_timesteps
    if sampler == "dpmpp_2m" and config.timestep_spacing == "leading":
        limit -= 1  # it spaces one timestep more than it uses
    if not 1 <= num_inference_steps <= limit:
        raise OptionError(f"num_inference_steps must be 1..{limit}, got {num_inference_steps}")


def _ddim(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """DDIM with eta 0 (https://arxiv.org/abs/2010.02502, equation 12)."""
    timesteps = ddim_timesteps(config, num_inference_steps)
    _check_ddim_start(config, int(timesteps[0]))
    bar, bar_next = _ddim_alpha_bars(config, timesteps)
    alpha, sigma, sigma_next = np.sqrt(bar), np.sqrt(1 - bar), np.sqrt(1 - bar_next)
    x0_x, x0_output = _x0_from(config, alpha, sigma)
    epsilon_x, epsilon_output = _epsilon_from(config, alpha, sigma)
    coefficients = _table(
        x0_x=x0_x,
        x0_output=x0_output,
        clip=config.clip_sample_range if config.clip_sample else np.inf,
        x_x=sigma_next * epsilon_x,
        x_x0=np.sqrt(bar_next),
        x_output=sigma_next * epsilon_output,
    )
    ones = np.ones(num_inference_steps, np.float32)
    return Trajectory(timesteps.astype(np.float32), ones, coefficients, 1.0)


def _ddim_alpha_bars(
    config: SchedulerConfig, timesteps: NDArray[np.int64]
) -> tuple[_Column, _Column]:
    """[N] alphas_cumprod before and after each step."""
    alpha_bar = alphas_cumprod(config).astype(np.float64)
    final = 1.0 if config.set_alpha_to_one else alpha_bar[0]
    # not the next of `timesteps`: diffusers always goes train // N down, whatever the spacing
    previous = timesteps - config.num_train_timesteps // len(timesteps)
    return alpha_bar[timesteps], np.where(previous >= 0, alpha_bar[previous], final)


def _check_ddim_start(config: SchedulerConfig, timestep: int) -> None:
    last = config.num_train_timesteps - 1
    if timestep > last:
        raise OptionError(
            f"steps_offset {config.steps_offset} starts ddim at timestep {timestep}, past the last "
            f"one, {last}; use a smaller num_inference_steps"
        )
    if timestep == last and config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise OptionError(
            f"ddim cannot predict x0 from epsilon at timestep {last}, where rescale_betas_zero_snr "
            "leaves only noise; use sampler euler or dpmpp_2m"
        )


def _euler(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """Euler on x / alpha, whose noise has standard deviation sigma (EDM, algorithm 1)."""
    timesteps = euler_timesteps(config, num_inference_steps)
    sigmas = noise_sigmas(config, timesteps).astype(np.float64)
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    alpha = 1 / np.sqrt(sigma**2 + 1)
    x0_x, x0_output = _x0_from(config, alpha, sigma * alpha)
    ratio: _Column = sigma_next / sigma
    coefficients = _table(x0_x=x0_x * alpha, x0_output=x0_output, x_x=ratio, x_x0=1 - ratio)
    leading = config.timestep_spacing == "leading"
    init_noise_sigma = np.sqrt(sigma[0] ** 2 + 1) if leading else sigma[0]
    return Trajectory(timesteps, alpha.astype(np.float32), coefficients, float(init_noise_sigma))


def _dpmpp_2m(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """DPM-Solver++(2M), midpoint (https://arxiv.org/abs/2211.01095, algorithm 2)."""
    timesteps = dpmpp_2m_timesteps(config, num_inference_steps)
    sigmas = noise_sigmas(config, timesteps).astype(np.float64)
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    x0_x, x0_output = _x0_from(config, alphas[:-1], (sigmas * alphas)[:-1])
    ratio = sigmas[1:] / sigmas[:-1]  # e^-h, where h is the step in log(alpha / sigma)
    first_order = alphas[1:] * (1 - ratio)
    second_order = first_order * _half_over_r(ratio)
    coefficients = _table(
        x0_x=x0_x,
        x0_output=x0_output,
        x_x=ratio * alphas[1:] / alphas[:-1],
        x_x0=first_order + second_order,
        x_x0_previous=-second_order,
    )
    ones = np.ones(num_inference_steps, np.float32)
    return Trajectory(timesteps.astype(np.float32), ones, coefficients, 1.0)


def _half_over_r(ratio: _Column) -> _Column:
    """[N] the paper's 1 / (2 r) = h / (2 h_previous); 0 where the step is of first order.

    That is at both ends, and where the step before had no length (where diffusers divides by 0).
    """
    half_over_r = np.zeros_like(ratio)
    h = -np.log(ratio[:-1])  # the last step goes to sigma 0: h is infinite
    inner = np.zeros_like(h)
    np.divide(h[1:], 2 * h[:-1], out=inner[1:], where=h[:-1] > 0)
    half_over_r[:-1] = inner
    return half_over_r


def _flow_euler(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """Euler on the straight path x = (1 - sigma) x0 + sigma noise; the output is noise - x0."""
    sigmas = flow_sigmas(config, num_inference_steps)
    coefficients = _table(x0_x=1.0, x0_output=-sigmas[:-1], x_x=1.0, x_output=np.diff(sigmas))
    timesteps = sigmas[:-1] * np.float32(config.num_train_timesteps)
    return Trajectory(timesteps, np.ones_like(timesteps), coefficients, 1.0)


def _x0_from(config: SchedulerConfig, alpha: _Column, sigma: _Column) -> tuple[_Column, _Column]:
    """The factors of x = alpha x0 + sigma epsilon and of the network output that give x0."""
    match config.prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":  # v = alpha epsilon - sigma x0
            return alpha, -sigma
        case _:
            return np.zeros_like(alpha), np.ones_like(alpha)


def _epsilon_from(
    config: SchedulerConfig, alpha: _Column, sigma: _Column
) -> tuple[_Column, _Column]:
    """The factors of x and of the network output that give epsilon, as `_x0_from` before clip."""
    match config.prediction_type:
        case "epsilon":
            return np.zeros_like(alpha), np.ones_like(alpha)
        case "v_prediction":
            return sigma, alpha
        case _:
            return 1 / sigma, -alpha / sigma


def _table(
    *,
    x0_x: _Column | float,
    x0_output: _Column | Array,
    clip: float = np.inf,
    x_x: _Column | float,
    x_x0: _Column | float = 0.0,
    x_x0_previous: _Column | float = 0.0,
    x_output: _Column | Array | float = 0.0,
) -> Array:
    """[N, len(COLUMNS)], in the order of COLUMNS; rounded to float32 only here."""
    columns = (x0_x, x0_output, clip, x_x, x_x0, x_x0_previous, x_output)
    table: NDArray[np.float64] = np.stack(np.broadcast_arrays(*columns), axis=-1)
    return table.astype(np.float32)
