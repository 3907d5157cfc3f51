"""Each sampler reproduces diffusers' scheduler of that name over a whole trajectory."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers_loop import (
    BOUND,
    DISCRETE,
    Network,
    RawConfig,
    Run,
    assert_matches_diffusers,
    gaussian_network,
    heun_bound,
    ours,
    scheduler_of,
    theirs,
)

from engine.errors import OptionError
from engine.noise import noise
from engine.samplers import default_sampler, guide, samplers_for, step, trajectory
from engine.scheduler_config import SchedulerConfig
from engine.trajectory import Array

STEPS = (4, 5, 10, 20, 50)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
KARRAS = ("euler", "heun", "dpmpp_2m")  # the samplers whose diffusers class has Karras sigmas
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

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def discrete(**keys: object) -> RawConfig:
    # betas written out, because Heun's and LCM's defaults are others
    base = {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02}
    return {**base, "beta_schedule": "linear", "clip_sample": False, **keys}


def config_of(raw: RawConfig) -> SchedulerConfig:
    return SchedulerConfig.parse(raw)


def check(
    sampler: str, raw: RawConfig, steps: tuple[int, ...] = STEPS, double: bool = False
) -> None:
    network = gaussian_network(raw)
    for count in steps:
        assert_matches_diffusers(Run(sampler, raw, count, network=network, double=double))


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


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("sampler", DISCRETE)
def test_a_discrete_sampler_matches_diffusers(
    sampler: str, betas: str, spacing: str, prediction_type: str
) -> None:
    if sampler == "euler_ancestral" and prediction_type == "sample":
        pytest.skip("EulerAncestralDiscreteScheduler does not take it")
    if (sampler, betas, prediction_type) == ("heun", "squaredcos", "epsilon"):
        pytest.skip("a float32 epsilon times sigma 20,000 leaves heun's correction no digit")
    raw = discrete(timestep_spacing=spacing, prediction_type=prediction_type, **BETAS[betas])
    # From sigma 20,000 to 1 in one step, diffusers' float32 leaves heun no digit and makes
    # euler_ancestral's sigma_down NaN; our coefficients are float64 until they are stored.
    check(sampler, raw, double=betas == "squaredcos" and sampler in ("euler_ancestral", "heun"))


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", DISCRETE)
def test_the_fewest_and_the_most_steps_match_diffusers(
    sampler: str, spacing: str, steps: int
) -> None:
    if sampler == "lcm":
        steps = min(steps, 50)  # original_inference_steps
    if sampler == "dpmpp_2m" and spacing != "trailing":
        steps = min(steps, 999)  # 1000 has equal timesteps, where diffusers divides by zero
    raw = discrete(timestep_spacing=spacing)
    run = Run(sampler, raw, steps, network=gaussian_network(raw))
    assert_matches_diffusers(run, heun_bound(run) if sampler == "heun" else BOUND)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample_range", [1.0, 0.4])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "lcm"])
def test_the_samplers_that_clip_x0_clip_it_as_diffusers_does(
    sampler: str, prediction_type: str, clip_sample_range: float
) -> None:
    raw = discrete(
        clip_sample=True, clip_sample_range=clip_sample_range, prediction_type=prediction_type
    )
    check(sampler, raw)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "lcm"])
def test_zero_terminal_snr_matches_diffusers(sampler: str) -> None:
    raw = discrete(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **BETAS["scaled_linear"],
    )
    check(sampler, raw)


@pytest.mark.parametrize("sigma_bounds", [(None, None), (0.05, 12.0)], ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("sampler", KARRAS)
def test_karras_sigmas_match_diffusers(
    sampler: str, betas: str, spacing: str, sigma_bounds: tuple[float | None, float | None]
) -> None:
    lowest, highest = sigma_bounds
    raw = discrete(
        use_karras_sigmas=True,
        sigma_min=lowest,
        sigma_max=highest,
        timestep_spacing=spacing,
        **BETAS[betas],
    )
    check(sampler, raw)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("sampler", KARRAS)
def test_karras_sigmas_call_the_network_at_diffusers_timesteps(sampler: str, betas: str) -> None:
    for steps in STEPS:
        run = Run(sampler, discrete(use_karras_sigmas=True, **BETAS[betas]), steps)
        # both look them up in a float32 table of log sigma: at worst 1e-6 / 0.003 a timestep apart
        expected = scheduler_of(run).timesteps.numpy()
        np.testing.assert_allclose(run.plan.timesteps, expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("euler_at_final", [False, True])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_last_step_matches_diffusers(
    sampler: str, final_sigmas_type: str, lower_order_final: bool, euler_at_final: bool
) -> None:
    raw = discrete(
        final_sigmas_type=final_sigmas_type,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )
    check(sampler, raw, (1, 2, 14, 15, 30))  # lower_order_final is for less than 15


@pytest.mark.parametrize("timestep_scaling", [10.0, 0.001])
@pytest.mark.parametrize("original_inference_steps", [50, 37, 1000])
def test_lcm_matches_diffusers_with_every_distillation(
    original_inference_steps: int, timestep_scaling: float
) -> None:
    raw = discrete(
        original_inference_steps=original_inference_steps, timestep_scaling=timestep_scaling
    )
    check("lcm", raw, (1, 2, 3, 4, 7, 8, 37))


@pytest.mark.parametrize("sampler", DISCRETE)
def test_a_class_conditional_unet_is_sampled_as_by_diffusers(sampler: str) -> None:
    network = unet()
    for steps in STEPS:
        raw = discrete(prediction_type="v_prediction")
        assert_matches_diffusers(Run(sampler, raw, steps, network=network))


@pytest.mark.parametrize("sampler", DISCRETE)
def test_keys_that_a_config_leaves_out_take_the_defaults_of_the_samplers_own_class(
    sampler: str,
) -> None:
    # spacing: DDIM leading, the others linspace; clipping: DDIM only
    raw = discrete(_class_name="DDPMScheduler")
    del raw["clip_sample"]
    check(sampler, raw, (10,))


@pytest.mark.parametrize(
    "class_name", ["HeunDiscreteScheduler", "LCMScheduler", "EulerDiscreteScheduler"]
)
def test_betas_that_a_config_leaves_out_are_those_of_its_own_class(class_name: str) -> None:
    raw: RawConfig = {"_class_name": class_name}
    sampler = default_sampler(config_of(raw))
    scheduler = scheduler_of(Run(sampler, raw, 4))
    same = discrete(
        **{key: scheduler.config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    )
    run = Run(sampler, raw, 4, network=gaussian_network(same))
    for x, their_x in zip(ours(run), theirs(run), strict=True):
        np.testing.assert_allclose(x, their_x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sampler", DISCRETE)
def test_init_noise_sigma_is_that_of_diffusers(sampler: str) -> None:
    for spacing, steps in product(SPACINGS, STEPS):
        run = Run(sampler, discrete(timestep_spacing=spacing), steps)
        expected = float(scheduler_of(run).init_noise_sigma)
        assert run.plan.init_noise_sigma == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sampler", [sampler for sampler in DISCRETE if sampler != "lcm"])
def test_trailing_spacing_takes_the_steps_that_were_asked_for(sampler: str) -> None:
    # diffusers 0.42 takes 62 for 61: its arange(1000, 0, -1000 / 61) ends with 1e-13
    plan = Run(sampler, discrete(timestep_spacing="trailing"), 61).plan
    assert plan.num_inference_steps == 61
    assert len(plan.timesteps) == (121 if sampler == "heun" else 61)
    assert plan.timesteps.min() >= 0


def test_dpmpp_2m_goes_on_in_first_order_after_a_step_of_no_length() -> None:
    raw = discrete(timestep_spacing="linspace")
    network = gaussian_network(raw)
    *_, diffusers_x = theirs(Run("dpmpp_2m", raw, 1000, network=network))
    assert np.isnan(diffusers_x).all()  # 1001 rounded timesteps in 0..999: two are equal
    *_, x = ours(Run("dpmpp_2m", raw, 1000, network=network))
    *_, fewer = ours(Run("dpmpp_2m", raw, 900, network=network))
    np.testing.assert_allclose(x, fewer, atol=0.01)


def test_rows_mixed_in_one_step_have_the_bytes_of_each_row_alone() -> None:
    config = config_of(discrete(clip_sample=True))
    flow = config_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    table = np.stack(
        [
            trajectory("ddim", config, 10).coefficients[0],
            trajectory("euler", config, 50).coefficients[49],
            trajectory("dpmpp_2m", config, 20).coefficients[7],
            trajectory("flow_euler", flow, 4).coefficients[2],
            trajectory("euler_ancestral", config, 999).coefficients[500],
            trajectory("heun", config, 10).coefficients[3],
            trajectory("lcm", config, 4).coefficients[1],
        ]
    )
    scale = np.array([1.0, 7.5, 0.0, 3.0, 12.0, 2.0, 1.5], np.float32)
    shape = (len(table), 3, 9, 7)  # an odd size, so that vector loops have remainders
    x, output, unconditional, x_previous, x0, fresh = (noise(seed, shape) for seed in range(6))
    together = step(x, guide(output, unconditional, scale), x_previous, x0, fresh, table)
    for row in range(len(table)):
        one = slice(row, row + 1)
        guided = guide(output[one], unconditional[one], scale[one])
        alone = step(x[one], guided, x_previous[one], x0[one], fresh[one], table[one])
        assert together[0][one].tobytes() == alone[0].tobytes()
        assert together[1][one].tobytes() == alone[1].tobytes()
        assert alone[0].dtype == np.float32


def test_guidance_goes_from_the_unconditional_to_the_conditional_output_and_beyond() -> None:
    unconditional, conditional = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    guided = guide(conditional, unconditional, np.array([0, 1, 7.5], np.float32))
    np.testing.assert_array_equal(guided[:, 0], [0, 1, 7.5])


@pytest.mark.parametrize("sampler", DISCRETE)
def test_a_trajectory_is_cached_float32_and_read_only(sampler: str) -> None:
    plan = trajectory(sampler, config_of(discrete()), 10)
    assert plan is trajectory(sampler, config_of(discrete()), 10)
    arrays = (
        plan.timesteps, plan.input_scale, plan.signal, plan.noise_level, plan.coefficients,
    )  # fmt: skip
    for array in arrays:
        assert len(array) == len(plan.timesteps)
        assert array.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


ALL = "ddim, euler, euler_ancestral, heun, dpmpp_2m, lcm"


@pytest.mark.parametrize(
    ("sampler", "steps", "message"),
    [
        ("x", 10, f"sampler must be one of {ALL}, got 'x'"),
        ("flow_euler", 10, f"sampler must be one of {ALL}, got 'flow_euler'"),
        ("ddim", 0, "num_inference_steps must be 1..1000, got 0"),
        ("euler", 1001, "num_inference_steps must be 1..1000, got 1001"),
        ("dpmpp_2m", 1000, "num_inference_steps must be 1..999, got 1000"),
        ("lcm", 51, "num_inference_steps must be 1..50, got 51"),
        ("ddim", 1000, "steps_offset 1 starts ddim at timestep 1000, past the last one, 999;"),
    ],
)
def test_a_wrong_sampler_or_number_of_steps_says_what_is_allowed(
    sampler: str, steps: int, message: str
) -> None:
    config = config_of(discrete(timestep_spacing="leading", steps_offset=1))
    with pytest.raises(OptionError) as raised:
        trajectory(sampler, config, steps)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_epsilon_is_refused_where_zero_terminal_snr_leaves_only_noise(sampler: str) -> None:
    raw = discrete(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(OptionError, match="use sampler euler or dpmpp_2m"):
        trajectory(sampler, config_of(raw), 10)


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({}, ""),
        ({"use_karras_sigmas": None}, ""),
        ({"use_karras_sigmas": True}, "ddim euler_ancestral lcm"),
        ({"final_sigmas_type": "sigma_min"}, "ddim euler_ancestral heun lcm"),
        ({"rescale_betas_zero_snr": True}, "heun"),
        ({"prediction_type": "sample"}, "euler_ancestral"),
        ({"solver_order": 3}, "dpmpp_2m"),
        ({"solver_order": 1}, "dpmpp_2m"),
        ({"num_train_timesteps": 20}, "lcm"),
    ],
    ids=str,
)
def test_a_sampler_that_would_not_honour_a_key_is_not_offered_and_says_so(
    keys: RawConfig, refused: str
) -> None:
    config = config_of(discrete(**keys))
    offered = samplers_for(config)
    assert set(offered) == set(DISCRETE) - set(refused.split())
    for sampler in refused.split():
        with pytest.raises(OptionError) as raised:
            trajectory(sampler, config, 4)
        assert str(raised.value).startswith(f"sampler {sampler} does not honour ")
        assert str(raised.value).endswith(f"use one of {', '.join(offered)}")


@pytest.mark.parametrize(
    ("class_name", "keys", "sampler"),
    [
        ("DDIMScheduler", {}, "ddim"),
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
        ("HeunDiscreteScheduler", {}, "heun"),
        ("LCMScheduler", {}, "lcm"),
        ("PNDMScheduler", {}, "dpmpp_2m"),
        ("UniPCMultistepScheduler", {}, "dpmpp_2m"),
        ("DDIMScheduler", {"use_karras_sigmas": True}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "ddim"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, "euler"),
    ],
)
def test_the_default_sampler_is_what_the_configs_class_means(
    class_name: str, keys: RawConfig, sampler: str
) -> None:
    assert default_sampler(config_of(discrete(_class_name=class_name, **keys))) == sampler
