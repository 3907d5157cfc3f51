"""Noise levels and timesteps of a `SchedulerConfig`, as diffusers has them."""

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import OptionError
from engine.scheduler_config import SchedulerConfig

Array = NDArray[np.float32]
FlowSpacing = Literal["scheduler", "linear"]

KARRAS_RHO = 7.0  # EDM (https://arxiv.org/abs/2206.00364), equation 5


@lru_cache(maxsize=32)
def alphas_cumprod(config: SchedulerConfig) -> NDArray[np.float32]:
    """[num_train_timesteps] product of 1 - beta up to each timestep: the signal's variance."""
    betas = _betas(config)
    if config.rescale_betas_zero_snr:
        betas = _rescale_zero_terminal_snr(betas)
    alphas = _cumprod(1 - betas)
    alphas.setflags(write=False)
    return alphas


def _betas(config: SchedulerConfig) -> NDArray[np.float32]:
    """[num_train_timesteps] variance of the noise that each training timestep adds."""
    count, first, last = config.num_train_timesteps, config.beta_start, config.beta_end
    betas: NDArray[np.float64]
    match config.beta_schedule:
        case "linear":
            betas = np.linspace(first, last, count)
        case "scaled_linear":
            betas = np.linspace(first**0.5, last**0.5, count) ** 2
        case "squaredcos_cap_v2":
            time = np.arange(count + 1) / count
            alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas.astype(np.float32)


