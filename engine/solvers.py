"""One function a sampler: a schedule in, its trajectory out.

Two kinds of x: ddim, dpmpp_2m and lcm have x = alpha x0 + sigma epsilon with the network's own
alpha and sigma; euler, euler_ancestral and heun have x = x0 + sigma epsilon, scaled for each call.
Flow matching has x = (1 - sigma) x0 + sigma epsilon.
"""

import numpy as np
from numpy.typing import NDArray

from engine.errors import OptionError
from engine.scheduler_config import SchedulerConfig
from engine.schedules import alphas_cumprod, ddim_timesteps, euler_schedule, lcm_timesteps
from engine.trajectory import Array, Column, Trajectory, table


def ddim(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """DDIM with eta 0 (https://arxiv.org/abs/2010.02502, equation 12)."""
    timesteps = ddim_timesteps(config, num_inference_steps)
    _check_start("ddim", config, int(timesteps[0]))
    bar, bar_next = _ddim_alpha_bars(config, timesteps)
    alpha, sigma, sigma_next = np.sqrt(bar), np.sqrt(1 - bar), np.sqrt(1 - bar_next)
    x0_x, x0_output = _x0_from(config, alpha, sigma)
    epsilon_x, epsilon_output = _epsilon_from(config, alpha, sigma)
    clip_sample = config.clip_sample is not False
    coefficients = table(
        x0_x=x0_x,
        x0_output=x0_output,
        clip=config.clip_sample_range if clip_sample else np.inf,
        x_x=sigma_next * epsilon_x,
        x_x0=np.sqrt(bar_next),
        x_output=sigma_next * epsilon_output,
    )
    return _unscaled(config, timesteps, alpha, sigma, coefficients)


def _ddim_alpha_bars(
    config: SchedulerConfig, timesteps: NDArray[np.int64]
) -> tuple[Column, Column]:
    """[N] alphas_cumprod before and after each step."""
    alpha_bar = alphas_cumprod(config).astype(np.float64)
    final = 1.0 if config.set_alpha_to_one else alpha_bar[0]
    # not the next of `timesteps`: diffusers always goes train // N down, whatever the spacing
    previous = timesteps - config.num_train_timesteps // len(timesteps)
    return alpha_bar[timesteps], np.where(previous >= 0, alpha_bar[previous], final)


def _check_start(sampler: str, config: SchedulerConfig, timestep: int) -> None:
    last = config.num_train_timesteps - 1
    if timestep > last:
        raise OptionError(
            f"steps_offset {config.steps_offset} starts {sampler} at timestep {timestep}, past the "
            f"last one, {last}; use a smaller num_inference_steps"
        )
    if timestep == last and config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise OptionError(
            f"{sampler} cannot predict x0 from epsilon at timestep {last}, where "
            "rescale_betas_zero_snr leaves only noise; use sampler euler or dpmpp_2m"
        )


def lcm(config: SchedulerConfig, num_inference_steps: int, strength: float = 1.0) -> Trajectory:
    """Multistep consistency sampling (https://arxiv.org/abs/2310.04378, algorithm 3)."""
    timesteps = lcm_timesteps(config, num_inference_steps, strength)
    _check_start("lcm", config, int(timesteps[0]))
    bar = alphas_cumprod(config)[timesteps].astype(np.float64)
    bar_next = np.append(bar[1:], 1.0)
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    x0_x, x0_output = _x0_from(config, alpha, sigma)
    sigma_data = 0.5
    scaled = timesteps * config.timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)  # the boundary condition, equation 9
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    coefficients = table(
        x0_x=x0_x,
        x0_output=x0_output,
        clip=config.clip_sample_range if config.clip_sample else np.inf,
        x_x=np.sqrt(bar_next) * c_skip,
        x_x0=np.sqrt(bar_next) * c_out,
        x_noise=np.sqrt(1 - bar_next),
    )
    return _unscaled(config, timesteps, alpha, sigma, coefficients)


