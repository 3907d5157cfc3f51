"""Samplers as tables of coefficients, so that rows of different samplers share one solver step."""

from functools import lru_cache

import numpy as np

from engine import solvers
from engine.errors import OptionError
from engine.scheduler_config import SchedulerConfig
from engine.schedules import (
    FlowSpacing,
    dpmpp_2m_schedule,
    flow_dpmpp_2m_schedule,
    flow_sigmas,
)
from engine.trajectory import Array, Trajectory

DISCRETE_SAMPLERS = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "lcm")
FLOW_SAMPLERS = ("flow_euler", "heun", "dpmpp_2m")
SAMPLERS = (*DISCRETE_SAMPLERS, "flow_euler")

# The keys that change a config's noise schedule or solver, but that the sampler's diffusers class
# does not have (solver_order: that we do not have).
_NOT_HONOURED = {
    "ddim": ("use_karras_sigmas", "final_sigmas_type"),
    "euler_ancestral": ("use_karras_sigmas", "final_sigmas_type"),
    "heun": (
        "final_sigmas_type", "rescale_betas_zero_snr", "use_dynamic_shifting", "shift_terminal",
    ),
    "dpmpp_2m": ("solver_order", "time_shift_type", "shift_terminal"),
    "lcm": ("use_karras_sigmas", "final_sigmas_type"),
}  # fmt: skip
_MEANT = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}


def samplers_for(config: SchedulerConfig) -> tuple[str, ...]:
    """The samplers that can run a checkpoint with this scheduler config."""
    family = FLOW_SAMPLERS if config.is_flow else DISCRETE_SAMPLERS
    return tuple(sampler for sampler in family if not _not_honoured(sampler, config))


def default_sampler(config: SchedulerConfig) -> str:
    """The sampler that the config's scheduler class means, or else dpmpp_2m.

    Where keys of the config rule both out it is the first of `samplers_for`.
    """
    offered = samplers_for(config)
    wanted = (_MEANT.get(config.scheduler_class), "dpmpp_2m")
    return next((sampler for sampler in wanted if sampler in offered), offered[0])


@lru_cache(maxsize=256)
def trajectory(
    sampler: str,
    config: SchedulerConfig,
    num_inference_steps: int,
    image_seq_len: int | None = None,
    sigmas: FlowSpacing = "scheduler",
    lcm_strength: float = 1.0,
) -> Trajectory:
    """The timesteps and coefficients of one request; equal to diffusers' scheduler of that name.

    Args:
        sampler: one of `samplers_for(config)`.
        config: the checkpoint's.
        num_inference_steps: steps, each one network call, but for heun two and one at the end.
        image_seq_len: tokens of the image; only a flow config with use_dynamic_shifting needs it.
        sigmas: how the flow pipeline calls `set_timesteps`: Stable Diffusion 3 leaves the spacing
            to the "scheduler", Flux gives it as "linear". `dpmpp_2m` always has its own.
        lcm_strength: of an image for sampler lcm, whose steps are then the last ones; start at 0.

    Raises:
        OptionError: the sampler does not fit the config, the number of steps is out of range, or
            image_seq_len is missing.
    """
    _check_sampler(sampler, config)
    _check_steps(sampler, config, num_inference_steps)
    match sampler, config.is_flow:
        case "ddim", _:
            return solvers.ddim(config, num_inference_steps)
        case "lcm", _:
            return solvers.lcm(config, num_inference_steps, lcm_strength)
        case "euler", _:
            return solvers.euler(config, num_inference_steps)
        case "euler_ancestral", _:
            return solvers.euler_ancestral(config, num_inference_steps)
        case "heun", False:
            return solvers.heun(config, num_inference_steps)
        case "dpmpp_2m", False:
            return solvers.dpmpp_2m(config, *dpmpp_2m_schedule(config, num_inference_steps))
        case "dpmpp_2m", True:
            schedule = flow_dpmpp_2m_schedule(config, num_inference_steps, image_seq_len)
            return solvers.dpmpp_2m(config, *schedule)
        case _:
            solver = solvers.flow_heun if sampler == "heun" else solvers.flow_euler
            return solver(config, flow_sigmas(config, num_inference_steps, image_seq_len, sigmas))


def step(
    x: Array,
    output: Array,
    x_previous: Array,
    x0_previous: Array,
    noise: Array,
    coefficients: Array,
) -> tuple[Array, Array]:
    """One solver step of every row: (x_next, x0), both [B, ...].

    A row's result has the same bytes in any batch: there are only elementwise operations.

    Args:
        x: [B, ...] state, before `input_scale`.
        output: [B, ...] raw network output, after guidance.
        x_previous: [B, ...] the x of the step before; zeros at the first step.
        x0_previous: [B, ...] the x0 that the step before returned; zeros at the first step.
        noise: [B, ...] fresh noise of the rows whose step adds some; anything finite elsewhere.
        coefficients: [B, len(COLUMNS)] one row of a `Trajectory.coefficients` for each row of x.
    """
    rows = (len(x),) + (1,) * (x.ndim - 1)
    x0_x, x0_output, clip, x_x, x_x0, x_output, x_x_previous, x_x0_previous, x_noise = (
        column.reshape(rows) for column in coefficients.T
    )
    x0 = np.clip(x0_x * x + x0_output * output, -clip, clip)
    x_next = x_x * x + x_x0 * x0 + x_output * output
    x_next += x_x_previous * x_previous + x_x0_previous * x0_previous + x_noise * noise
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


def _not_honoured(sampler: str, config: SchedulerConfig) -> str | None:
    """The first key of the config whose value rules the sampler out."""
    keys = _NOT_HONOURED.get(sampler, ())
    if config.is_flow and sampler != "flow_euler":
        keys += ("use_karras_sigmas",)
    for key in keys:
        value = getattr(config, key)
        if value and value != SchedulerConfig.model_fields[key].default:
            return key
    if sampler == "euler_ancestral" and config.prediction_type == "sample":
        return "prediction_type"
    if sampler == "lcm" and config.original_inference_steps > config.num_train_timesteps:
        return "original_inference_steps"
    return None


def _check_sampler(sampler: str, config: SchedulerConfig) -> None:
    allowed = ", ".join(samplers_for(config))
    if sampler not in (FLOW_SAMPLERS if config.is_flow else DISCRETE_SAMPLERS):
        raise OptionError(f"sampler must be one of {allowed}, got {sampler!r}")
    key = _not_honoured(sampler, config)
    if key is not None:
        raise OptionError(
            f"sampler {sampler} does not honour {key} {getattr(config, key)!r} of the checkpoint's "
            f"scheduler_config.json; use one of {allowed}"
        )


def _check_steps(sampler: str, config: SchedulerConfig, num_inference_steps: int) -> None:
    least, most = 1, config.num_train_timesteps
    if config.shift_terminal:
        least = 2  # the last sigma is moved and the first stays
    if sampler == "dpmpp_2m" and config.timestep_spacing == "leading":
        most -= 1  # it spaces one timestep more than it uses
    if sampler == "lcm":
        most = config.original_inference_steps
    if not least <= num_inference_steps <= most:
        raise OptionError(f"num_inference_steps must be {least}..{most}, got {num_inference_steps}")