def _rescale_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas whose last timestep is pure noise (https://arxiv.org/abs/2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    rescaled: NDArray[np.float32] = 1 - alphas
    return rescaled


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cumulative product that sums up in float64 and stores float32, as torch does on a CPU."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def ddim_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """[N] timesteps of DDIMScheduler, falling."""
    train = config.num_train_timesteps
    match config.timestep_spacing or "leading":
        case "leading":
            return _leading(config, train // num_inference_steps, num_inference_steps)
        case "trailing":
            return _trailing(train, num_inference_steps)
        case "linspace":
            linear = np.linspace(0, train - 1, num_inference_steps)
            return linear.round()[::-1].astype(np.int64)


def _euler_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.float32]:
    """[N] timesteps of EulerDiscreteScheduler and its kin, falling; linspace gives fractions."""
    if (config.timestep_spacing or "linspace") == "linspace":
        last = config.num_train_timesteps - 1
        return np.linspace(0, last, num_inference_steps, dtype=np.float32)[::-1].copy()
    return ddim_timesteps(config, num_inference_steps).astype(np.float32)


def _dpmpp_2m_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
    """[N] timesteps of DPMSolverMultistepScheduler, falling.

    Leading and linspace space N + 1 timesteps and leave the last one out.
    """
    train, count = config.num_train_timesteps, num_inference_steps + 1
    match config.timestep_spacing or "linspace":
        case "leading":
            return _leading(config, train // count, count)[:-1]
        case "trailing":
            return _trailing(train, num_inference_steps)
        case "linspace":
            return np.linspace(0, train - 1, count).round()[::-1][:-1].astype(np.int64)


def _leading(config: SchedulerConfig, ratio: int, count: int) -> NDArray[np.int64]:
    return np.arange(count)[::-1] * ratio + config.steps_offset


def _trailing(train: int, count: int) -> NDArray[np.int64]:
    # diffusers' arange has one timestep too many (-1) where train / count rounds down (count 61)
    return np.arange(train, 0, -train / count)[:count].round().astype(np.int64) - 1


def lcm_timesteps(
    config: SchedulerConfig, num_inference_steps: int, strength: float = 1.0
) -> NDArray[np.int64]:
    """[N] timesteps of LCMScheduler, falling: N of the steps that the model was distilled on.

    `strength` below 1 chooses them from the last of these steps, for a row that starts from an
    image. Raises OptionError where there are fewer than N.
    """
    original = config.original_inference_steps
    left = int(original * strength)
    if num_inference_steps > left:
        raise OptionError(
            f"num_inference_steps must be 1..{left} for lcm at strength {strength:g}, "
            f"got {num_inference_steps}"
        )
    distilled = np.arange(left, 0, -1) * (config.num_train_timesteps // original) - 1
    chosen = np.linspace(0, left, num_inference_steps, endpoint=False)
    timesteps: NDArray[np.int64] = distilled[np.floor(chosen).astype(np.int64)]
    return timesteps


def euler_schedule(config: SchedulerConfig, num_inference_steps: int) -> tuple[Array, Array]:
    """[N] timesteps and [N + 1] sigmas (noise over signal) of EulerDiscreteScheduler."""
    timesteps = _euler_timesteps(config, num_inference_steps)
    training = _training_sigmas(config)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if config.use_karras_sigmas:
        sigmas = _karras(config, sigmas[0], sigmas[-1], num_inference_steps)
        timesteps = _timesteps_at(sigmas, training).astype(np.float32)
    return timesteps, _with_last_sigma(config, sigmas)


def dpmpp_2m_schedule(
    config: SchedulerConfig, num_inference_steps: int
) -> tuple[NDArray[np.int64], Array]:
    """[N] timesteps and [N + 1] sigmas (noise over signal) of DPMSolverMultistepScheduler."""
    training = _training_sigmas(config)
    if not config.use_karras_sigmas:
        timesteps = _dpmpp_2m_timesteps(config, num_inference_steps)
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
        return timesteps, _with_last_sigma(config, sigmas)
    sigmas = _karras(config, float(training[-1]), float(training[0]), num_inference_steps)
    exact = _timesteps_at(sigmas, training)
    whole = exact if config.beta_schedule == "squaredcos_cap_v2" else exact.round()
    return whole.astype(np.int64), _with_last_sigma(config, sigmas)


def _training_sigmas(config: SchedulerConfig) -> Array:
    """[num_train_timesteps] noise over signal, sqrt((1 - alpha) / alpha), rising."""
    alphas = alphas_cumprod(config).copy()
    if config.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # diffusers' stand-in for 0, so that the first sigma is finite
    sigmas: Array = np.sqrt((1 - alphas) / alphas)
    return sigmas


def _with_last_sigma(config: SchedulerConfig, sigmas: NDArray[np.float64]) -> Array:
    last = 0.0 if config.final_sigmas_type == "zero" else _training_sigmas(config)[0]
    return np.append(sigmas, last).astype(np.float32)


def _karras(
    config: SchedulerConfig, first: float, last: float, num_inference_steps: int
) -> NDArray[np.float64]:
    """[N] sigmas whose 7th roots fall evenly, between the config's bounds or else those given."""
    highest = (config.sigma_max or first) ** (1 / KARRAS_RHO)
    lowest = (config.sigma_min or last) ** (1 / KARRAS_RHO)
    falling: NDArray[np.float64] = np.linspace(highest, lowest, num_inference_steps) ** KARRAS_RHO
    return falling


def _timesteps_at(sigmas: NDArray[np.float64], training: Array) -> NDArray[np.float64]:
    """[N] fractional timesteps at which the noise schedule, linear in log sigma, has `sigmas`."""
    # float32 as the schedule, so that its own ends are hit and not rounded off with a fraction
    levels = np.log(sigmas).astype(np.float32)
    timesteps: NDArray[np.float64] = np.interp(levels, np.log(training), np.arange(len(training)))
    return timesteps


def flow_shift(config: SchedulerConfig, image_seq_len: int | None) -> float:
    """How far flow sigmas are moved towards noise: 1 not at all.

    Dynamic shifting goes by the length of the image's token sequence, as in diffusers' Flux and
    Stable Diffusion 3 pipelines (https://arxiv.org/abs/2403.03206, section 5.3.2).

    Raises:
        OptionError: the config shifts by image_seq_len, and it is None or not positive.
    """
    if not config.use_dynamic_shifting:
        return config.shift
    if image_seq_len is None or image_seq_len < 1:
        raise OptionError(
            "image_seq_len must be the number of the image's tokens with use_dynamic_shifting, "
            f"got {image_seq_len}"
        )
    span = config.max_image_seq_len - config.base_image_seq_len
    slope = (config.max_shift - config.base_shift) / span
    mu = image_seq_len * slope + config.base_shift - slope * config.base_image_seq_len
    return mu if config.time_shift_type == "linear" else float(np.exp(mu))


def flow_sigmas(
    config: SchedulerConfig,
    num_inference_steps: int,
    image_seq_len: int | None,
    spacing: FlowSpacing,
) -> Array:
    """[N + 1] noise levels of FlowMatchEulerDiscreteScheduler, from 1 to a final 0.

    `spacing` is how a pipeline calls `set_timesteps`: with the number of steps alone ("scheduler"),
    or with `sigmas=linspace(1, 1 / N, N)` ("linear").
    """
    shift = flow_shift(config, image_seq_len)
    lowest = 1 / (config.num_train_timesteps if spacing == "scheduler" else num_inference_steps)
    ends = np.array([1.0, lowest])
    if spacing == "scheduler" and not config.use_dynamic_shifting:
        ends = _shift(ends, shift)  # diffusers shifts the training sigmas, then their spacing
    sigmas = _shift(np.linspace(ends[0], ends[1], num_inference_steps), shift)
    if config.shift_terminal:
        sigmas = 1 - (1 - sigmas) * (1 - config.shift_terminal) / (1 - sigmas[-1])
    if config.use_karras_sigmas:
        sigmas = _karras(config, sigmas[0], sigmas[-1], num_inference_steps)
    return np.append(sigmas, 0.0).astype(np.float32)


def flow_dpmpp_2m_schedule(
    config: SchedulerConfig, num_inference_steps: int, image_seq_len: int | None
) -> tuple[NDArray[np.int64], Array]:
    """[N] timesteps and [N + 1] noise levels of DPMSolverMultistepScheduler with flow sigmas."""
    train = config.num_train_timesteps
    rising = 1 - np.linspace(1, 1 / train, num_inference_steps + 1)
    sigmas = _shift(rising, flow_shift(config, image_seq_len))[:0:-1]
    return (sigmas * train).astype(np.int64), np.append(sigmas, 0.0).astype(np.float32)


def _shift(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
