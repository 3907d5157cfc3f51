"""The denoising loop of diffusers' pipelines and ours, over the same network, call by call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from engine.noise import Noise
from engine.samplers import step, trajectory
from engine.scheduler_config import SchedulerConfig
from engine.schedules import FlowSpacing
from engine.trajectory import COLUMNS, Array, Trajectory

Network = Callable[[Array, float], Array]  # (sample, timestep) -> raw prediction
RawConfig = dict[str, object]

DISCRETE = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}
FLOW = {
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
SHAPE = (2, 3, 8, 8)
SEED = 3
X_NOISE = COLUMNS.index("x_noise")

# Both sides compute in float32 on values of a few units. x0 = (x - sigma epsilon) / alpha turns a
# rounding of x (2^-24 |x|, |x| < 4) into sigma / alpha times as much, and Euler's x has that
# size itself: that is over BOUND only for squaredcos, where sigma / alpha starts at 20,000.
BOUND = 1e-4
ROUNDING = 4 * 2**-24


@dataclass(frozen=True)
class Run:
    """One whole trajectory: what a user chooses, and how the pipeline of the family asks for it."""

    sampler: str
    raw: RawConfig
    steps: int
    image_seq_len: int | None = None
    sigmas: FlowSpacing = "scheduler"
    strength: float | None = None  # from a picture, or none: from noise
    network: Network = field(default=lambda sample, timestep: sample)
    double: bool = False  # let diffusers' scheduler compute in float64

    @property
    def is_flow(self) -> bool:
        return self.config.is_flow

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig.parse(self.raw)

    @property
    def plan(self) -> Trajectory:
        asked = (self.steps, self.image_seq_len, self.sigmas)
        return trajectory(self.sampler, self.config, *asked)


def is_flow(raw: RawConfig) -> bool:
    return SchedulerConfig.parse(raw).is_flow


def picture() -> Array:
    return np.linspace(-1, 1, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)


def ours(run: Run) -> Iterator[Array]:
    """x after every network call."""
    plan, generator, begin = run.plan, Noise(SEED), 0
    if run.strength is None:
        x = generator(SHAPE) * np.float32(plan.init_noise_sigma)
    else:
        begin = plan.start(run.strength)
        plan = plan.begun_at(begin)
        x = plan.signal[begin] * picture() + plan.noise_level[begin] * generator(SHAPE)
    x_previous = x0 = np.zeros_like(x)
    for index in range(begin, len(plan.timesteps)):
        row = plan.coefficients[index]
        output = run.network(x * plan.input_scale[index], float(plan.timesteps[index]))
        fresh = generator(SHAPE) if row[X_NOISE] else np.zeros_like(x)
        x_next, x0 = step(x, output, x_previous, x0, fresh, np.stack([row] * len(x)))
        x_previous, x = x, x_next
        yield x


def scheduler_of(run: Run):  # type: ignore[no-untyped-def]  # one of nine classes without a base
    """diffusers' scheduler of a sampler, its timesteps set as the pipeline of the family does."""
    if not run.is_flow:
        scheduler = DISCRETE[run.sampler].from_config(run.raw)
        scheduler.set_timesteps(run.steps)
        return scheduler
    shift = run.raw.get("shift", run.raw.get("flow_shift", 1.0))
    solver: RawConfig = {"shift": shift}
    if run.sampler == "dpmpp_2m":
        solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        solver["flow_shift"] = shift
    scheduler = FLOW[run.sampler].from_config({**run.raw, **solver})
    arguments: dict[str, object] = {}
    if run.raw.get("use_dynamic_shifting"):
        arguments["mu"] = calculate_shift(run.image_seq_len, *_shift_bounds(run.raw))
    if run.sigmas == "linear" and run.sampler == "flow_euler":
        arguments["sigmas"] = np.linspace(1.0, 1 / run.steps, run.steps)
    else:
        arguments["num_inference_steps"] = run.steps
    scheduler.set_timesteps(**arguments)
    return scheduler


def _shift_bounds(raw: RawConfig) -> tuple[object, ...]:
    defaults = {
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
    }  # fmt: skip
    return tuple(raw.get(key, default) for key, default in defaults.items())


