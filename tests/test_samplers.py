"""Each sampler reproduces diffusers' scheduler of that name over a whole trajectory."""

import json
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from engine.errors import OptionError
from engine.noise import noise
from engine.samplers import SAMPLERS, Array, guide, samplers_for, step, trajectory
from engine.schedules import SchedulerConfig

Network = Callable[[Array, float], Array]  # (sample, timestep) -> raw prediction
RawConfig = dict[str, object]

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
}
DISCRETE = ("ddim", "euler", "dpmpp_2m")
STEPS = (4, 5, 10, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 3, 8, 8)
FLOW: RawConfig = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
BETAS: dict[str, RawConfig] = {
    "linear": {"beta_schedule": "linear"},
    # Stable Diffusion's, whose schedule ends with signal left
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    },
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
}

# Both sides compute in float32 on values of a few units. x0 = (x - sigma epsilon) / alpha turns a
# rounding of x (2^-24 |x|, |x| < 4) into sigma / alpha times as much, and Euler's x has that
# size itself: that is over BOUND only for squaredcos, where sigma / alpha starts at 20,000.
BOUND = 1e-4
ROUNDING = 4 * 2**-24


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def discrete(**keys: object) -> RawConfig:
    return {"_class_name": "DDIMScheduler", "clip_sample": False, **keys}


def gaussian_network(raw: RawConfig) -> Network:
    """The best prediction for pixels from N(0.3, 0.5^2), with a ripple: bounded as a trained one.

    (An untrained epsilon network lets x0 = x / alpha grow a hundredfold, and rounding with it.)
    """
    if raw["_class_name"] == FLOW["_class_name"]:
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