def euler(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """Euler on x / alpha, whose noise has standard deviation sigma (EDM, algorithm 1)."""
    timesteps, sigmas = euler_schedule(config, num_inference_steps)
    sigma, ratio = _sigma_and_ratio(sigmas)
    x0_x, x0_output = _x0_from_scaled(config, sigma)
    coefficients = table(x0_x=x0_x, x0_output=x0_output, x_x=ratio, x_x0=1 - ratio)
    return _scaled(config, timesteps, sigma, coefficients, num_inference_steps)


def euler_ancestral(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """Euler to below the next sigma, then noise up to it (k-diffusion's sample_euler_ancestral)."""
    timesteps, sigmas = euler_schedule(config, num_inference_steps)
    sigma, ratio = _sigma_and_ratio(sigmas)
    x0_x, x0_output = _x0_from_scaled(config, sigma)
    # sigma_down^2 + sigma_up^2 = sigma_next^2, and sigma_down / sigma = ratio^2
    coefficients = table(
        x0_x=x0_x,
        x0_output=x0_output,
        x_x=ratio**2,
        x_x0=1 - ratio**2,
        x_noise=sigmas[1:] * np.sqrt(1 - ratio**2),
    )
    return _scaled(config, timesteps, sigma, coefficients, num_inference_steps)


def heun(config: SchedulerConfig, num_inference_steps: int) -> Trajectory:
    """Heun's second order on x / alpha (EDM, algorithm 1): two calls a step, one in the last."""
    timesteps, sigmas = euler_schedule(config, num_inference_steps)
    sigma = _twice(sigmas[:-1]).astype(np.float64)
    x0_x, x0_output = _x0_from_scaled(config, sigma)
    clip = config.clip_sample_range if config.clip_sample else np.inf
    coefficients = _heun_table(sigmas, x0_x, x0_output, clip)
    return _scaled(config, _twice(timesteps), sigma, coefficients, num_inference_steps)


def dpmpp_2m(config: SchedulerConfig, timesteps: NDArray[np.int64], sigmas: Array) -> Trajectory:
    """DPM-Solver++(2M), midpoint (https://arxiv.org/abs/2211.01095, algorithm 2)."""
    levels = sigmas.astype(np.float64)
    alphas = 1 - levels if config.is_flow else 1 / np.sqrt(levels**2 + 1)
    noise_levels = levels if config.is_flow else levels * alphas
    x0_x, x0_output = _x0_from(config, alphas[:-1], noise_levels[:-1])
    over_signal = noise_levels / alphas
    ratio = over_signal[1:] / over_signal[:-1]  # e^-h, where h is the step in log(alpha / sigma)
    first_order = alphas[1:] * (1 - ratio)
    second_order = first_order * _half_over_r(ratio, _ends_in_first_order(config, len(ratio)))
    coefficients = table(
        x0_x=x0_x,
        x0_output=x0_output,
        x_x=noise_levels[1:] / noise_levels[:-1],
        x_x0=first_order + second_order,
        x_x0_previous=-second_order,
    )
    return _unscaled(config, timesteps, alphas[:-1], noise_levels[:-1], coefficients)


def _ends_in_first_order(config: SchedulerConfig, num_inference_steps: int) -> bool:
    few = config.lower_order_final and num_inference_steps < 15  # diffusers' number
    return config.final_sigmas_type == "zero" or config.euler_at_final or few


def _half_over_r(ratio: Column, ends_in_first_order: bool) -> Column:
    """[N] the paper's 1 / (2 r) = h / (2 h_previous); 0 where the step is of first order.

    That is the first step, the last if asked for (to sigma 0 its h is infinite), and one after a
    step that had no length (where diffusers divides by 0).
    """
    end = len(ratio) - ends_in_first_order
    h = -np.log(ratio[:end])
    half_over_r = np.zeros_like(ratio)
    np.divide(h[1:], 2 * h[:-1], out=half_over_r[1:end], where=h[:-1] > 0)
    return half_over_r


def flow_euler(config: SchedulerConfig, sigmas: Array) -> Trajectory:
    """Euler on the straight path; the output is noise - x0."""
    coefficients = table(x0_x=1.0, x0_output=-sigmas[:-1], x_x=1.0, x_output=np.diff(sigmas))
    return _flow(config, sigmas[:-1], coefficients, len(sigmas) - 1)


def flow_heun(config: SchedulerConfig, sigmas: Array) -> Trajectory:
    """Heun's second order on the straight path, calls as in `heun`."""
    sigma = _twice(sigmas[:-1])
    coefficients = _heun_table(sigmas, 1.0, -sigma)
    return _flow(config, sigma, coefficients, len(sigmas) - 1)


def _heun_table(
    sigmas: Array, x0_x: Column | float, x0_output: Column | Array, clip: float = np.inf
) -> Array:
    """[2 N - 1, ...] an Euler step, then its correction from where it started, by turns.

    With d = (x - x0) / sigma, the correction is x_previous + (d_previous + d) / 2 * (the step).
    """
    sigma, ratio = _sigma_and_ratio(sigmas)
    half_step: Column = np.diff(sigma) / 2
    over_sigma: Column = half_step / sigma[:-1]
    over_next: Column = half_step / sigma[1:]
    zero = np.zeros_like(ratio)
    return table(
        x0_x=x0_x,
        x0_output=x0_output,
        clip=clip,
        x_x=_by_turns(ratio, over_next),
        x_x0=_by_turns(1 - ratio, -over_next),
        x_x_previous=_by_turns(zero, 1 + over_sigma),
        x_x0_previous=_by_turns(zero, -over_sigma),
    )


def _by_turns(steps: Column, corrections: Column) -> Column:
    """[2 N - 1] from [N] and [N - 1]: the last step has no correction."""
    column = np.empty(len(steps) + len(corrections))
    column[::2], column[1::2] = steps, corrections
    return column


def _twice(values: Array) -> Array:
    """[2 N - 1]: every value but the first is that of a correction and of the next step."""
    return np.repeat(values, 2)[1:]


def _sigma_and_ratio(sigmas: Array) -> tuple[Column, Column]:
    """[N] sigma before each step, and the sigma after it over that."""
    sigma = sigmas[:-1].astype(np.float64)
    return sigma, sigmas[1:] / sigma


def _unscaled(
    config: SchedulerConfig,
    timesteps: NDArray[np.int64],
    alpha: Column,
    sigma: Column,
    coefficients: Array,
) -> Trajectory:
    return Trajectory(
        timesteps=timesteps.astype(np.float32),
        input_scale=np.ones(len(timesteps), np.float32),
        signal=alpha.astype(np.float32),
        noise_level=sigma.astype(np.float32),
        coefficients=coefficients,
        init_noise_sigma=1.0,
        num_inference_steps=len(timesteps),
        is_flow=config.is_flow,
    )


def _scaled(
    config: SchedulerConfig,
    timesteps: Array,
    sigma: Column,
    coefficients: Array,
    num_inference_steps: int,
) -> Trajectory:
    first = sigma[0]
    leading = config.timestep_spacing == "leading"
    return Trajectory(
        timesteps=timesteps,
        input_scale=(1 / np.sqrt(sigma**2 + 1)).astype(np.float32),
        signal=np.ones_like(timesteps),
        noise_level=sigma.astype(np.float32),
        coefficients=coefficients,
        init_noise_sigma=float(np.sqrt(first**2 + 1) if leading else first),
        num_inference_steps=num_inference_steps,
        is_flow=False,
    )


def _flow(
    config: SchedulerConfig, sigma: Array, coefficients: Array, num_inference_steps: int
) -> Trajectory:
    return Trajectory(
        timesteps=sigma * np.float32(config.num_train_timesteps),
        input_scale=np.ones_like(sigma),
        signal=1 - sigma,
        noise_level=sigma,
        coefficients=coefficients,
        init_noise_sigma=1.0,
        num_inference_steps=num_inference_steps,
        is_flow=True,
    )


def _x0_from_scaled(config: SchedulerConfig, sigma: Column) -> tuple[Column, Column]:
    """As `_x0_from`, of x = x0 + sigma epsilon."""
    alpha = 1 / np.sqrt(sigma**2 + 1)
    x0_x, x0_output = _x0_from(config, alpha, sigma * alpha)
    return x0_x * alpha, x0_output


def _x0_from(config: SchedulerConfig, alpha: Column, sigma: Column) -> tuple[Column, Column]:
    """The factors of x = alpha x0 + sigma epsilon and of the network output that give x0."""
    match config.prediction_type:
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":  # v = alpha epsilon - sigma x0
            return alpha, -sigma
        case "flow_prediction":  # epsilon - x0, with alpha = 1 - sigma
            return np.ones_like(alpha), -sigma
        case "sample":
            return np.zeros_like(alpha), np.ones_like(alpha)


def _epsilon_from(config: SchedulerConfig, alpha: Column, sigma: Column) -> tuple[Column, Column]:
    """The factors of x and of the network output that give epsilon, as `_x0_from` before clip."""
    match config.prediction_type:
        case "epsilon":
            return np.zeros_like(alpha), np.ones_like(alpha)
        case "v_prediction":
            return sigma, alpha
        case _:
            return 1 / sigma, -alpha / sigma