def theirs(run: Run) -> Iterator[Array]:
    """x after every network call of diffusers, whose scheduler draws from the same generator."""
    scheduler = scheduler_of(run)
    generator = torch.Generator().manual_seed(SEED)
    x, timesteps = torch.randn(SHAPE, generator=generator), scheduler.timesteps
    if run.strength is None:
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        timesteps = image_to_image_timesteps(scheduler, run)
        add_noise = getattr(scheduler, "scale_noise", None)
        first = timesteps[:1].repeat(len(x))
        if add_noise is None:
            x = scheduler.add_noise(torch.from_numpy(picture()), x, first)
        else:
            x = add_noise(torch.from_numpy(picture()), first, x)
    if run.double:
        scheduler.sigmas, x = scheduler.sigmas.double(), x.double()
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    draws = {"generator": generator} if run.sampler in ("euler_ancestral", "lcm") else {}
    for timestep in timesteps:
        output = run.network(scale(x, timestep).numpy(), float(timestep))
        x = scheduler.step(torch.from_numpy(output), timestep, x, **draws).prev_sample
        yield x.numpy()


def image_to_image_timesteps(scheduler, run: Run) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The timesteps that a picture goes through, as diffusers' own pipelines cut them."""
    pipeline = FluxImg2ImgPipeline if run.is_flow else StableDiffusionImg2ImgPipeline
    timesteps, _ = pipeline.get_timesteps(
        SimpleNamespace(scheduler=scheduler), run.steps, run.strength, "cpu"
    )
    return timesteps


def deviation(run: Run) -> float:
    """The worst difference of x after any call, in units of its own standard deviation.

    The x of Euler and its kin is x0 + sigma epsilon with sigma up to 20,000, where one float32
    rounding is 1e-3: it is divided by sqrt(sigma^2 + 1), which is what the network sees.
    """
    plan = run.plan
    scales = np.append(plan.input_scale[1:], 1.0)
    our_xs, their_xs = list(ours(run)), list(theirs(run))
    assert len(our_xs) == len(their_xs)
    worst = 0.0
    for x, their_x, scale in zip(our_xs, their_xs, scales[-len(our_xs) :], strict=True):
        assert np.isfinite(their_x).all()
        worst = max(worst, float(np.abs(x - their_x).max() * scale))
    return worst


def assert_matches_diffusers(run: Run, bound: float = BOUND) -> None:
    bound = max(bound, ROUNDING * noise_over_signal(run.raw, float(run.plan.timesteps[0])))
    worst = deviation(run)
    assert worst < bound, f"{worst} >= {bound}: {run.sampler}, {run.steps} steps, {run.raw}"


def heun_bound(run: Run) -> float:
    """BOUND, or what one rounding of x becomes where a step of heun goes far down.

    Its correction is (x - x0) / sigma_next * (sigma - sigma_next) / 2, of an x that was just made
    from numbers of size sigma.
    """
    sigma = run.plan.noise_level[::2]
    return float(np.max(ROUNDING * sigma[:-1] ** 2 / (2 * sigma[1:]), initial=BOUND))


def noise_over_signal(raw: RawConfig, timestep: float) -> float:
    """sigma / alpha at a timestep of a discrete noise schedule; 0 for flow matching."""
    if is_flow(raw):
        return 0.0
    alpha_bar = DDPMScheduler.from_config(raw).alphas_cumprod
    bar = float(alpha_bar[round(timestep)]) or 2**-24  # diffusers' stand-in for 0
    return ((1 - bar) / bar) ** 0.5


def gaussian_network(raw: RawConfig) -> Network:
    """The best prediction for pixels from N(0.3, 0.5^2), with a ripple: bounded as a trained one.

    (An untrained epsilon network lets x0 = x / alpha grow a hundredfold, and rounding with it.)
    """
    if is_flow(raw):
        return lambda sample, timestep: _gaussian(sample, 1 - timestep / 1000, timestep / 1000)[2]
    alpha_bar = DDPMScheduler.from_config(raw).alphas_cumprod.numpy().astype(np.float64)
    index = ("epsilon", "sample", "flow", "v_prediction").index(
        str(raw.get("prediction_type", "epsilon"))
    )

    def network(sample: Array, timestep: float) -> Array:
        bar = np.interp(timestep, np.arange(len(alpha_bar)), alpha_bar)
        return _gaussian(sample, bar**0.5, (1 - bar) ** 0.5)[index]

    return network


def _gaussian(sample: Array, alpha: float, sigma: float) -> tuple[Array, ...]:
    """(epsilon, x0, epsilon - x0, v) of x = alpha x0 + sigma epsilon."""
    gain = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
    x0 = 0.3 + gain * (sample - alpha * 0.3)
    x0 = x0 + 0.05 * sigma * np.sin(3 * sample)
    epsilon = (sample - alpha * x0) / sigma
    predictions = (epsilon, x0, epsilon - x0, alpha * epsilon - sigma * x0)
    return tuple(prediction.astype(np.float32) for prediction in predictions)