def unet() -> Network:
    """A random class-conditional UNet; returns its raw output for classes 0 and 2."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()

    @torch.no_grad()
    def network(sample: Array, timestep: float) -> Array:
        batch = torch.full((len(sample),), timestep)
        labels = torch.tensor([0, 2])
        output: Array = model(torch.from_numpy(sample), batch, class_labels=labels).sample.numpy()
        return output

    return network


def our_steps(sampler: str, raw: RawConfig, steps: int, network: Network) -> Iterator[Array]:
    plan = trajectory(sampler, SchedulerConfig.parse(raw), steps)
    x = noise(3, SHAPE) * np.float32(plan.init_noise_sigma)
    x0 = np.zeros_like(x)
    for timestep, scale, row in zip(
        plan.timesteps, plan.input_scale, plan.coefficients, strict=True
    ):
        x, x0 = step(x, network(x * scale, float(timestep)), x0, np.stack([row] * len(x)))
        yield x


def diffusers_steps(sampler: str, raw: RawConfig, steps: int, network: Network) -> Iterator[Array]:
    scheduler = SCHEDULERS[sampler].from_config(raw)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise(3, SHAPE)) * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    for timestep in scheduler.timesteps:
        sample = scale_model_input(x, timestep)
        output = torch.from_numpy(network(sample.numpy(), float(timestep)))
        x = scheduler.step(output, timestep, x).prev_sample
        yield x.numpy()


def assert_matches_diffusers(sampler: str, raw: RawConfig, steps: int, network: Network) -> None:
    """Compare x after every step, in units of its own standard deviation.

    Euler's x is x0 + sigma epsilon with sigma up to 20,000, where one float32 rounding is 1e-3:
    it is divided by sqrt(sigma^2 + 1), which is what the network sees.
    """
    plan = trajectory(sampler, SchedulerConfig.parse(raw), steps)
    bound = max(BOUND, ROUNDING * noise_over_signal(raw, float(plan.timesteps[0])))
    scales = np.append(plan.input_scale[1:], 1.0)
    pairs = list(
        zip(
            our_steps(sampler, raw, steps, network),
            diffusers_steps(sampler, raw, steps, network),
            strict=True,
        )
    )
    assert len(pairs) == steps
    for index, (ours, theirs) in enumerate(pairs):
        assert np.isfinite(theirs).all()
        difference = float(np.abs(ours - theirs).max() * scales[index])
        assert difference < bound, f"{steps} steps, step {index}: {difference}"


def noise_over_signal(raw: RawConfig, timestep: float) -> float:
    """sigma / alpha at a timestep of a discrete noise schedule; 0 for flow matching."""
    if raw["_class_name"] == FLOW["_class_name"]:
        return 0.0
    alpha_bar = DDPMScheduler.from_config(raw).alphas_cumprod
    bar = float(alpha_bar[round(timestep)]) or 2**-24  # diffusers' stand-in for 0
    return ((1 - bar) / bar) ** 0.5


@pytest.mark.parametrize("sampler", DISCRETE)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_discrete_sampler_matches_diffusers(
    sampler: str, betas: str, spacing: str, prediction_type: str
) -> None:
    raw = discrete(timestep_spacing=spacing, prediction_type=prediction_type, **BETAS[betas])
    for steps in STEPS:
        assert_matches_diffusers(sampler, raw, steps, gaussian_network(raw))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, *STEPS, 1000])
def test_flow_euler_matches_diffusers(shift: float, steps: int) -> None:
    raw = {**FLOW, "shift": shift}
    assert_matches_diffusers("flow_euler", raw, steps, gaussian_network(raw))


@pytest.mark.parametrize("sampler", DISCRETE)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_the_fewest_and_the_most_steps_match_diffusers(
    sampler: str, spacing: str, steps: int
) -> None:
    if sampler == "dpmpp_2m" and spacing != "trailing":
        steps = min(steps, 999)  # 1000 has equal timesteps, where diffusers divides by zero
    raw = discrete(timestep_spacing=spacing)
    assert_matches_diffusers(sampler, raw, steps, gaussian_network(raw))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample_range", [1.0, 0.4])
def test_ddim_clips_x0_as_diffusers_does(prediction_type: str, clip_sample_range: float) -> None:
    raw = discrete(
        clip_sample=True, clip_sample_range=clip_sample_range, prediction_type=prediction_type
    )
    for steps in STEPS:
        assert_matches_diffusers("ddim", raw, steps, gaussian_network(raw))


@pytest.mark.parametrize("sampler", DISCRETE)
def test_zero_terminal_snr_matches_diffusers(sampler: str) -> None:
    raw = discrete(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **BETAS["scaled_linear"],
    )
    for steps in STEPS:
        assert_matches_diffusers(sampler, raw, steps, gaussian_network(raw))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_class_conditional_unet_is_sampled_as_by_diffusers(sampler: str) -> None:
    raw = FLOW if sampler == "flow_euler" else discrete(prediction_type="v_prediction")
    network = unet()
    for steps in STEPS:
        assert_matches_diffusers(sampler, raw, steps, network)


@pytest.mark.parametrize("sampler", DISCRETE)
def test_keys_that_a_config_leaves_out_take_the_defaults_of_the_samplers_own_class(
    sampler: str,
) -> None:
    raw: RawConfig = {"_class_name": "DDPMScheduler"}  # spacing: DDIM leading, the others linspace
    assert_matches_diffusers(sampler, raw, 10, gaussian_network(raw))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_init_noise_sigma_is_that_of_diffusers(sampler: str) -> None:
    for spacing, steps in product(SPACINGS, STEPS):
        raw = FLOW if sampler == "flow_euler" else discrete(timestep_spacing=spacing)
        scheduler = SCHEDULERS[sampler].from_config(raw)
        scheduler.set_timesteps(steps)
        ours = trajectory(sampler, SchedulerConfig.parse(raw), steps).init_noise_sigma
        assert ours == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-6)


@pytest.mark.parametrize("sampler", DISCRETE)
def test_trailing_spacing_takes_the_steps_that_were_asked_for(sampler: str) -> None:
    # diffusers 0.42 takes 62 for 61: its arange(1000, 0, -1000 / 61) ends with 1e-13
    plan = trajectory(sampler, SchedulerConfig.parse(discrete(timestep_spacing="trailing")), 61)
    assert len(plan.timesteps) == 61
    assert plan.timesteps.min() >= 0


def test_dpmpp_2m_goes_on_in_first_order_after_a_step_of_no_length() -> None:
    raw = discrete(timestep_spacing="linspace")
    network = gaussian_network(raw)
    *_, theirs = diffusers_steps("dpmpp_2m", raw, 1000, network)
    assert np.isnan(theirs).all()  # 1001 rounded timesteps in 0..999: two are equal
    *_, ours = our_steps("dpmpp_2m", raw, 1000, network)
    *_, fewer = our_steps("dpmpp_2m", raw, 900, network)
    np.testing.assert_allclose(ours, fewer, atol=0.01)


def test_rows_mixed_in_one_step_have_the_bytes_of_each_row_alone() -> None:
    config = SchedulerConfig.parse(discrete(clip_sample=True))
    flow = SchedulerConfig.parse(FLOW)
    table = np.stack(
        [
            trajectory("ddim", config, 10).coefficients[0],
            trajectory("euler", config, 50).coefficients[49],
            trajectory("dpmpp_2m", config, 20).coefficients[7],
            trajectory("flow_euler", flow, 4).coefficients[2],
            trajectory("ddim", config, 999).coefficients[500],
        ]
    )
    scale = np.array([1.0, 7.5, 0.0, 3.0, 12.0], np.float32)
    shape = (len(table), 3, 9, 7)  # an odd size, so that vector loops have remainders
    x, output, unconditional, x0 = (noise(seed, shape) for seed in range(4))
    together = step(x, guide(output, unconditional, scale), x0, table)
    for row in range(len(table)):
        one = slice(row, row + 1)
        guided = guide(output[one], unconditional[one], scale[one])
        alone = step(x[one], guided, x0[one], table[one])
        assert together[0][one].tobytes() == alone[0].tobytes()
        assert together[1][one].tobytes() == alone[1].tobytes()
        assert alone[0].dtype == np.float32


def test_guidance_goes_from_the_unconditional_to_the_conditional_output_and_beyond() -> None:
    unconditional, conditional = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    guided = guide(conditional, unconditional, np.array([0, 1, 7.5], np.float32))
    np.testing.assert_array_equal(guided[:, 0], [0, 1, 7.5])


def test_a_trajectory_is_cached_and_read_only() -> None:
    plan = trajectory("euler", SchedulerConfig.parse(discrete()), 10)
    assert plan is trajectory("euler", SchedulerConfig.parse(discrete()), 10)
    for array in (plan.timesteps, plan.input_scale, plan.coefficients):
        assert array.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("x", 10, "sampler must be one of ddim, euler, dpmpp_2m, got 'x'"),
        ("flow_euler", 10, "sampler must be one of ddim, euler, dpmpp_2m, got 'flow_euler'"),
        ("ddim", 0, "num_inference_steps must be 1..1000, got 0"),
        ("euler", 1001, "num_inference_steps must be 1..1000, got 1001"),
        ("dpmpp_2m", 1000, "num_inference_steps must be 1..999, got 1000"),
        ("ddim", 1000, "steps_offset 1 starts ddim at timestep 1000, past the last one, 999;"),
    ],
)
def test_a_wrong_sampler_or_number_of_steps_says_what_is_allowed(
    sampler: str, steps: int, message: str
) -> None:
    config = SchedulerConfig.parse(discrete(timestep_spacing="leading", steps_offset=1))
    with pytest.raises(OptionError) as raised:
        trajectory(sampler, config, steps)
    assert str(raised.value).startswith(message)


def test_ddim_refuses_epsilon_at_zero_terminal_snr() -> None:
    raw = discrete(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(OptionError, match="use sampler euler or dpmpp_2m"):
        trajectory("ddim", SchedulerConfig.parse(raw), 10)


def test_the_samplers_that_fit_a_config() -> None:
    assert samplers_for(SchedulerConfig.parse(discrete())) == DISCRETE
    assert samplers_for(SchedulerConfig.parse(FLOW)) == ("flow_euler",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name must be one of DDIMScheduler, DDPM"),
        ({}, "_class_name must be one of DDIMScheduler, DDPMScheduler, DPMSolverMultistep"),
        (discrete(beta_schedule="sigmoid"), "beta_schedule must be one of linear, scaled_linear,"),
        (discrete(beta_start=-1.0), "beta_start must be more than 0 and less than 1, got -1.0"),
        (discrete(trained_betas=[0.1]), "trained_betas must be null, got [0.1]"),
        (discrete(prediction_type="flow_prediction"), "prediction_type must be epsilon, v_pred"),
        (discrete(timestep_spacing="even"), "timestep_spacing must be one of leading, trailing,"),
        (discrete(use_karras_sigmas=True), "use_karras_sigmas must be False, got True"),
        (discrete(thresholding=True), "thresholding must be False or None, got True"),
        (discrete(variance_type="learned"), "variance_type must be None or 'fixed_small' or"),
        (discrete(solver_order=3), "solver_order must be 2, got 3"),
        (discrete(algorithm_type="dpmsolver"), "algorithm_type must be 'dpmsolver++', got"),
        (discrete(final_sigmas_type="sigma_min"), "final_sigmas_type must be 'zero', got"),
        (discrete(lambda_min_clipped=-5.1), "lambda_min_clipped must be -inf, got -5.1"),
        (discrete(shift=3.0), "shift (here 3.0) is not a key that Vitrine knows"),
        (discrete(sparkle=1), "sparkle (here 1) is not a key that Vitrine knows"),
        ({**FLOW, "use_dynamic_shifting": True}, "use_dynamic_shifting must be False or None"),
        ({**FLOW, "invert_sigmas": True}, "invert_sigmas must be False or None, got True"),
        ({**FLOW, "shift": 0.0}, "shift must be more than 0, got 0.0"),
    ],
    ids=str,
)
def test_a_scheduler_config_that_we_do_not_honour_is_an_option_error(
    raw: RawConfig, message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        SchedulerConfig.parse(raw)
    assert str(raised.value).startswith(f"scheduler_config.json: {message}")


@pytest.mark.parametrize(
    "scheduler",
    [*SCHEDULERS.values(), DDPMScheduler],
    ids=lambda scheduler: scheduler.__name__,
)
def test_the_config_that_diffusers_writes_by_default_is_read(scheduler: type) -> None:
    raw = json.loads(scheduler().to_json_string())
    config = SchedulerConfig.parse(raw)
    assert config.num_train_timesteps == 1000
    assert config.timestep_spacing == raw.get("timestep_spacing")


def test_stable_diffusion_xls_scheduler_config_is_read() -> None:
    raw = discrete(
        interpolation_type="linear",
        sample_max_value=1.0,
        skip_prk_steps=True,
        timestep_spacing="leading",
        trained_betas=None,
        use_karras_sigmas=False,
        **BETAS["scaled_linear"],
    )
    raw |= {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0"}
    assert SchedulerConfig.parse(raw).steps_offset == 1
