"""The samplers of flow matching reproduce diffusers' schedulers as its pipelines call them."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers_loop import (
    BOUND,
    FLOW,
    SEED,
    SHAPE,
    RawConfig,
    Run,
    assert_matches_diffusers,
    gaussian_network,
    ours,
    scheduler_of,
)
from test_samplers import STEPS, unet

from engine.errors import OptionError
from engine.samplers import default_sampler, samplers_for, trajectory
from engine.scheduler_config import SchedulerConfig
from engine.schedules import FlowSpacing

DYNAMIC: RawConfig = {"use_dynamic_shifting": True, "shift": 3.0}
FLUX_TOKENS = (256, 1024, 4096)  # of 256, 512 and 1024 pixels square

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def flow(**keys: object) -> RawConfig:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **keys}


def sana(**keys: object) -> RawConfig:
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        **keys,
    }


def check(
    sampler: str,
    raw: RawConfig,
    image_seq_len: int | None = None,
    sigmas: FlowSpacing = "scheduler",
    steps: tuple[int, ...] = STEPS,
) -> None:
    network = gaussian_network(raw)
    for count in steps:
        assert_matches_diffusers(Run(sampler, raw, count, image_seq_len, sigmas, None, network))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", FLOW)
def test_a_flow_sampler_matches_diffusers_as_stable_diffusion_3_calls_it(
    sampler: str, shift: float
) -> None:
    check(sampler, flow(shift=shift), steps=(1, 2, 3, *STEPS))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_matches_diffusers_in_a_thousand_steps(shift: float) -> None:
    check("flow_euler", flow(shift=shift), steps=(1000,))


@pytest.mark.parametrize("sigmas", ["scheduler", "linear"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_matches_diffusers_as_flux_calls_it_without_dynamic_shifting(
    shift: float, sigmas: FlowSpacing
) -> None:
    check("flow_euler", flow(shift=shift), 1024, sigmas, steps=(1, *STEPS))


@pytest.mark.parametrize("image_seq_len", FLUX_TOKENS)
@pytest.mark.parametrize("sigmas", ["scheduler", "linear"])
@pytest.mark.parametrize("sampler", ["flow_euler", "dpmpp_2m"])
def test_dynamic_shifting_matches_diffusers(
    sampler: str, sigmas: FlowSpacing, image_seq_len: int
) -> None:
    check(sampler, flow(**DYNAMIC), image_seq_len, sigmas)
    check(sampler, flow(**DYNAMIC, max_shift=0.9, base_shift=0.2), image_seq_len, sigmas)
    bounds = {"base_image_seq_len": 64, "max_image_seq_len": 8192}
    check(sampler, flow(**DYNAMIC, **bounds), image_seq_len, sigmas)


@pytest.mark.parametrize("sigmas", ["scheduler", "linear"])
@pytest.mark.parametrize(
    "keys",
    [
        {**DYNAMIC, "time_shift_type": "linear"},
        {**DYNAMIC, "shift_terminal": 0.02},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"shift": 3.0, "use_karras_sigmas": True},
        {**DYNAMIC, "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_every_way_to_shift_sigmas_matches_diffusers(keys: RawConfig, sigmas: FlowSpacing) -> None:
    check("flow_euler", flow(**keys), 1024, sigmas)


@pytest.mark.parametrize("sampler", FLOW)
def test_a_dpm_solver_config_with_flow_sigmas_runs_on_every_flow_sampler(sampler: str) -> None:
    check(sampler, sana())
    assert samplers_for(SchedulerConfig.parse(sana())) == tuple(FLOW)


def test_heun_takes_flux_sigmas_although_diffusers_scheduler_has_no_argument_for_them() -> None:
    raw, steps = flow(shift=1.0), 4
    network = gaussian_network(raw)
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sigmas = torch.tensor([1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0])
    scheduler.sigmas, scheduler.timesteps = sigmas, sigmas[:-1] * 1000
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    run = Run("heun", raw, steps, sigmas="linear", network=network)
    for timestep, our_x in zip(scheduler.timesteps, ours(run), strict=True):
        output = torch.from_numpy(network(x.numpy(), float(timestep)))
        x = scheduler.step(output, timestep, x).prev_sample
        np.testing.assert_allclose(our_x, x.numpy(), rtol=0, atol=BOUND)


@pytest.mark.parametrize("sampler", FLOW)
def test_a_unet_is_sampled_as_by_diffusers(sampler: str) -> None:
    network = unet()
    for steps in STEPS:
        assert_matches_diffusers(Run(sampler, flow(shift=3.0), steps, network=network))


@pytest.mark.parametrize("sampler", FLOW)
def test_init_noise_sigma_is_that_of_diffusers(sampler: str) -> None:
    run = Run(sampler, flow(shift=3.0), 10)
    assert run.plan.init_noise_sigma == getattr(scheduler_of(run), "init_noise_sigma", 1.0)


@pytest.mark.parametrize("sampler", ["flow_euler", "dpmpp_2m"])
@pytest.mark.parametrize("image_seq_len", [None, 0])
def test_dynamic_shifting_asks_for_the_length_of_the_images_sequence(
    sampler: str, image_seq_len: int | None
) -> None:
    with pytest.raises(OptionError, match="image_seq_len must be the number of the image's tokens"):
        trajectory(sampler, SchedulerConfig.parse(flow(**DYNAMIC)), 4, image_seq_len)


def test_a_terminal_shift_needs_two_steps() -> None:
    config = SchedulerConfig.parse(flow(shift_terminal=0.1))
    with pytest.raises(OptionError, match=r"num_inference_steps must be 2\.\.1000, got 1"):
        trajectory("flow_euler", config, 1)


@pytest.mark.parametrize(
    ("raw", "offered"),
    [
        (flow(), "flow_euler heun dpmpp_2m"),
        (flow(**DYNAMIC), "flow_euler dpmpp_2m"),
        (flow(**DYNAMIC, time_shift_type="linear"), "flow_euler"),
        (flow(time_shift_type="linear"), "flow_euler heun dpmpp_2m"),
        (flow(shift_terminal=0.1), "flow_euler"),
        (flow(use_karras_sigmas=True), "flow_euler"),
        (sana(solver_order=3), "flow_euler heun"),
    ],
    ids=str,
)
def test_the_samplers_that_fit_a_flow_config(raw: RawConfig, offered: str) -> None:
    config = SchedulerConfig.parse(raw)
    assert samplers_for(config) == tuple(offered.split())
    for sampler in set(FLOW) - set(offered.split()):
        with pytest.raises(OptionError, match=f"sampler {sampler} does not honour "):
            trajectory(sampler, config, 4, 256)


@pytest.mark.parametrize(
    ("raw", "sampler"),
    [
        (flow(), "flow_euler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "heun"),
        (sana(), "dpmpp_2m"),
        (sana(_class_name="UniPCMultistepScheduler"), "dpmpp_2m"),
        (sana(solver_order=3), "flow_euler"),
    ],
    ids=str,
)
def test_the_default_sampler_is_what_the_configs_class_means(raw: RawConfig, sampler: str) -> None:
    assert default_sampler(SchedulerConfig.parse(raw)) == sampler
