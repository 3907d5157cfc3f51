"""Noise levels and timesteps from a checkpoint's `scheduler_config.json`, as diffusers has them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.errors import OptionError
from engine.options import Options

TimestepSpacing = Literal["leading", "trailing", "linspace"]

DISCRETE_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
)
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"

# Keys that we do not act on, with the values that leave our samplers as they are in diffusers.
# An empty tuple: every value, because the key only matters to a part that is off or not ours.
_ANY: tuple[object, ...] = ()
_OFF: tuple[object, ...] = (False, None)
_NEUTRAL_FLOW: dict[str, tuple[object, ...]] = {
    "use_dynamic_shifting": _OFF,
    "base_shift": _ANY,  # this and the next four: dynamic shifting only
    "max_shift": _ANY,
    "base_image_seq_len": _ANY,
    "max_image_seq_len": _ANY,
    "time_shift_type": _ANY,
    "invert_sigmas": _OFF,
    "shift_terminal": _OFF,
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "stochastic_sampling": _OFF,
}
_NEUTRAL_DISCRETE: dict[str, tuple[object, ...]] = {
    "thresholding": _OFF,
    "dynamic_thresholding_ratio": _ANY,  # this and the next: thresholding only
    "sample_max_value": _ANY,
    # the noise that DDPM adds; deterministic samplers add none
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "interpolation_type": ("linear",),
    "use_exponential_sigmas": _OFF,
    "use_beta_sigmas": _OFF,
    "sigma_min": _ANY,  # this and the next: Karras, exponential and beta sigmas only
    "sigma_max": _ANY,
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "solver_order": (2,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    "lower_order_final": _ANY,  # this and the next: order 2 to sigma 0 ends in order 1 anyway
    "euler_at_final": _ANY,
    "use_lu_lambdas": _OFF,
    "use_flow_sigmas": _OFF,
    "flow_shift": _ANY,
    "lambda_min_clipped": (float("-inf"),),
    "use_dynamic_shifting": _OFF,
    "time_shift_type": _ANY,
    "skip_prk_steps": _ANY,  # a PNDM key that Stable Diffusion's DDIM and Euler configs carry
}
_FLOW_FIELDS = ("num_train_timesteps", "shift", "use_karras_sigmas")


class SchedulerConfig(Options):
    """What a `scheduler_config.json` says about the noise schedule; construct with `parse`.

    Names and defaults are diffusers'. `timestep_spacing` None: the config does not say, and each
    sampler takes its diffusers class's own default.
    """

    num_train_timesteps: int = Field(default=1000, ge=1)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = Field(default=0, ge=0)
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = Field(default=1.0, gt=0)
    rescale_betas_zero_snr: bool = False
    shift: float = Field(default=1.0, gt=0)
    use_karras_sigmas: Literal[False] | None = False

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching (else a discrete noise schedule)."""
        return self.prediction_type == "flow_prediction"

    @classmethod
    def parse(
        cls, values: Mapping[str, object], source: str = "scheduler_config.json"
    ) -> "SchedulerConfig":
        """Read the JSON object of a `scheduler_config.json`.

        Raises:
            OptionError: the scheduler class is not known, or a key has a value that our samplers
                would not honour.
        """
        class_name = values.get("_class_name")
        is_flow = class_name == FLOW_CLASS
        if not is_flow and class_name not in DISCRETE_CLASSES:
            known = ", ".join((*DISCRETE_CLASSES, FLOW_CLASS))
            raise _error("_class_name", f"must be one of {known}", class_name)
        fields = _honoured(values, is_flow)
        if is_flow:
            fields["prediction_type"] = "flow_prediction"
        elif fields.get("prediction_type") == "flow_prediction":
            allowed = "must be epsilon, v_prediction or sample"
            raise _error("prediction_type", f"{allowed} for {class_name}", "flow_prediction")
        return super().parse(fields, source)


def _error(key: str, must_be: str, value: object) -> OptionError:
    return OptionError(f"scheduler_config.json: {key} {must_be}, got {value!r}")


def _honoured(scheduler_config: Mapping[str, object], is_flow: bool) -> dict[str, object]:
    """The keys that are fields; every other key is checked to have no effect."""
    fields = _FLOW_FIELDS if is_flow else set(SchedulerConfig.model_fields) - {"shift"}
    neutral = _NEUTRAL_FLOW if is_flow else _NEUTRAL_DISCRETE
    honoured = {}
    for key, value in scheduler_config.items():
        if key in fields:
            honoured[key] = value
        elif not key.startswith("_"):
            _check_neutral(key, value, neutral)
    return honoured


def _check_neutral(key: str, value: object, neutral: Mapping[str, tuple[object, ...]]) -> None:
    if key not in neutral:
        raise OptionError(
            f"scheduler_config.json: {key} (here {value!r}) is not a key that "
            "Vitrine knows; remove it"
        )
    allowed = neutral[key]
    if allowed and value not in allowed:
        raise _error(key, f"must be {' or '.join(map(repr, allowed))}", value)


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


def euler_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.float32]:
    """[N] timesteps of EulerDiscreteScheduler, falling; linspace gives fractions."""
    if (config.timestep_spacing or "linspace") == "linspace":
        last = config.num_train_timesteps - 1
        return np.linspace(0, last, num_inference_steps, dtype=np.float32)[::-1].copy()
    return ddim_timesteps(config, num_inference_steps).astype(np.float32)


def dpmpp_2m_timesteps(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.int64]:
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


def noise_sigmas(
    config: SchedulerConfig, timesteps: NDArray[np.int64] | NDArray[np.float32]
) -> NDArray[np.float32]:
    """[N + 1] noise over signal, sqrt((1 - alpha) / alpha), at `timesteps` [N], then a final 0."""
    alphas = alphas_cumprod(config).copy()
    if config.rescale_betas_zero_snr:
        alphas[-1] = 2.0**-24  # diffusers' stand-in for 0, so that the first sigma is finite
    sigmas = np.sqrt((1 - alphas) / alphas)
    at_timesteps = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    return np.append(at_timesteps, 0.0).astype(np.float32)


def flow_sigmas(config: SchedulerConfig, num_inference_steps: int) -> NDArray[np.float32]:
    """[N + 1] noise levels of FlowMatchEulerDiscreteScheduler, from 1 to a final 0."""
    train = config.num_train_timesteps
    # diffusers shifts twice: the training sigmas first, then their spacing
    sigma_max, sigma_min = _shift(np.array([1, 1 / train]), config.shift)
    spaced = np.linspace(sigma_max, sigma_min, num_inference_steps)
    return np.append(_shift(spaced, config.shift), 0.0).astype(np.float32)


def _shift(sigmas: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * sigmas / (1 + (shift - 1) * sigmas)
