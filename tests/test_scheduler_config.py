"""What is read from a scheduler_config.json, and what is refused."""

import json

import pytest
from diffusers import (
    DDPMScheduler,
    DPMSolverSinglestepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers_loop import DISCRETE, FLOW, RawConfig

from engine.errors import OptionError
from engine.samplers import default_sampler
from engine.scheduler_config import SchedulerConfig

STABLE_DIFFUSION: RawConfig = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
PUBLISHED: dict[str, RawConfig] = {
    "stable-diffusion-1.5": {
        **STABLE_DIFFUSION,
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
    },
    "stable-diffusion-2.1": {
        **STABLE_DIFFUSION,
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "prediction_type": "v_prediction",
    },
    "stable-diffusion-xl-base-1.0": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "sigma_max": None,
        "sigma_min": None,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "sdxl-turbo": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": False,
    },
    "lcm-dreamshaper-v7": {
        "_class_name": "LCMScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": 1000,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
    "stable-diffusion-3-medium": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.29.0.dev0",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
    "flux.1-dev": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "flux.1-schnell": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0.dev0",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
    },
    "pixart-xl-2": {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "linspace",
        "trained_betas": None,
        "use_karras_sigmas": False,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "sana-1600m": {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.32.0.dev0",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "final_sigmas_type": "zero",
        "flow_shift": 3.0,
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "midpoint",
        "timestep_spacing": "linspace",
        "use_flow_sigmas": True,
        "use_karras_sigmas": False,
    },
}


def discrete(**keys: object) -> RawConfig:
    return {"_class_name": "DDIMScheduler", **keys}


def flow(**keys: object) -> RawConfig:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **keys}


def sana(**keys: object) -> RawConfig:
    return {**PUBLISHED["sana-1600m"], **keys}


@pytest.mark.parametrize(
    ("checkpoint", "sampler"),
    [
        ("stable-diffusion-1.5", "dpmpp_2m"),
        ("stable-diffusion-2.1", "ddim"),
        ("stable-diffusion-xl-base-1.0", "euler"),
        ("sdxl-turbo", "euler_ancestral"),
        ("lcm-dreamshaper-v7", "lcm"),
        ("stable-diffusion-3-medium", "flow_euler"),
        ("flux.1-dev", "flow_euler"),
        ("flux.1-schnell", "flow_euler"),
        ("pixart-xl-2", "dpmpp_2m"),
        ("sana-1600m", "dpmpp_2m"),
    ],
)
def test_a_published_checkpoints_config_is_read_and_names_its_sampler(
    checkpoint: str, sampler: str
) -> None:
    raw = PUBLISHED[checkpoint]
    config = SchedulerConfig.parse(raw)
    assert default_sampler(config) == sampler
    for key in {"prediction_type", "timestep_spacing", "steps_offset", "shift"} & set(raw):
        if not config.is_flow or key == "shift":
            assert getattr(config, key) == raw[key]


def test_the_shift_of_a_dpm_solver_config_is_its_flow_shift() -> None:
    assert SchedulerConfig.parse(sana(flow_shift=2.5)).shift == 2.5
    assert SchedulerConfig.parse(sana(flow_shift=2.5, shift=7.0)).shift == 2.5
    assert SchedulerConfig.parse(flow(flow_shift=2.5, shift=7.0)).shift == 7.0


@pytest.mark.parametrize(
    "scheduler",
    [
        *DISCRETE.values(),
        *FLOW.values(),
        DDPMScheduler,
        DPMSolverSinglestepScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
    ids=lambda scheduler: scheduler.__name__,
)
def test_the_config_that_diffusers_writes_by_default_is_read(scheduler: type) -> None:
    raw = json.loads(scheduler().to_json_string())
    config = SchedulerConfig.parse(raw)
    assert config.num_train_timesteps == 1000
    if not config.is_flow:
        assert config.timestep_spacing == raw.get("timestep_spacing")
        assert config.beta_start == raw["beta_start"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name must be one of DDIMScheduler, DDPM"),
        ({}, "_class_name must be one of DDIMScheduler, DDPMScheduler, DPMSolverMultistep"),
        (discrete(beta_schedule="sigmoid"), "beta_schedule must be one of linear, scaled_linear,"),
        (discrete(beta_start=-1.0), "beta_start must be more than 0 and less than 1, got -1.0"),
        (discrete(trained_betas=[0.1]), "trained_betas must be null, got [0.1]"),
        (discrete(prediction_type="flow_prediction"), "prediction_type must be epsilon, v_pred"),
        (discrete(timestep_spacing="even"), "timestep_spacing must be one of leading, trailing,"),
        (discrete(use_karras_sigmas="yes"), "use_karras_sigmas must be true or false, got 'yes'"),
        (discrete(use_beta_sigmas=True), "use_beta_sigmas must be False or None, got True"),
        (discrete(use_exponential_sigmas=True), "use_exponential_sigmas must be False or None"),
        (discrete(use_lu_lambdas=True), "use_lu_lambdas must be False or None, got True"),
        (discrete(use_dynamic_shifting=True), "use_dynamic_shifting must be False or None"),
        (discrete(thresholding=True), "thresholding must be False or None, got True"),
        (discrete(variance_type="learned"), "variance_type must be None or 'fixed_small' or"),
        (discrete(interpolation_type="log_linear"), "interpolation_type must be 'linear', got"),
        (discrete(timestep_type="continuous"), "timestep_type must be 'discrete', got"),
        (discrete(solver_order=4), "solver_order must be 1..3, got 4"),
        (discrete(algorithm_type="dpmsolver"), "algorithm_type must be 'dpmsolver++', got"),
        (discrete(solver_type="heun"), "solver_type must be 'midpoint' or 'bh1' or 'bh2', got"),
        (discrete(final_sigmas_type="x"), "final_sigmas_type must be one of zero, sigma_min, got"),
        (discrete(lambda_min_clipped=-5.1), "lambda_min_clipped must be -inf, got -5.1"),
        (discrete(shift=3.0), "shift (here 3.0) is not a key that Vitrine knows"),
        (discrete(sparkle=1), "sparkle (here 1) is not a key that Vitrine knows"),
        (flow(invert_sigmas=True), "invert_sigmas must be False or None, got True"),
        (flow(stochastic_sampling=True), "stochastic_sampling must be False or None, got True"),
        (flow(shift=0.0), "shift must be more than 0, got 0.0"),
        (flow(shift_terminal=1.0), "shift_terminal must be at least 0 and less than 1, got 1.0"),
        (flow(time_shift_type="cubic", use_dynamic_shifting=True), "time_shift_type must be one"),
        (flow(max_image_seq_len=256), "max_image_seq_len must differ from base_image_seq_len 256"),
        (sana(prediction_type="epsilon"), "prediction_type must be flow_prediction with use_flow"),
        (sana(final_sigmas_type="sigma_min"), "final_sigmas_type must be 'zero', got 'sigma_min'"),
    ],
    ids=str,
)
def test_a_scheduler_config_that_we_do_not_honour_is_an_option_error(
    raw: RawConfig, message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        SchedulerConfig.parse(raw)
    assert str(raised.value).startswith(f"scheduler_config.json: {message}")
